"""Illustrated articles: the value, the steps on a model, the files.

    from xcomposer.article import Composer, export, finish

    composer = Composer(model, tokenizer)
    article = finish(composer.write("Write about a harbour town."))
    article = finish(composer.illustrate(article, "photos/"), tell=print)
    export(article, composer.pictures, "harbour.pdf")

`Article` (article.py) is frozen and knows no model; `Composer` (composer.py) has the steps; prompts.py has their words,
pictures.py the session's pictures and where candidates come from, files.py the files.
"""

from xcomposer.article.article import Article, Block, Settings
from xcomposer.article.composer import Composer, Note, finish
from xcomposer.article.files import FORMATS, export, file_name, render
from xcomposer.article.pictures import Pictures
from xcomposer.article.prompts import EDITS

__all__ = [
    "EDITS", "FORMATS", "Article", "Block", "Composer", "Note", "Pictures", "Settings", "export", "file_name", "finish",
    "render",
]  # fmt: skip

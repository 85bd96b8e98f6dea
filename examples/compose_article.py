"""An article with pictures, from a sentence to a file: `python examples/compose_article.py [FOLDER]`."""

import sys

from transformers import AutoModel, AutoTokenizer

import xcomposer  # noqa: F401  after it, a released folder loads as it is
from xcomposer.article import Composer, export, finish

folder = sys.argv[1] if len(sys.argv) > 1 else "demo"
model = AutoModel.from_pretrained(folder, dtype="auto").eval()
composer = Composer(model, AutoTokenizer.from_pretrained(folder))

article = finish(composer.write("Write a story about Miro, who saw a red circle and a blue star.", seed=8192))
article = finish(composer.illustrate(article, candidates="demo/pictures/candidates"), tell=print)
first = article.paragraphs[-1].block
article = finish(composer.edit(article, first, "expand", "a green ring"), tell=print)
print(article.title, *(block.text or f"[{block.caption}]" for block in article.blocks), sep="\n")
print(export(article, composer.pictures, "article.html"))  # or .zip (Markdown), .docx, .pdf, .json

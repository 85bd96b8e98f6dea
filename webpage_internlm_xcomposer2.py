"""Webpages around the model: what it is asked, and what becomes of the HTML it writes. Pure but for `write_page`."""

import os
import re
from pathlib import Path

from transformers.utils import logging

logger = logging.get_logger(__name__)

PUBLIC_FILE = "auto"  # `output_path` of the webpage methods: the task's own file name, in the working directory

# The model was trained on these words.
RESUME_QUERY = " Generate a personal page using the content in the resume:"
SCRIPT_QUERY = " Generate JavaScript events for the html code:"
SCREENSHOT_QUERY = " Generate the HTML code of this web image with Tailwind CSS."

_SCRIPT = re.compile(r"<script\b[^>]*>.*?</script\s*>", re.DOTALL | re.IGNORECASE)
_PAGE_END = re.compile(r"</body\s*>|</html\s*>", re.IGNORECASE)
_UNSPLASH = re.compile(r"""https://source\.unsplash\.com/random/(\d+)x(\d+)/\?[^'"]+""")


def page_path(task: str, output_path: str | os.PathLike | None) -> Path | None:
    """Where a webpage goes: None for nowhere.

    Raises:
        ValueError: a task that is no plain file name.
        FileNotFoundError: the folder does not exist.
    """
    if output_path is None:
        return None
    if output_path == PUBLIC_FILE:
        name = task.replace(" ", "_") + ".html"
        if not task.strip() or Path(name).name != name or "\\" in name or "\0" in name:
            raise ValueError(f"task {task!r} does not make a file name; use plain words, or say output_path=")
        output_path = name
    path = Path(output_path)
    if path.is_dir():
        raise ValueError(f"output_path {str(path)!r} is a folder; name a file in it")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"output_path {str(path)!r}: the folder {str(path.absolute().parent)!r} does not exist")
    return path


def read_resume(source: str | os.PathLike) -> str:
    """The text of a resume in Markdown.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is empty or no UTF-8 text.
    """
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"resume {str(source)!r} is no file; pass the path of a Markdown file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"resume {str(source)!r} is no UTF-8 text ({error}); save it as Markdown in UTF-8") from error
    if not text.strip():
        raise ValueError(f"resume {str(source)!r} is empty")
    return text


def write_page(html: str, path: Path | None) -> str:
    """Write the page whole or not at all, in UTF-8; returns it."""
    if path is not None:
        draft = path.with_name(path.name + ".part")
        draft.write_text(html, encoding="utf-8")
        draft.replace(path)
    return html


def real_pictures(html: str) -> str:
    """The picture service that the model learned to name is gone; its successor takes the same sizes."""
    return _UNSPLASH.sub(r"https://picsum.photos/\1/\2", html)


def add_scripts(html: str, answer: str) -> str:
    """Put the `<script>` elements of a second answer at the end of the page's body."""
    scripts = "\n".join(_SCRIPT.findall(answer))
    if not scripts:
        logger.warning("The second pass wrote no whole <script>: the page stays as the first pass wrote it.")
        return html
    ends = list(_PAGE_END.finditer(html))
    # Before the first of the closing tags that end the page: `</body></html>` or `</html>` alone.
    at = ends[0].start() if ends else len(html)
    return f"{html[:at]}\n{scripts}\n{html[at:]}"

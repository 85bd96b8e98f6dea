"""Webpages around the model: what it is asked, and what becomes of the HTML it writes.

A page is written to a draft beside its place, which then takes its name: nobody sees half a page.
"""

import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging

from .prompting_internlm_xcomposer2 import IMAGE_MARK

logger = logging.get_logger(__name__)

PUBLIC_FILE = "auto"  # `output_path` of the webpage methods: the task's own file name, in the working directory

# The model was trained on these words.
RESUME_QUERY = " Generate a personal page using the content in the resume:"
SCRIPT_QUERY = " Generate JavaScript events for the html code:"
SCREENSHOT_QUERY = " Generate the HTML code of this web image with Tailwind CSS."

_SCRIPT = re.compile(r"<script\b[^>]*>.*?</script\s*>", re.DOTALL | re.IGNORECASE)
_PAGE_END = re.compile(r"</body\s*>|</html\s*>", re.IGNORECASE)
_QUOTE_ENTITY = r"&(?:quot|apos|\#0*3[49]|\#[xX]0*2[27]);"  # a quote as an attribute's value spells it
_UNSPLASH = re.compile(
    rf"""(?P<quote>["'`]|{_QUOTE_ENTITY})?https://source\.unsplash\.com/random/(\d+)x(\d+)/\?
    (?(quote)(?:(?!(?P=quote))[^<>\n])*(?=(?P=quote))               # in quotes: up to the same one
    |(?:(?!{_QUOTE_ENTITY}|&[lg]t;)(?:&\w+;|[^\s"'`<>(){{}};\\]))*)  # bare, as in url(...): up to what ends it there
    """,
    re.VERBOSE,
)
_RESUME_BYTES = 64 << 20  # far beyond what any context holds


def _show(text: str) -> str:
    """For messages, which must not repeat a whole page."""
    return repr(text if len(text) <= 200 else f"{text[:180]}... ({len(text)} characters)")


class PageNotWrittenError(OSError):
    """A page was generated but could not be written; `html` is the page."""

    def __init__(self, message: str, html: str):
        super().__init__(message)
        self.html = html


def page_path(task: str, output_path: str | os.PathLike | None) -> Path | None:
    """Where a webpage goes: None for nowhere. A symbolic link is followed. Tries whether the place can be written to.

    Raises:
        TypeError: a task or an output_path of another type.
        ValueError: a task that is no plain file name; a folder, a device or a pipe where the page should go.
        OSError: the folder does not exist (FileNotFoundError), or nothing can be written there.
    """
    if not isinstance(task, str):
        raise TypeError(f"task is a {type(task).__name__}, but must be text")
    if output_path is None:
        return None
    if not isinstance(output_path, str | os.PathLike):
        raise TypeError(f"output_path is a {type(output_path).__name__}, but must be a path, or None to write no file")
    given = f"output_path {_show(os.fsdecode(output_path))}"
    if output_path == PUBLIC_FILE:
        output_path = _task_file(task)
        given = f"the page of task {_show(task)}"
    try:
        path = Path(os.path.realpath(output_path))
        try:
            mode = path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            mode = None
        if mode and stat.S_ISDIR(mode):
            raise IsADirectoryError("it is a folder; name a file in it")
        if mode and not stat.S_ISREG(mode):
            raise OSError("it is a device or a pipe; name a file, or None to write none")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"the folder {_show(str(path.parent))} does not exist")
        if mode and not os.access(path, os.W_OK):
            raise PermissionError("the file there is read-only")
        with _draft(path):
            pass
    except (OSError, ValueError) as error:  # ValueError: characters that no file name holds
        kind = type(error) if isinstance(error, FileNotFoundError | PermissionError) else ValueError
        raise kind(f"{given} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    return path


def _task_file(task: str) -> str:
    """The public file name of a task."""
    name = task.replace(" ", "_") + ".html"
    if not task.strip() or not name.isprintable() or Path(name).name != name or "\\" in name:
        raise ValueError(f"task {_show(task)} does not make a file name; use plain words, or say output_path=")
    return name


@contextmanager
def _draft(path: Path) -> Iterator[Path]:
    """A new file beside `path`, to be moved there; gone afterwards whatever happens, Ctrl-C included."""
    draft = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        draft.touch(exist_ok=False)
        yield draft
    finally:
        draft.unlink(missing_ok=True)


def read_resume(source: str | os.PathLike) -> str:
    """The text of a resume in Markdown, without a byte order mark.

    Raises:
        TypeError: a source of another type.
        FileNotFoundError: no such file.
        ValueError: it is empty, over 64 MiB, or no UTF-8 text.
    """
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"the resume is a {type(source).__name__}; pass the path of a Markdown file")
    name = f"resume {_show(os.fsdecode(source))}"
    if not os.path.isfile(source):
        is_text = isinstance(source, str) and "\n" in source
        raise FileNotFoundError(
            f"{name} is no file; pass the path of a Markdown file" + ", not the text: save it in one first" * is_text
        )
    path = Path(source)
    if path.stat().st_size > _RESUME_BYTES:
        raise ValueError(f"{name} has {path.stat().st_size} bytes, over {_RESUME_BYTES}; pass a resume of some pages")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is no UTF-8 text ({error}); save it as Markdown in UTF-8") from error
    if not text.strip():
        raise ValueError(f"{name} is empty")
    return text


def script_query(html: str, num_images: int) -> str:
    """What the second pass over a page is asked. Marks that the page holds are no picture's place; new ones lead."""
    marks = IMAGE_MARK * num_images if num_images > 1 else ""
    return f"{marks}{SCRIPT_QUERY}{html.replace(IMAGE_MARK, '')}"


def write_page(html: str, path: Path | None) -> str:
    """Write the page whole or not at all, in UTF-8, with the mode of the file it replaces; returns it.

    Raises:
        PageNotWrittenError: it could not be written after all; the error holds the page.
    """
    if path is None:
        return html
    try:
        with _draft(path) as draft:
            draft.write_text(html, encoding="utf-8", errors="xmlcharrefreplace")
            if path.exists():
                shutil.copymode(path, draft)
            draft.replace(path)
    except OSError as error:
        raise PageNotWrittenError(
            f"{_show(str(path))} could not be written ({error.strerror}); the page is this error's `html`", html
        ) from error
    return html


def real_pictures(html: str) -> str:
    """The picture service that the model learned to name is gone; its successor takes the same sizes."""
    return _UNSPLASH.sub(r"\g<quote>https://picsum.photos/\2/\3", html)


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

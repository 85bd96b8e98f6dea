"""An article as a file: Markdown with its pictures in a zip, one-file HTML, DOCX, PDF, JSON.

`render` gives the bytes, `export` writes them whole or not at all. Text stays text: what looks like markup in a
paragraph is shown as it was typed.
"""

import io
import os
import re
import tempfile
import unicodedata
import zipfile
from base64 import b64encode
from collections.abc import Callable
from html import escape
from pathlib import Path

from PIL import ImageFile

from xcomposer.article.article import Article, Block
from xcomposer.article.pictures import Pictures

# Families that Debian and the large systems have, Chinese and emoji among them.
FONTS = (
    '"Noto Serif", "DejaVu Serif", Georgia, "Noto Serif CJK SC", "Noto Sans CJK SC", "Songti SC", SimSun, '
    '"WenQuanYi Zen Hei", "Noto Color Emoji", "Apple Color Emoji", "Segoe UI Emoji", serif'
)
STYLE = f"""
:root {{ color-scheme: light dark; }}
body {{ max-width: 42rem; margin: 3rem auto; padding: 0 1.25rem; font: 1.0625rem/1.65 {FONTS}; }}
h1 {{ font-size: 2rem; line-height: 1.25; margin: 0 0 1.5rem; }}
p {{ margin: 0 0 1.1rem; white-space: pre-line; overflow-wrap: break-word; }}
figure {{ margin: 2rem 0; text-align: center; break-inside: avoid; }}
img {{ max-width: 100%; max-height: 36rem; height: auto; }}
figcaption {{ margin-top: .6rem; font-size: .9rem; opacity: .75; }}
@page {{ size: A4; margin: 22mm 20mm; }}
@media print {{ body {{ max-width: none; margin: 0; padding: 0; font-size: 11pt; }} h1 {{ break-after: avoid; }} }}
"""
MIME = {".png": "image/png", ".jpg": "image/jpeg", ".gif": "image/gif", ".webp": "image/webp"}
NAME_BYTES = 180  # of a file's name: file systems take 255, and a suffix follows
RESERVED = {"con", "prn", "aux", "nul", *(f"{name}{k}" for name in ("com", "lpt") for k in range(1, 10))}


def file_name(article: Article, suffix: str) -> str:
    """A name for the article's file, after its title: any script, nothing that a file system forbids."""
    text = unicodedata.normalize("NFC", article.title)
    text = re.sub(r'[\x00-\x1f\x7f<>:"/\\|?*]', " ", text)
    text = " ".join(text.split()).strip(" .")
    while len(text.encode()) > NAME_BYTES:
        text = text[:-1].rstrip(" .\u200d\ufe0f")
    if not text or text.split(".")[0].lower() in RESERVED:
        text = f"article {text}".strip()
    return text + suffix


def check_pictures(article: Article, pictures: Pictures) -> None:
    """Raises: ValueError: a picture that stands in the article is not in the store."""
    missing = [b.picture for b in article.places if b.picture and b.picture not in pictures]
    if missing:
        raise ValueError(f"the picture {missing[0]!r} is not in this session: upload it again, or remove it")


def to_markdown(article: Article, where: Callable[[str], str]) -> str:
    """Markdown. where: a picture's id -> its address in the text."""
    lines = [f"# {_plain(article.title)}"] if article.title else []
    for block in article.blocks:
        if block.kind == "text":
            lines.append("  \n".join(_plain(line) for line in block.text.splitlines()))
        elif block.picture:
            caption = _plain(block.caption)
            lines.append(f"![{caption}](<{where(block.picture)}>)" + (f"\n\n*{caption}*" if caption else ""))
        elif block.caption:
            lines.append(f"*({_plain(block.caption)})*")
    return "\n\n".join(line for line in lines if line) + "\n"


def _plain(text: str) -> str:
    """Text in Markdown that reads as it is written."""
    text = re.sub(r"([\\`*_\[\]<>])", r"\\\1", " ".join(text.split()))
    return re.sub(r"^(#{1,6}\s|[-+]\s|=+$|-+$|~{3}|(\d+)(?=[.)]\s))", _escaped_start, text)


def _escaped_start(found: re.Match) -> str:
    return f"{found[2]}\\" if found[2] else f"\\{found[0]}"


def to_html(article: Article, pictures: Pictures) -> str:
    """One page with its pictures inside, for screens and for print. Raises: as `check_pictures`."""
    check_pictures(article, pictures)
    body = [f"<h1>{escape(article.title)}</h1>"] if article.title else []
    for block in article.blocks:
        body.append(f"<p>{escape(block.text)}</p>" if block.kind == "text" else _figure(block, pictures))
    title = escape(article.title or "Article")
    return (
        f'<!DOCTYPE html>\n<html>\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n" + "\n".join(part for part in body if part) + "\n</body>\n</html>\n"
    )


def _figure(block: Block, pictures: Pictures) -> str:
    caption = f"<figcaption>{escape(block.caption)}</figcaption>" if block.caption else ""
    if not block.picture:
        return f"<figure>{caption}</figure>" if caption else ""
    encoded = b64encode(pictures[block.picture]).decode()
    source = f"data:{MIME[pictures.suffix(block.picture)]};base64,{encoded}"
    return f'<figure><img src="{source}" alt="{escape(block.caption)}">{caption}</figure>'


def _zip(article: Article, pictures: Pictures) -> bytes:
    """`<title>.md` and a folder `pictures` beside it."""
    check_pictures(article, pictures)
    made = io.BytesIO()
    standing = dict.fromkeys(block.picture for block in article.places if block.picture)
    names = {name: f"pictures/{k}{pictures.suffix(name)}" for k, name in enumerate(standing, start=1)}
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(file_name(article, ".md"), to_markdown(article, names.__getitem__))
        for name, path in names.items():
            archive.writestr(path, pictures[name])
    return made.getvalue()


def _docx(article: Article, pictures: Pictures) -> bytes:
    """A Word document. Raises: ImportError: no python-docx."""
    check_pictures(article, pictures)
    try:
        import docx
        from docx.enum.text import WD_ALIGN_PARAGRAPH
        from docx.shared import Cm
    except ImportError as error:
        raise ImportError(f"DOCX needs python-docx ({error}): pip install python-docx") from error
    document = docx.Document()
    document.core_properties.title = article.title[:255]
    if article.title:
        document.add_heading(_printable(article.title), level=0)
    section = document.sections[0]
    room = section.page_width - section.left_margin - section.right_margin
    for block in article.blocks:
        if block.kind == "text":
            document.add_paragraph(_printable(block.text))
            continue
        if block.picture:
            paragraph = document.add_paragraph()
            paragraph.alignment, paragraph.paragraph_format.keep_with_next = WD_ALIGN_PARAGRAPH.CENTER, True
            shape = paragraph.add_run().add_picture(io.BytesIO(_readable(block.picture, pictures)))
            scale = min(1.0, room / shape.width, Cm(16) / shape.height)
            shape.width, shape.height = int(shape.width * scale), int(shape.height * scale)
        if block.caption:
            caption = document.add_paragraph(_printable(block.caption), style="Caption")
            caption.alignment = WD_ALIGN_PARAGRAPH.CENTER
    made = io.BytesIO()
    document.save(made)
    return made.getvalue()


def _printable(text: str) -> str:
    """XML has no place for control characters."""
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]", "", text)


def _readable(name: str, pictures: Pictures) -> bytes:
    """A picture as Word can show it: WebP becomes PNG."""
    if pictures.suffix(name) != ".webp":
        return pictures[name]
    made = io.BytesIO()
    pictures.opened(name).save(made, "PNG")
    return made.getvalue()


def _pdf(article: Article, pictures: Pictures) -> bytes:
    """The HTML, printed; it reaches nothing but itself. Raises: ImportError: no WeasyPrint, or no Pango for it."""
    cut_pictures = ImageFile.LOAD_TRUNCATED_IMAGES  # WeasyPrint lets Pillow read cut files from its import on
    try:
        from weasyprint import HTML
        from weasyprint.urls import URLFetcher
    except (ImportError, OSError) as error:
        raise ImportError(
            f"PDF needs WeasyPrint 68 or later and the Pango library ({error}): pip install weasyprint; apt install "
            f"libpango-1.0-0 libpangoft2-1.0-0"
        ) from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = cut_pictures
    inside = URLFetcher(allowed_protocols={"data"}, fail_on_errors=True)
    return HTML(string=to_html(article, pictures), url_fetcher=inside).write_pdf()


# Suffix -> the file's bytes.
FORMATS: dict[str, Callable[[Article, Pictures], bytes]] = {
    ".zip": _zip,
    ".html": lambda article, pictures: to_html(article, pictures).encode(),
    ".docx": _docx,
    ".pdf": _pdf,
    ".json": lambda article, pictures: article.to_json().encode(),
}


def render(article: Article, pictures: Pictures, suffix: str) -> bytes:
    """The article as a file of this suffix (a key of `FORMATS`).

    Raises:
        ValueError: an unknown suffix, or a picture that is not in the store.
        ImportError: the format's library is not installed; says which.
    """
    if suffix not in FORMATS:
        raise ValueError(f"unknown format {suffix!r}; use one of {', '.join(FORMATS)}")
    return FORMATS[suffix](article, pictures)


def export(article: Article, pictures: Pictures, path: str | os.PathLike) -> Path:
    """Write the article to `path`, in the format of its suffix; a folder takes `file_name`'s zip.

    `.md` writes the Markdown and, beside it, the folder `<name>_pictures`.

    Raises:
        As `render`. FileNotFoundError: the folder does not exist.
    """
    path = Path(path)
    if path.is_dir():
        path = path / file_name(article, ".zip")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{str(path)!r}: the folder {str(path.absolute().parent)!r} does not exist")
    if path.suffix != ".md":
        write_whole(path, render(article, pictures, path.suffix))
        return path
    check_pictures(article, pictures)
    folder = path.with_name(f"{path.stem}_pictures")
    for name in dict.fromkeys(block.picture for block in article.places if block.picture):
        folder.mkdir(exist_ok=True)
        write_whole(folder / f"{name}{pictures.suffix(name)}", pictures[name])
    write_whole(path, to_markdown(article, lambda name: f"{folder.name}/{name}{pictures.suffix(name)}").encode())
    return path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: an earlier one stays until the new one is there."""
    handle, draft = tempfile.mkstemp(dir=path.absolute().parent, prefix=".part-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise

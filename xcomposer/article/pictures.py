"""The pictures of one session by id, and where candidates come from: a list, a folder, or a search function."""

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
KEPT = {"PNG": ".png", "JPEG": ".jpg", "GIF": ".gif", "WEBP": ".webp"}  # file formats that pass as they are
MOST_CANDIDATES = 1000  # of one folder: more is a mistake, or wants a search function

Source = str | Path | bytes | Image.Image
Search = Callable[[str], Iterable[Source]]  # caption -> pictures, best first


class Pictures(Mapping[str, bytes]):
    """Encoded pictures by id; the id is made of the content, so the same picture is kept once."""

    def __init__(self):
        self._encoded: dict[str, tuple[bytes, str]] = {}
        self._opened: dict[str, Image.Image] = {}

    def add(self, source: Source) -> str:
        """Keep a picture (a path, its bytes, or a PIL image); returns its id.

        Raises:
            FileNotFoundError: no such file. ValueError: not a picture.
        """
        if isinstance(source, Image.Image):
            made = io.BytesIO()
            source.convert("RGB" if source.mode not in ("RGB", "RGBA", "L", "P") else source.mode).save(made, "PNG")
            encoded, name = made.getvalue(), "the image"
        elif isinstance(source, bytes):
            encoded, name = source, "the upload"
        else:
            path = Path(source)
            if not path.is_file():
                raise FileNotFoundError(f"picture {str(source)!r} is no file")
            encoded, name = path.read_bytes(), path.name
        key = hashlib.sha256(encoded).hexdigest()[:16]
        if key not in self._encoded:
            self._encoded[key] = _checked(encoded, name)
        return key

    def __getitem__(self, key: str) -> bytes:
        if key not in self._encoded:
            raise KeyError(f"no picture {key!r} in this session; add it again")
        return self._encoded[key][0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._encoded)

    def __len__(self) -> int:
        return len(self._encoded)

    def suffix(self, key: str) -> str:
        """Of the file that this picture makes. Raises: KeyError."""
        self[key]
        return self._encoded[key][1]

    def opened(self, key: str) -> Image.Image:
        """The same PIL image each time. Raises: KeyError."""
        if key not in self._opened:
            image = Image.open(io.BytesIO(self[key]))
            image.load()
            self._opened[key] = image
        return self._opened[key]


def _checked(encoded: bytes, name: str) -> tuple[bytes, str]:
    """A picture's bytes and its suffix; formats that other programs may not show become PNG."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image.load()
            if image.format in KEPT:
                return encoded, KEPT[image.format]
            made = io.BytesIO()
            image.convert("RGBA" if "A" in image.getbands() else "RGB").save(made, "PNG")
            return made.getvalue(), ".png"
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be read as a picture: {error}") from error


def in_folder(folder: str | Path) -> list[Path]:
    """The pictures of a folder, by name.

    Raises:
        FileNotFoundError: no such folder. ValueError: no pictures in it, or more than `MOST_CANDIDATES`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"candidates {str(folder)!r} is no folder")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise ValueError(f"folder {str(folder)!r} holds no pictures ({', '.join(SUFFIXES)})")
    if len(found) > MOST_CANDIDATES:
        raise ValueError(
            f"folder {str(folder)!r} holds {len(found)} pictures; {MOST_CANDIDATES} at most: pass a search function "
            f"that names a few for each caption"
        )
    return found


def search_of(candidates: Any, pictures: Pictures) -> Callable[[str], list[str]]:
    """Caption -> ids of the pictures that may stand there.

    Args:
        candidates: ids or sources in a list, a folder, or a function from a caption to sources.

    Raises:
        As `Pictures.add` and `in_folder`; a list and a folder are read here, before anything is asked.
    """

    def kept(sources: Iterable[Any]) -> list[str]:
        return list(dict.fromkeys(s if isinstance(s, str) and s in pictures else pictures.add(s) for s in sources))

    if callable(candidates):
        return lambda caption: kept(candidates(caption))
    if isinstance(candidates, str | Path):
        candidates = in_folder(candidates)
    ids = kept(candidates)
    return lambda caption: ids

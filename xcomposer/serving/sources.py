"""Pictures and videos that a client names: what may be read, and reading it within limits.

A client sends a picture along (`data:`). Addresses are fetched, and files of this machine read, only where whoever
started the server said so: a server stands where its clients may not go.
"""

import io
from collections.abc import Sequence
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from PIL import Image

from xcomposer.model.download_internlm_xcomposer2 import read_address
from xcomposer.model.settings_internlm_xcomposer2 import short
from xcomposer.serving.protocol import APIError, ChatRequest, ImageItem, TextItem, UserMessage

MIB = 2**20
SEND_ALONG = "send the file along as data:image/png;base64,..."

NAT64 = ip_network("64:ff9b::/96")  # carries an IPv4 address in its last bits


class MediaRules(NamedTuple):
    """What clients may name, and how much of it.

    Args:
        most: pictures and videos of a request.
        pixels: of all pictures of a request together; they are in memory at once.
        bytes: of one picture or video.
        timeout: seconds for one download.
        addresses: whether http(s) addresses are fetched.
        private_addresses: whether also from this machine and its own network.
        folder: files below it may be named as `file:///...`; None: none.
    """

    most: int = 16
    pixels: int = 200_000_000
    bytes: int = 64 * MIB
    timeout: float = 10.0
    addresses: bool = False
    private_addresses: bool = False
    folder: Path | None = None


class Source(NamedTuple):
    """A picture or video as a client names it, and the field that does."""

    url: str
    param: str

    @property
    def scheme(self) -> str:
        return self.url[:16].partition(":")[0].lower()

    @property
    def remote(self) -> bool:
        """Whether reading it may take a while."""
        return self.scheme in ("http", "https")


def sources_of(request: ChatRequest, rules: MediaRules) -> list[Source]:
    """Every picture and video of a request, in the order of their places.

    Raises:
        APIError: more than `rules` allow.
    """
    found = []
    for index, message in enumerate(request.messages):
        if isinstance(message, UserMessage):
            for number, item in enumerate(message.content):
                if not isinstance(item, TextItem):
                    kind = "image_url" if isinstance(item, ImageItem) else "video_url"
                    param = f"messages[{index}].content[{number}].{kind}.url"
                    found.append(Source(getattr(item, kind).url, param))
    if len(found) > rules.most:
        raise APIError(400, f"{len(found)} pictures and videos; a request may have {rules.most}", "messages")
    return found


def read_source(source: Source, rules: MediaRules) -> bytes | Path:
    """The file that a source names: its bytes, or its path here. Takes up to `rules.timeout` seconds.

    Raises:
        APIError: it may not be read, or cannot be.
    """
    url, param = source
    if source.scheme == "file":
        return _local_file(source, rules)
    if source.scheme != "data" and not source.remote:
        raise APIError(400, f"{param} is {short(url, 80)}; {SEND_ALONG}", param)
    if source.remote and not rules.addresses:
        raise APIError(400, f"{param} is {short(url, 80)}: this server fetches no addresses; {SEND_ALONG}", param)
    try:
        return read_address(url, rules.timeout, rules.bytes, None if rules.private_addresses else is_public)[1]
    except (ValueError, OSError) as error:
        raise APIError(400, f"{param}: {error}", param) from error


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet's: no loopback, private, link-local or other special one."""
    found = ip_address(address.partition("%")[0])
    inner = getattr(found, "ipv4_mapped", None) or getattr(found, "sixtofour", None)
    if found in NAT64:
        inner = ip_address(int(found) & 0xFFFFFFFF)
    return (inner or found).is_global and not found.is_multicast


def _local_file(source: Source, rules: MediaRules) -> Path:
    """A file below the allowed folder. Nobody learns which files there are elsewhere."""
    url, param = source
    if rules.folder is None:
        raise APIError(400, f"{param} is {short(url, 80)}: this server reads no files; {SEND_ALONG}", param)
    parts = urlsplit(url)
    try:
        path = Path(unquote(parts.path)).resolve()
        inside = parts.netloc in ("", "localhost") and path.is_relative_to(rules.folder.resolve()) and path.is_file()
    except (OSError, ValueError, RuntimeError):  # a name with a NUL, a loop of links
        inside = False
    if not inside:
        message = f"{param} is {short(url, 80)}, no file below the folder that this server reads from"
        raise APIError(400, message, param)
    if path.stat().st_size > rules.bytes:
        raise APIError(400, f"{param} is over {rules.bytes} bytes; make it smaller", param)
    return path


def require_pixels(files: Sequence[bytes | Path], sources: Sequence[Source], rules: MediaRules) -> None:
    """Raise an APIError for pictures with more pixels than may be in memory, by their headers alone."""
    pixels = 0
    for file, source in zip(files, sources, strict=True):
        try:
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as picture:
                pixels += picture.width * picture.height
        except Image.DecompressionBombError:
            pixels += rules.pixels + 1
        except Exception:  # no picture: whoever decodes it says what it is
            continue
        if pixels > rules.pixels:
            message = f"{source.param}: {pixels} pixels with the pictures before it; a request may have {rules.pixels}"
            raise APIError(400, message, source.param)

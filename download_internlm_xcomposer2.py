"""Bytes from an http(s) or data: address: one place that checks an address, and limits on time and size.

The time limit is for the whole download, redirects and headers included: each read waits for what is left of it, so
neither a server that drips nor one that redirects can hold a caller longer.
"""

from __future__ import annotations

import base64
import binascii
import functools
import http.client
import io
import re
import socket
import string
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, unquote_to_bytes, urljoin, urlsplit

URL_TIMEOUT = 30.0  # seconds for the whole download
ANSWER_TIMEOUT = 4.0  # of these, until the headers of the last redirect are there: a caller waits for nothing else
URL_MAX_BYTES = 512 * 2**20
MAX_REDIRECTS = 10

Allow = Callable[[str], bool]

_SCHEME = re.compile(r"(data):|([A-Za-z][\w+.-]*)://", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]{64,}={0,2}\s*")
_REDIRECTS = (301, 302, 303, 307, 308)


def shorten(text: str, most: int = 200) -> str:
    """Text for an error message, which must not repeat megabytes."""
    return text if len(text) <= most else f"{text[: most - 40]}...{text[-20:]} ({len(text)} characters)"


def scheme_of(source: str) -> str | None:
    """ "http", "https", "data", another scheme in lower case, or None where the text is no address."""
    found = _SCHEME.match(source)
    return (found[1] or found[2]).lower() if found else None


def is_base64(source: str) -> bool:
    """Whether text could be a file in base64 without a `data:` header, as some chat clients send it."""
    return _BASE64.fullmatch(source) is not None


def read_address(
    source: str, timeout: float = URL_TIMEOUT, max_bytes: int = URL_MAX_BYTES, allow: Allow | None = None
) -> tuple[str, bytes]:
    """(name for messages, contents) of an http(s) or data: address.

    allow says of each IP address, redirects' too, whether it may be connected to (never through a proxy then); None:
    all may.

    Raises ValueError for an address that is wrong or of another scheme, that does not answer within the limits, that
    answers with an error or nothing, or whose contents stop short of their Content-Length.
    """
    scheme = scheme_of(source)
    if scheme == "data":
        return read_data_address(source, max_bytes)
    if scheme not in ("http", "https"):
        raise ValueError(
            f"{shorten(source)!r} has scheme {shorten(str(scheme), 60)!r}; only http, https and data are read; "
            "pass files as a path"
        )
    return _download(source, timeout, max_bytes, allow)


# ----------------------------------------------------------------------------------------------------------- data:


def read_data_address(url: str, max_bytes: int = URL_MAX_BYTES) -> tuple[str, bytes]:
    """(name, contents) of a data: address (RFC 2397), in base64 or percent-encoded."""
    header, comma, payload = url.partition(",")
    short = shorten(url, 40) if len(url) <= 40 else url[:40] + "..."
    if len(payload) > max_bytes * 4 // 3 + 4 and len(payload) - sum(map(payload.count, " \n\r\t")) > max_bytes * 2:
        raise ValueError(f"{short} is over {max_bytes} bytes; pass a smaller file or a larger max_bytes")
    raw = unquote_to_bytes(payload)
    data = decode_base64(raw, short) if header.rstrip().lower().endswith(";base64") else raw
    if not comma or not data:
        raise ValueError(f"{short} holds no data; write data:image/png;base64,...")
    if len(data) > max_bytes:
        raise ValueError(f"{short} is over {max_bytes} bytes; pass a smaller file or a larger max_bytes")
    return short, data


def decode_base64(text: str | bytes, name: str) -> bytes:
    """Base64 with or without line breaks and padding, in either alphabet (RFC 4648)."""
    raw = text.encode("ascii", "replace") if isinstance(text, str) else text
    raw = b"".join(raw.split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
    try:
        return base64.b64decode(raw + b"=" * (-len(raw) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(f"{name} is not valid base64 ({error}); encode the file's bytes again") from error


# --------------------------------------------------------------------------------------------------------- http(s)


class _Clock:
    """What is left of a download's time, in seconds."""

    def __init__(self, timeout: float):
        self.end = time.monotonic() + timeout
        self.answer_by = time.monotonic() + min(timeout, ANSWER_TIMEOUT)

    def left(self) -> float:
        seconds = min(self.end, self.answer_by) - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        return seconds

    def answered(self) -> None:
        self.answer_by = self.end


class _TimedReader(io.RawIOBase):
    """Bytes of a socket; each read waits for what is left of the download's time."""

    def __init__(self, sock: Any, clock: _Clock):
        self.sock, self.clock = sock, clock
        self.file = sock.makefile("rb", buffering=0)  # keeps the socket open as long as this is

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self.sock.settimeout(self.clock.left())
        return self.file.readinto(buffer)

    def close(self) -> None:
        self.file.close()
        super().close()


class _TimedResponse(http.client.HTTPResponse):
    def __init__(self, sock: Any, *args: Any, clock: _Clock, **kwargs: Any):
        super().__init__(sock, *args, **kwargs)
        self.fp.close()
        self.fp = io.BufferedReader(_TimedReader(sock, clock))


def _connect(address: tuple[str, int], timeout: float, source: Any = None, *, allow: Allow) -> socket.socket:
    """A connection to an allowed address: the one that was checked, whatever the name means a moment later."""
    found = [row[4][0] for row in socket.getaddrinfo(*address, type=socket.SOCK_STREAM)]
    if not all(map(allow, found)):
        raise PermissionError(f"{address[0]} lies in a network that may not be reached from here")
    return socket.create_connection((found[0], address[1]), timeout, source)


def _timed(connection_class: type, clock: _Clock, allow: Allow | None) -> Callable[..., http.client.HTTPConnection]:
    """A connection class whose connecting and reading end with the download's time."""

    class Timed(connection_class):
        response_class = functools.partial(_TimedResponse, clock=clock)

        def connect(self) -> None:
            self.timeout = clock.left()
            if allow is not None:
                self._create_connection = functools.partial(_connect, allow=allow)
            super().connect()

    return Timed


class _HTTP(urllib.request.HTTPHandler):
    def __init__(self, clock: _Clock, allow: Allow | None):
        super().__init__()
        self.clock, self.allow = clock, allow

    def http_open(self, request: Any) -> Any:
        return self.do_open(_timed(http.client.HTTPConnection, self.clock, self.allow), request)


class _HTTPS(urllib.request.HTTPSHandler):
    def __init__(self, clock: _Clock, allow: Allow | None):
        super().__init__()
        self.clock, self.allow = clock, allow

    def https_open(self, request: Any) -> Any:
        return self.do_open(_timed(http.client.HTTPSConnection, self.clock, self.allow), request)


def _checked_url(url: str) -> str:
    """The address in ASCII, as a request wants it."""
    parts = urlsplit(url.strip())
    host, _ = parts.hostname, parts.port  # a port that is no number raises
    if not host or any(c.isspace() or not c.isprintable() for c in parts.netloc):
        raise ValueError("no host")
    ascii_host = host if host.isascii() else host.encode("idna").decode()
    return quote(parts._replace(netloc=parts.netloc.replace(host, ascii_host)).geturl(), safe=string.punctuation)


def _download(url: str, timeout: float, max_bytes: int, allow: Allow | None) -> tuple[str, bytes]:
    name, clock = shorten(url), _Clock(timeout)
    opener = urllib.request.OpenerDirector()  # neither files nor ftp, and no redirects but those followed here
    proxies = [urllib.request.ProxyHandler()] if allow is None else []  # what a proxy connects to, none sees here
    for handler in (*proxies, urllib.request.UnknownHandler(), _HTTP(clock, allow), _HTTPS(clock, allow)):
        opener.add_handler(handler)
    try:
        with _follow(opener, url, name, clock) as response:
            kind = shorten(response.headers.get("Content-Type") or "none", 80)
            data = _body(response, name, max_bytes, clock)
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        if isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError):
            limit = min(timeout, ANSWER_TIMEOUT) if clock.answer_by < clock.end else timeout
            raise ValueError(f"{name} timed out after {limit:g} s; try again or pass a larger timeout") from error
        reason = shorten(str(error) or type(error).__name__)
        raise ValueError(f"{name} could not be fetched ({reason}); check the address and the network") from error
    if not data:
        raise ValueError(f"{name} is empty (0 bytes, content type {kind}); check the address")
    return f"{name} (content type {kind})", data


def _follow(opener: urllib.request.OpenerDirector, url: str, name: str, clock: _Clock) -> Any:
    """The response at the end of the redirects. Bodies on the way are not read: they may be endless."""
    target = ""
    for _ in range(MAX_REDIRECTS + 1):
        try:
            url = _checked_url(urljoin(url, target))
        except ValueError as error:
            raise ValueError(f"{name} is no address ({shorten(str(error))}); check host and port") from error
        request = urllib.request.Request(url, headers={"User-Agent": "ixc_utils/2.5"})
        response = opener.open(request, timeout=clock.left())
        if 200 <= response.status < 300:
            clock.answered()
            return response
        status, target = f"{response.status} {shorten(response.reason or '', 80)}", response.headers.get("Location")
        response.close()
        if response.status not in _REDIRECTS or not target:
            raise ValueError(f"{name} answered {status}; check the address")
        if (scheme := scheme_of(target) or "http") not in ("http", "https"):
            raise ValueError(
                f"{name} could not be fetched: it answered {status}, and going to {shorten(target)!r} is not allowed "
                f"(unknown url type: {shorten(str(scheme), 60)})"
            )
    raise ValueError(f"{name} redirects more than {MAX_REDIRECTS} times; check the address")


def _body(response: Any, name: str, max_bytes: int, clock: _Clock) -> bytes:
    too_large = f"{name} is over {max_bytes} bytes; pass a smaller file or a larger max_bytes"
    promised, data = response.length, bytearray()
    if (promised or 0) > max_bytes:
        raise ValueError(too_large)
    while chunk := response.read1(1 << 16):  # returns what has come, so that a slow sender meets the deadline
        data += chunk
        if len(data) > max_bytes:
            raise ValueError(too_large)
        clock.left()
    if promised is not None and len(data) < promised:
        raise ValueError(f"{name} was cut off after {len(data)} of {promised} bytes; try again")
    return bytes(data)

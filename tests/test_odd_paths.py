# ruff: noqa: E501 - tables
"""Odd output paths, tasks and resumes: each works, or is refused in words that name it. Addresses in a page."""

import os
import stat

import pytest
from odd_cases import assert_held

from xcomposer.model import webpage_internlm_xcomposer2 as web

ODD_TEXTS = (
    "",
    " ",
    "a",
    "图片",
    "a b",
    "a\nb",
    "a\0b",
    "\ud800",
    "x" * 300,
    "x" * 10**6,
    "../x",
    "..",
    ".",
    "/",
    "a/b",
    "~",
    "con",
    "*?",
    "a\\b",
    "é" * 200,
)
ODD_VALUES = (None, 0, 1, 2.5, True, b"x", [], ["a"], {}, object())


def places(folder):
    (folder / "file.html").write_text("old")
    (folder / "link.html").symlink_to(folder / "file.html")
    (folder / "dangling.html").symlink_to(folder / "new.html")
    (folder / "loop.html").symlink_to(folder / "loop.html")
    (folder / "folder.html").mkdir()
    os.mkfifo(folder / "pipe.html")
    for name in ("file", "link", "dangling", "loop", "folder", "pipe", "fresh"):
        yield folder / f"{name}.html"
    yield from (
        "/dev/null",
        "/dev/full",
        "/proc/x.html",
        folder / "file.html" / "x.html",
        folder / "no" / "x.html",
        web.PUBLIC_FILE,
    )
    yield from (str(folder / text) for text in ODD_TEXTS if text.strip("/") == text)
    yield from ODD_TEXTS
    yield from ODD_VALUES


def test_odd_output_paths(tmp_path, monkeypatch):
    inner = tmp_path / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)

    def write(place):
        web.write_page("<p>page</p>", web.page_path("My Page", place))

    cases = [
        (f"{number} {place!r:.60}", lambda place=place: write(place), ("output_path",))
        for number, place in enumerate(places(inner))
    ]
    cases += [
        (f"task {task!r:.60}", lambda task=task: web.page_path(task, web.PUBLIC_FILE), ("task",))
        for task in (*ODD_TEXTS, *ODD_VALUES)
    ]
    assert len(cases) > 80
    assert_held(cases)
    assert not list(tmp_path.rglob("*.part")) and stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert stat.S_ISFIFO((inner / "pipe.html").stat().st_mode)


def test_a_link_is_followed_and_mode_bits_stay(tmp_path):
    real, link = tmp_path / "real.html", tmp_path / "link.html"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    web.write_page("new", web.page_path("x", link))
    assert link.is_symlink() and real.read_text() == "new" and stat.S_IMODE(real.stat().st_mode) == 0o640


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_page_that_cannot_be_written_is_not_lost(tmp_path, monkeypatch, stop):
    path = web.page_path("x", tmp_path / "page.html")

    def fail(self, *args, **kwargs):
        raise stop

    monkeypatch.setattr(web.Path, "write_text", fail)
    with pytest.raises(KeyboardInterrupt if stop is KeyboardInterrupt else web.PageNotWrittenError) as caught:
        web.write_page("<p>the page</p>", path)
    assert stop is KeyboardInterrupt or (
        caught.value.html == "<p>the page</p>" and "No space left" in str(caught.value)
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("html, wanted", [
    ("a{background:url(https://source.unsplash.com/random/1600x900/?b)}</style><h1>T</h1>", "a{background:url(https://picsum.photos/1600/900)}</style><h1>T</h1>"),
    ('<img src="https://source.unsplash.com/random/30x20/?modern office">', '<img src="https://picsum.photos/30/20">'),
    ("<img src='https://source.unsplash.com/random/30x20/?a\"b'>", "<img src='https://picsum.photos/30/20'>"),
    ("<img src=https://source.unsplash.com/random/3x2/?cat><p>'x'</p>", "<img src=https://picsum.photos/3/2><p>'x'</p>"),
    ('<img src="https://source.unsplash.com/random/3x2/?cat><p>never closed', '<img src="https://picsum.photos/3/2><p>never closed'),
    ("url(&quot;https://source.unsplash.com/random/3x2/?a&amp;b&quot;);x", "url(&quot;https://picsum.photos/3/2&quot;);x"),
    ("url(&quot;https://source.unsplash.com/random/3x2/?a b;c&quot;);x", "url(&quot;https://picsum.photos/3/2&quot;);x"),
    ("url(&#39;https://source.unsplash.com/random/3x2/?a&amp;b&#39;);x", "url(&#39;https://picsum.photos/3/2&#39;);x"),
    ("<img src=https://source.unsplash.com/random/3x2/?a&amp;b><p>", "<img src=https://picsum.photos/3/2><p>"),
    ("&lt;img src=https://source.unsplash.com/random/3x2/?a&gt;x", "&lt;img src=https://picsum.photos/3/2&gt;x"),
    ("x='https://source.unsplash.com/random/3x2/?a; y=1", "x='https://picsum.photos/3/2; y=1"),
    ("https://source.unsplash.com/random/ax2/?cat", "https://source.unsplash.com/random/ax2/?cat"),
])  # fmt: skip
def test_addresses_of_pictures_end_where_they_end(html, wanted):
    assert web.real_pictures(html) == wanted


def test_resumes(tmp_path):
    path = tmp_path / "resume.md"
    path.write_bytes("\ufeff# 张三\n".encode())
    assert web.read_resume(path) == "# 张三\n"
    cases = [
        (f"{value!r:.40}", lambda value=value: web.read_resume(value), ("resume",))
        for value in (*ODD_TEXTS, *ODD_VALUES, "# Me\n\nlines " * 9000, tmp_path, "/dev/zero")
    ]
    assert_held(cases)
    with pytest.raises(FileNotFoundError, match="save it in one first"):
        web.read_resume("# Me\n\n- a text, no path")
    assert web.script_query("<p><ImageHere></p>", 1) == f"{web.SCRIPT_QUERY}<p></p>"
    assert web.script_query("<p></p>", 2).count("<ImageHere>") == 2

"""One visitor's work and files, kept while the visitor's page is open and for a while after. Knows no gradio."""

import re
import secrets
import shutil
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path

from xcomposer.article import Pictures
from xcomposer.studio.conversation import Conversation
from xcomposer.studio.draft import Draft
from xcomposer.studio.line import Work
from xcomposer.studio.media import Media, data_address, read_media
from xcomposer.studio.pages import Pages

KEEP_S = 3600  # after the last sign of a visitor
TOKEN = re.compile(r"[\w-]{32}")
THUMBNAIL = 720


@dataclass
class Workspace:
    """What one visitor has.

    running: of each tab, the model's work under way.
    """

    token: str
    folder: Path
    conversations: list[Conversation] = field(default_factory=lambda: [Conversation()])
    at: int = 0
    pages: Pages = field(default_factory=Pages)
    draft: Draft = field(default_factory=Draft)
    pictures: Pictures = field(default_factory=Pictures)
    gallery: list[str] = field(default_factory=list)  # ids of candidates that the visitor dropped
    material: list[str] = field(default_factory=list)
    running: dict[str, Work] = field(default_factory=dict)
    holders: int = 0
    _read: dict[str, Media] = field(default_factory=dict)
    _shown: dict[tuple[str, int], str] = field(default_factory=dict)

    @property
    def conversation(self) -> Conversation:
        return self.conversations[self.at]

    def media(self, path: str) -> Media:
        """An upload, read once. Raises: as `read_media`."""
        if path not in self._read:
            self._read[path] = read_media(Path(path), self.folder)
        return self._read[path]

    def shown(self, picture: str, longest: int = THUMBNAIL) -> str:
        """A picture of the article's store as a data: address; "" for one that is not there."""
        if picture not in self.pictures:
            return ""
        if (picture, longest) not in self._shown:
            self._shown[picture, longest] = data_address(self.pictures.opened(picture), longest)
        return self._shown[picture, longest]

    def begin(self, tab: str, work: Work) -> None:
        """New work of the model in a tab; what ran there before is left."""
        self.end(tab)
        self.running[tab] = work

    def take(self, tab: str) -> Work | None:
        """The tab's work, for the one who does it; None if there is none, or another does it."""
        work = self.running.get(tab)
        if work is None or work.taken:
            return None
        work.taken = True
        return work

    def end(self, tab: str, work: Work | None = None, note: str = "") -> bool:
        """The work is over (`work`), or whatever runs in the tab is left (None), with a note; whether it went on."""
        found = self.running.get(tab)
        if found is None or work not in (None, found):
            return False
        del self.running[tab]
        found.left, found.note = work is None, note
        found.keep()
        return True

    def leave(self) -> None:
        """Leave all work: the page that it was for is gone."""
        for tab in list(self.running):
            self.end(tab)


class Workspaces:
    """Everybody's, by a secret token that the visitor's page keeps."""

    def __init__(self):
        self.root = Path(tempfile.mkdtemp(prefix="xcomposer-studio-"))
        self._lock = threading.Lock()
        self._open: dict[str, Workspace] = {}

    def open(self, token: str = "") -> Workspace:
        """The workspace of this token, for a page that was loaded again; a new one for any other."""
        with self._lock:
            found = self._open.get(token) if isinstance(token, str) and TOKEN.fullmatch(token) else None
            if found is None:
                token = secrets.token_urlsafe(24)
                folder = self.root / secrets.token_hex(8)
                folder.mkdir(mode=0o700)
                found = self._open[token] = Workspace(token, folder)
            found.holders += 1
            return found

    def __getitem__(self, token: str) -> Workspace:
        """Raises: ValueError: the visitor was away too long."""
        found = self._open.get(token)
        if found is None:
            raise ValueError("this page was left too long: reload it")
        return found

    def __len__(self) -> int:
        return len(self._open)

    def close(self, token: str) -> None:
        """One page of this token is gone for good; with the last one go its files."""
        with self._lock:
            found = self._open.get(token)
            if found is None:
                return
            found.holders -= 1
            if found.holders > 0:
                return
            del self._open[token]
        found.leave()
        shutil.rmtree(found.folder, ignore_errors=True)

    def close_all(self) -> None:
        self._open.clear()
        shutil.rmtree(self.root, ignore_errors=True)

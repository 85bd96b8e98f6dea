"""Versions of a page as values: what was asked, what came, edits by hand. Knows no model."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Version:
    """One state of the page. query: what the model was asked for it; "" for an edit by hand."""

    code: str
    query: str = ""
    label: str = ""


@dataclass
class Pages:
    """A page's versions, oldest first; `at` is the one that is shown. coming: the code of one that is being written."""

    versions: list[Version] = field(default_factory=list)
    at: int = -1
    hosts: tuple[str, ...] = ()  # that the visitor lets the preview load from
    coming: str = ""
    _asked: tuple[str, str] = ("", "")

    @property
    def now(self) -> Version | None:
        return self.versions[self.at] if self.versions else None

    def add(self, version: Version) -> None:
        """A new version, shown; an empty page or the same again is none."""
        if version.code.strip() and (self.now is None or version.code != self.now.code):
            self.versions.append(version)
            self.at = len(self.versions) - 1

    def begin(self, query: str, label: str) -> None:
        """A new version is asked for."""
        self.coming, self._asked = "", (query, label)

    def keep(self) -> None:
        """What came of it is a version, whole or not."""
        self.add(Version(self.coming, *self._asked))

    def edited(self, code: str) -> None:
        """The page as it was edited by hand: one version a sitting, whatever the number of keys."""
        if self.now and not self.now.query and self.at == len(self.versions) - 1 and code.strip():
            self.versions[self.at] = Version(code)
        else:
            self.add(Version(code))

    def history(self) -> list[tuple[str, str]]:
        """The shown page as the turn that a change follows."""
        if self.now is None:
            return []
        asked = next((version.query for version in reversed(self.versions[: self.at + 1]) if version.query), "")
        return [(asked or "Write a page.", self.now.code)]

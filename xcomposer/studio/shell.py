"""What the tabs share on the page: texts in two languages, the settings drawer, the model's queue, downloads."""

import html
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr

from xcomposer.studio.desk import Choices, Desk
from xcomposer.studio.line import Now
from xcomposer.studio.texts import LANGUAGES, TEXTS, text
from xcomposer.studio.workspace import Workspace, Workspaces

# The model's work waits in the desk's line, not in gradio's queue. "multiple": by default gradio drops an event while
# the last one of its kind goes on, as a stopped answer does until its token is done: the next question had no answer.
MODEL = {"concurrency_limit": None, "trigger_mode": "multiple"}
AT_ONCE = {"queue": False, "show_progress": "hidden"}
EVERY_S = 0.1  # between two pictures of what is being written
# Of each number in the drawer: its kind, least and most.
NUMBERS: dict[str, tuple[type, float, float]] = {
    "seed": (int, -1, 2**63 - 1),
    "beams": (int, 1, 16),
    "temperature": (float, 0.01, 10),
    "top_p": (float, 0.01, 1),
    "penalty": (float, 0.1, 10),
    "hd_num": (int, 1, 64),
    "length": (int, 1, 32768),
}
NOTE = '<p role="status" class="note {}">{}</p>'
# A click on the hidden link, once its file has come.
PRESS = "() => setTimeout(() => document.querySelector('#download a, a#download, #download')?.click(), 300)"

# What the page kept: in the tab, who its visitor is; in the browser, the article and the language.
STORED = """(token, article, language) => [
    sessionStorage.getItem('xcomposer') || '', localStorage.getItem('xcomposer-article') || '',
    localStorage.getItem('xcomposer-language') || language,
]"""


def said(message: str, kind: str = "") -> str:
    """A line beside a control. kind: "error", or "" for plain words."""
    return NOTE.format(kind, html.escape(message)) if message else ""


class Shell:
    """The page around the tabs.

    Args:
        desk, workspaces: the logic.
        folder: the operator's pictures for articles; None: none.
        addresses: whether the visitor may have this machine fetch from an address.
    """

    def __init__(self, desk: Desk, workspaces: Workspaces, folder: Path | None = None, addresses: bool = False):
        self.desk, self.workspaces, self.folder, self.addresses = desk, workspaces, folder, addresses
        self._labelled: list[tuple[Any, dict[str, str]]] = []
        self._restored: list[tuple[Callable[[Workspace, str], Sequence[Any]], list[Any]]] = []

    def workspace(self, token: str) -> Workspace:
        """Raises: gr.Error: the visitor was away too long."""
        try:
            return self.workspaces[token]
        except ValueError as error:
            raise gr.Error(str(error)) from error

    def labelled(self, component: Any, **keys: str) -> Any:
        """The component, whose properties are texts by key: in English now, in Chinese when that is chosen."""
        self._labelled.append((component, keys))
        for name, key in keys.items():
            setattr(component, name, TEXTS[key][0])
        return component

    def restores(self, fill: Callable[[Workspace, str], Sequence[Any]], outputs: list[Any]) -> None:
        """`fill(workspace, language)` gives these outputs when a page is opened and when the language changes."""
        self._restored.append((fill, outputs))

    def header(self) -> None:
        """Title, model, language and the settings drawer."""
        self.token = gr.State("", time_to_live=None, delete_callback=self.workspaces.close)
        self.stored = gr.Textbox(visible=False)
        self.saved_article = gr.Textbox(visible=False)
        with gr.Row(elem_classes="header"):
            self.title = gr.HTML(self._title("en"), elem_classes="title")
            self.language = gr.Radio(
                list(LANGUAGES), value="English", show_label=False, label="Language", elem_classes="language segments",
                container=False, min_width=150, scale=0,
            )  # fmt: skip
        with self.labelled(gr.Accordion(open=False, elem_classes="settings"), label="settings"), gr.Row():
            exact = self.labelled(gr.Radio(_ways("en"), value=True, min_width=170), label="answers")
            # Text, since gradio's box for a number has a 0 where nothing was chosen, once the drawer is opened.
            self.choices = [exact, *(self._number(key) for key in NUMBERS)]
        self.restores(lambda _, language: [gr.update(choices=_ways(language))], [exact])
        self.link = gr.DownloadButton("file", elem_id="download", visible="hidden")

    def _number(self, key: str) -> gr.Textbox:
        info = f"{key}_info" if f"{key}_info" in TEXTS else "empty_default"
        box = gr.Textbox(max_lines=1, min_width=130, elem_classes="number")
        return self.labelled(box, label=key, info=info, placeholder="default")

    def _title(self, language: str) -> str:
        about = self.desk.about
        knows = about.knows.get(LANGUAGES.get(language, language), "")
        line = f" · {html.escape(text('knows', language, knows))}" if knows else ""
        return f"<h1>XComposer Studio</h1><p><b>{html.escape(about.name)}</b>{line}</p>"

    def footer(self, app: gr.Blocks) -> None:
        """What happens when the page is opened, and when another language is chosen."""
        filled = [output for _, outputs in self._restored for output in outputs]
        labels = [component for component, _ in self._labelled]

        def dressed(language: str) -> list[Any]:
            updates = [
                gr.update(**{name: text(key, language) for name, key in keys.items()}) for _, keys in self._labelled
            ]
            return [self._title(language), *updates]

        def open_page(stored: str, saved: str, language: str, request: gr.Request) -> list[Any]:
            workspace = self.workspaces.open(stored)
            workspace.leave()
            if saved and not workspace.draft.now.blocks:
                self.reopen(workspace, saved)
            accepted = request.headers.get("accept-language", "") if request else ""
            if workspace.holders == 1 and accepted.lower().startswith("zh"):
                language = "中文"
            values = [value for fill, _ in self._restored for value in fill(workspace, language)]
            return [workspace.token, workspace.token, language, *dressed(language), *values]

        def relabel(token: str, language: str) -> list[Any]:
            workspace = self.workspace(token)
            return [*dressed(language), *(value for fill, _ in self._restored for value in fill(workspace, language))]

        app.load(
            open_page,
            [self.stored, self.saved_article, self.language],
            [self.token, self.stored, self.language, self.title, *labels, *filled],
            js=STORED,
            **AT_ONCE,
        ).then(None, self.stored, None, js="(token) => { sessionStorage.setItem('xcomposer', token) }")
        self.language.input(
            relabel,
            [self.token, self.language],
            [self.title, *labels, *filled],
            js="(t, l) => { localStorage.setItem('xcomposer-language', l); return [t, l] }",
            **AT_ONCE,
        )

    def reopen(self, workspace: Workspace, saved: str) -> None:
        """The article that the browser kept, where this server has forgotten it; another text is left alone."""
        from xcomposer.article import Article

        try:
            workspace.draft.now = Article.from_json(saved)
        except ValueError:
            return

    def model(
        self, tab: str, begun: Any, inputs: list[Any], outputs: list[Any], left: Callable[..., tuple], **options: Any
    ) -> Any:
        """After the event that begins a tab's work: that work.

        Args:
            left: (workspace, note, *inputs) gives the outputs as they are when the work was left. What it showed last
                may reach the page after what the stop showed, and gradio sends it once more at its end.
        """

        def do(token: str, *values: Any) -> Iterator[Any]:
            workspace, none = self.workspace(token), (gr.skip(),) * len(outputs)
            work = workspace.take(tab)
            if work is None:  # nothing was begun, or it was stopped before
                yield none
                return
            try:
                with closing(work.do(work)) as shown:
                    yield from shown
            finally:  # its page was closed
                workspace.end(tab, work)
            if work.left:
                yield none if tab in workspace.running else left(workspace, work.note, *values)

        return begun.then(do, [self.token, *inputs], outputs, **MODEL, **options)

    @staticmethod
    def waiting(now: Now, language: str) -> str:
        """A line for one whose turn has not come."""
        return said(text("waiting", language, now.before) if now.before else text("loading", language))

    def downloads(
        self, trigger: Callable, make: Callable[..., tuple[str, bytes] | None], inputs: list, note: Any
    ) -> None:
        """On a trigger, `make(workspace, language, ...)` gives a name and bytes, and the browser saves them."""

        def write(token: str, language: str, *values: Any) -> tuple[Any, str]:
            workspace = self.workspace(token)
            try:
                name, content = make(workspace, language, *values)
            except (ValueError, ImportError, OSError) as error:
                return gr.update(value=None), said(str(error), "error")
            folder = workspace.folder / "out"
            folder.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
            return gr.update(value=str(folder / name)), ""

        trigger(write, [self.token, self.language, *inputs], [self.link, note], **AT_ONCE).success(None, js=PRESS)


def _ways(language: str) -> list[tuple[str, bool]]:
    return [(text("exact", language), True), (text("varied", language), False)]


def choices_of(values: Sequence[Any], language: str) -> Choices:
    """The drawer's values, in the order of `Shell.choices`; an empty box is the default.

    Raises:
        ValueError: a number that is none, or beyond its limits; for people, in their language.
    """
    exact, *typed = values
    given = {}
    for (key, (kind, least, most)), value in zip(NUMBERS.items(), typed, strict=True):
        value = str(value or "").strip()
        if not value:
            continue
        try:
            number = kind(value)
        except ValueError:
            number = None
        if number is None or not least <= number <= most:
            whole = text("whole_number" if kind is int else "number", language)
            raise ValueError(text("wrong_number", language, text(key, language), value[:40], whole, least, most))
        given[key] = number
    return Choices(exact=bool(exact), **given)

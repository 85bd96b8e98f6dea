"""The page tab."""

import html
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from xcomposer.article import Article, file_name
from xcomposer.studio.desk import KINDS
from xcomposer.studio.frame import hosts_of, preview, title_of, window
from xcomposer.studio.line import Work
from xcomposer.studio.media import EXPECTED, one_line, without_paths
from xcomposer.studio.pages import Pages
from xcomposer.studio.shell import AT_ONCE, Shell, choices_of, said
from xcomposer.studio.texts import text
from xcomposer.studio.workspace import Workspace

EVERY_S = 0.2  # between two previews of a page that is being written
MOST_RESUME = 2**18  # bytes
DEVICES = ("desktop", "tablet", "phone")
# The page in a window of its own: a document of ours, with the page in the same two frames as in the preview.
OPEN_WINDOW = "(page) => { if (page) window.open(URL.createObjectURL(new Blob([page], {type: 'text/html'}))) }"

# The preview is put in whole: gradio would compare it with the last one and change what differs.
HOLDER = '<div class="holder"></div>'
DRAW = """
const draw = () => { element.querySelector('.holder').innerHTML = props.value || '' };
watch('value', draw);
draw();
"""


class PageTab:
    def __init__(self, shell: Shell):
        self.shell, self.desk = shell, shell.desk
        label, about = shell.labelled, self.desk.about
        with label(gr.Tab(id="page"), label="page"), gr.Row(elem_classes="workbench"):
            with gr.Column(scale=1, min_width=300, elem_classes="side"):
                self.kind = gr.State(KINDS[0])
                with gr.Tabs(selected=KINDS[0]):
                    with label(gr.Tab(id=KINDS[0]), label="instruction") as first:
                        self.instruction = label(
                            gr.Textbox(lines=5, max_lines=14, show_label=False, label="Instruction"),
                            placeholder="page_placeholder",
                        )
                        if about.page:
                            gr.Examples([[example] for example in about.page], [self.instruction], label="")
                    with label(gr.Tab(id=KINDS[1]), label="resume") as second:
                        self.resume_file = label(
                            gr.File(file_types=[".md", ".txt"], type="filepath", height=110), label="resume_file"
                        )
                        self.resume = label(gr.Textbox(lines=6, max_lines=14), label="resume_text")
                        if about.resume:
                            gr.Examples([[about.resume]], [self.resume_file], label="")
                    with label(gr.Tab(id=KINDS[2]), label="screenshot") as third:
                        self.screenshot = label(
                            gr.Image(
                                sources=["upload", "clipboard"], type="filepath", height=200, elem_classes="screenshot"
                            ),
                            label="screenshot_file",
                        )
                        self.wish = label(gr.Textbox(lines=2), label="screenshot_text")
                        if about.screenshot:
                            gr.Examples([[about.screenshot]], [self.screenshot], label="")
                with gr.Row():
                    self.write = label(gr.Button(variant="primary", min_width=120), value="write_page")
                    self.halt = label(gr.Button(variant="stop", min_width=80, interactive=False), value="stop")
                self.note = gr.HTML(elem_classes="line")
                self.wanted = label(gr.Textbox(lines=2), label="change_label", placeholder="change_placeholder")
                self.change = label(gr.Button(size="sm"), value="change")
                self.versions = label(gr.Radio([], elem_classes="list"), label="versions")
            with gr.Column(scale=2, min_width=320):
                with gr.Row(elem_classes="tools"):
                    self.device = label(
                        gr.Radio(
                            [(name, name) for name in DEVICES],
                            value=DEVICES[0],
                            container=False,
                            scale=1,
                            elem_classes="segments",
                        ),
                        label="width",
                    )
                    self.download = label(gr.Button(size="sm", scale=0, min_width=110), value="download")
                    self.open = label(gr.Button(size="sm", scale=0, min_width=170), value="open")
                with gr.Row(visible=False, elem_classes="hosts") as self.hosts_row:
                    self.hosts = gr.HTML()
                    self.allow = label(gr.Button(size="sm", scale=0, min_width=150), value="allow_hosts")
                with gr.Tabs():
                    with label(gr.Tab(id="preview"), label="preview"):
                        self.preview = gr.HTML(html_template=HOLDER, js_on_load=DRAW, elem_classes="preview")
                    with label(gr.Tab(id="code"), label="code"):
                        self.code = gr.Code(language="html", show_label=False, label="Code", lines=24, max_lines=32)
                self.window = gr.Textbox(visible=False)
        for tab, kind in ((first, KINDS[0]), (second, KINDS[1]), (third, KINDS[2])):
            tab.select(lambda kind=kind: kind, None, self.kind, **AT_ONCE)
        self._wire()
        shell.restores(self._restore, [self.device, *self.shown])

    def _wire(self) -> None:
        shell = self.shell
        self.shown = [self.preview, self.code, self.versions, self.hosts_row, self.hosts, self.note, self.halt]
        start = [shell.token, shell.language, self.device]
        asked = [*start, self.kind, self.instruction, self.resume_file, self.resume, self.screenshot, self.wish]
        for begun in (
            self.write.click(self.write_page, [*asked, *shell.choices], self.shown, **AT_ONCE),
            self.change.click(self.change_page, [*start, self.wanted, *shell.choices], self.shown, **AT_ONCE),
        ):
            # Once more when it is over: the last state must not be lost among the quick ones.
            shell.model("page", begun, start[1:], [*self.shown, self.wanted], self._left).then(
                self.settled, start, [self.preview, self.code], **AT_ONCE
            )
        self.halt.click(self.stop, start, self.shown, **AT_ONCE)
        self.code.input(self.edit, [*start, self.code], self.shown, trigger_mode="always_last", **AT_ONCE)
        self.versions.input(self.show_version, [*start, self.versions], self.shown, **AT_ONCE)
        self.device.input(self.show, start, self.shown, **AT_ONCE)
        self.allow.click(self.allow_hosts, start, self.shown, **AT_ONCE)
        shell.downloads(self.download.click, self._file, [], self.note)
        self.open.click(self._window, [shell.token], self.window, **AT_ONCE).success(
            None, self.window, None, js=OPEN_WINDOW
        )

    # --------------------------------------------------------------------------------------------------------- showing

    def _shown(self, workspace: Workspace, language: str, device: str, note: str = "") -> tuple:
        pages = workspace.pages
        code = pages.now.code if pages.now else ""
        return (
            self._preview(code, language, device, pages),
            code,
            self._versions(pages, language),
            *self._hosts(code, language, pages),
            note,
            gr.update(interactive="page" in workspace.running),
        )

    @staticmethod
    def _preview(code: str, language: str, device: str, pages: Pages) -> str:
        device = device if device in DEVICES else DEVICES[0]
        empty = f'<div class="empty">{html.escape(text("page_empty", language))}</div>'
        return preview(code, device, pages.hosts) or empty

    @staticmethod
    def _versions(pages: Pages, language: str) -> Any:
        rows = [
            (f"{at + 1}. {(version.label or version.query)[:60] or text('by_hand', language)}", at)
            for at, version in enumerate(pages.versions)
        ]
        return gr.update(choices=rows[::-1], value=pages.at if rows else None, visible=bool(rows))

    @staticmethod
    def _hosts(code: str, language: str, pages: Pages) -> tuple[Any, str]:
        wanted = [host for host in hosts_of(code) if host not in pages.hosts]
        line = said(text("wants_hosts", language, ", ".join(wanted))) if wanted else ""
        return gr.update(visible=bool(wanted)), line

    def _restore(self, workspace: Workspace, language: str) -> Sequence[Any]:
        rows = [(text(name, language), name) for name in DEVICES]
        return gr.update(choices=rows), *self._shown(workspace, language, DEVICES[0])

    def show(self, token: str, language: str, device: str) -> tuple:
        """As it is, at this width."""
        workspace = self.shell.workspace(token)
        writing = "page" in workspace.running
        return (gr.skip(),) * 7 if writing else self._shown(workspace, language, device)

    def settled(self, token: str, language: str, device: str) -> tuple:
        """The page and its code as they are in the end."""
        workspace = self.shell.workspace(token)
        return (gr.skip(),) * 2 if "page" in workspace.running else self._shown(workspace, language, device)[:2]

    # --------------------------------------------------------------------------------------------------------- writing

    def write_page(
        self, token: str, language: str, device: str, kind: str, instruction: str, resume_file: str | None,
        resume: str, screenshot: str | None, wish: str, *choices: Any,
    ) -> tuple:  # fmt: skip
        """A page from the open tab's input."""
        workspace = self.shell.workspace(token)

        def asked() -> tuple[Iterator[str], str, str]:
            words, picture, name = instruction or "", None, (instruction or "").strip()
            if kind == "resume":
                words, name = _text_of(resume_file) if resume_file else resume or "", text(kind, language)
            if kind == "screenshot":
                words, name = wish or "", text(kind, language)
                picture = workspace.media(screenshot) if screenshot else None
            return self.desk.page(kind, words, picture, [], choices_of(choices, language)), words, name

        return self._begin(workspace, language, device, asked)

    def change_page(self, token: str, language: str, device: str, change: str, *choices: Any) -> tuple:
        """The shown page, changed: a further turn that has it before it."""
        workspace, wanted = self.shell.workspace(token), (change or "").strip()

        def asked() -> tuple[Iterator[str], str, str]:
            if not workspace.pages.now:
                raise ValueError(text("nothing_to_change", language))
            if not wanted:
                raise ValueError(text("nothing_changed", language))
            history = workspace.pages.history()
            return self.desk.page("instruction", wanted, None, history, choices_of(choices, language)), wanted, wanted

        return self._begin(workspace, language, device, asked, "")

    def _begin(
        self, workspace: Workspace, language: str, device: str, asked: Callable[[], tuple], box: Any = None
    ) -> tuple:
        """The buttons change before the model's turn comes. box: what the change's box has once it is made."""
        pages, same = workspace.pages, (gr.skip(),) * 5
        if "page" in workspace.running:
            return *same, said(text("busy", language)), gr.skip()
        try:
            codes, query, name = asked()
        except EXPECTED as error:
            return *same, said(one_line(error), "error"), gr.skip()
        pages.begin(query or name, name)
        box = gr.skip() if box is None else box
        workspace.begin("page", Work(partial(self._write, workspace, language, device, codes, box), pages.keep))
        return *same, "", gr.update(interactive=True)

    def _write(
        self, workspace: Workspace, language: str, device: str, codes: Iterator[str], box: Any, work: Work
    ) -> Iterator[tuple]:
        """The page as it is written; what there is when it stops or fails stays as a version."""
        pages, tokens = workspace.pages, 0
        try:
            with closing(self.desk.line.turn(work, lambda: codes, EVERY_S)) as steps:
                for now in steps:
                    if now.value is None:
                        yield *(gr.skip(),) * 5, self.shell.waiting(now, language), gr.skip(), gr.skip()
                        continue
                    tokens, pages.coming = tokens + 1, now.value or pages.coming
                    if now.due:
                        code = pages.coming
                        count = ("characters", len(code)) if code else ("tokens", tokens)
                        yield (
                            self._preview(code, language, device, pages), code, gr.skip(), gr.skip(), gr.skip(),
                            said(text(count[0], language, count[1])), gr.skip(), gr.skip(),
                        )  # fmt: skip
            if not work.left:
                done = said(text("done_page", language, len(pages.coming)))
                workspace.end("page", work)
                yield *self._shown(workspace, language, device, done), box
        except EXPECTED as error:
            if workspace.end("page", work):
                yield *self._shown(workspace, language, device, said(one_line(error), "error")), gr.skip()

    def stop(self, token: str, language: str, device: str) -> tuple:
        """What was written stays, as a version."""
        workspace, note = self.shell.workspace(token), said(text("stopped", language))
        workspace.end("page", note=note)
        return self._shown(workspace, language, device, note)

    def _left(self, workspace: Workspace, note: str, language: str, device: str) -> tuple:
        return *self._shown(workspace, language, device, note), gr.skip()

    # ------------------------------------------------------------------------------------------- versions, edits, files

    def edit(self, token: str, language: str, device: str, code: str) -> tuple:
        """The preview follows the code."""
        workspace = self.shell.workspace(token)
        if "page" in workspace.running:
            return (gr.skip(),) * 7
        workspace.pages.edited(code or "")
        shown = self._shown(workspace, language, device)
        return shown[0], gr.skip(), *shown[2:]

    def show_version(self, token: str, language: str, device: str, at: int | None) -> tuple:
        workspace = self.shell.workspace(token)
        workspace.end("page")
        if isinstance(at, int) and 0 <= at < len(workspace.pages.versions):
            workspace.pages.at = at
        return self._shown(workspace, language, device)

    def allow_hosts(self, token: str, language: str, device: str) -> tuple:
        """The preview may load from the hosts that the shown page names."""
        workspace = self.shell.workspace(token)
        pages = workspace.pages
        if pages.now:
            pages.hosts = tuple(sorted({*pages.hosts, *hosts_of(pages.now.code)}))
        return self._shown(workspace, language, device)

    @staticmethod
    def _file(workspace: Workspace, language: str) -> tuple[str, bytes]:
        version = workspace.pages.now
        if version is None:
            raise ValueError(text("page_empty", language))
        return file_name(Article(title=title_of(version.code) or "page"), ".html"), version.code.encode()

    def _window(self, token: str) -> str:
        pages = self.shell.workspace(token).pages
        return window(pages.now.code, pages.hosts) if pages.now else ""


def _text_of(path: str) -> str:
    """A resume's text. Raises: ValueError: too long, or no UTF-8; has the file's own name."""
    file = Path(path)
    try:
        if file.stat().st_size > MOST_RESUME:
            raise ValueError(f"{file.name} is over {MOST_RESUME} bytes: a resume is shorter")
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.name} is no UTF-8 text: save it as Markdown in UTF-8") from error
    except OSError as error:
        raise ValueError(without_paths(str(error), file)) from error

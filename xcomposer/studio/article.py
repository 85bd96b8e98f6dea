"""The article tab: the controls on the left, the sheet (sheet.*) on the right."""

import base64
import binascii
import html
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr

from xcomposer.article import EDITS, FORMATS, Article, Composer, file_name, render
from xcomposer.article.pictures import in_folder
from xcomposer.studio.draft import STEPS, Ghost
from xcomposer.studio.media import EXPECTED, one_line, without_paths
from xcomposer.studio.shell import AT_ONCE, EVERY_S, MODEL, Shell, choices_of, said
from xcomposer.studio.texts import TEXTS, text
from xcomposer.studio.workspace import Workspace

FILES = Path(__file__).parent
SHOWN_CANDIDATES, THUMBNAIL = 12, 128
RANKS = 2  # places are shown the model's choice and its runner-up first
MOST_UPLOAD = 20 * 2**20  # bytes of a picture that comes through the sheet
LABELS = {".zip": "Markdown", ".html": "HTML", ".docx": "DOCX", ".pdf": "PDF", ".json": "JSON"}


def sheet_of(workspace: Workspace, language: str) -> dict[str, Any]:
    """The sheet's whole state. Pictures go as data: addresses; the ids that come back are looked up, not believed."""
    draft, busy = workspace.draft, "article" in workspace.running
    article, ghost = draft.now, None
    if draft.ghost:
        waiting, known = draft.ghost, {block.id for block in article.blocks}
        new = [block for block in waiting.article.blocks if block.id not in known]
        after = new[0].text if new else waiting.article.block(waiting.block).text
        old = "" if waiting.how == "insert" else article.block(waiting.block).text
        ghost = {"block": waiting.block, "how": waiting.how, "old": old, "done": waiting.done, "new": after}
        ghost["new"] = "" if old and after == old and not waiting.done else after
    blocks = [
        {
            "id": block.id,
            "kind": block.kind,
            "text": block.text,
            "picture": block.picture,
            "caption": block.caption,
            "src": workspace.shown(block.picture),
            "candidates": [
                {"id": each, "src": workspace.shown(each, THUMBNAIL)}
                for each in block.candidates[:SHOWN_CANDIDATES]
                if each in workspace.pictures
            ],
        }
        for block in article.blocks
    ]
    view = {"title": article.title, "blocks": blocks, "busy": busy, "ghost": ghost}
    kept = {} if busy else {"json": article.to_json() if article.blocks else ""}
    texts = {key: text(key, language) for key in TEXTS}
    return view | kept | {"undo": bool(draft.past), "redo": bool(draft.future), "texts": texts}


class ArticleTab:
    def __init__(self, shell: Shell):
        self.shell, self.desk = shell, shell.desk
        label, about = shell.labelled, self.desk.about
        pictures = {"file_types": ["image"], "file_count": "multiple", "type": "filepath"}
        with label(gr.Tab(id="article"), label="article"), gr.Row(elem_classes="workbench"):
            with gr.Column(scale=1, min_width=300, elem_classes="side"):
                self.instruction = label(
                    gr.Textbox(lines=4, max_lines=12), label="instruction", placeholder="article_placeholder"
                )
                if about.article:
                    gr.Examples([[example] for example in about.article], [self.instruction], label="")
                self.count = label(gr.Dropdown(_counts("en"), value=-1, filterable=False), label="count")
                with gr.Row():
                    self.compose = label(gr.Button(variant="primary", min_width=110), value="compose")
                    self.halt = label(gr.Button(variant="stop", min_width=80, interactive=False), value="stop")
                with gr.Row():
                    self.illustrate = label(gr.Button(size="sm", min_width=90), value="illustrate")
                    self.go_on = label(gr.Button(size="sm", min_width=90), value="go_on")
                self.steps = gr.HTML()
                self.note = gr.HTML()
                self.gallery = label(
                    gr.Gallery(
                        columns=4, height=190, interactive=True, file_types=["image"], type="filepath", buttons=[],
                    ),
                    label="candidates",
                )  # fmt: skip
                self.offered = gr.HTML()
                with label(gr.Accordion(open=False), label="material"):
                    self.material = gr.File(show_label=False, label="Material", height=110, **pictures)
            with gr.Column(scale=2, min_width=320):
                self.sheet = gr.HTML(
                    value={"texts": {}, "blocks": []},
                    html_template=(FILES / "sheet.html").read_text(encoding="utf-8"),
                    css_template=(FILES / "sheet.css").read_text(encoding="utf-8"),
                    js_on_load=(FILES / "sheet.js").read_text(encoding="utf-8"),
                    apply_default_css=False, elem_id="sheet", label="Article",
                )  # fmt: skip
                with gr.Row(elem_classes="tools"):
                    self.saves = {suffix: gr.Button(LABELS[suffix], size="sm", min_width=70) for suffix in FORMATS}
                    self.opened = label(
                        gr.UploadButton(size="sm", file_types=[".json"], type="filepath", min_width=110),
                        label="open_article",
                    )
        self._wire()
        shell.restores(self._restore, [self.instruction, self.count, self.offered, *self.shown])

    def _wire(self) -> None:
        shell = self.shell
        self.shown = [self.sheet, self.steps, self.note, self.halt]
        start = [shell.token, shell.language]
        given = [*start, self.instruction, self.count, self.gallery, self.material, *shell.choices]
        running = []
        for trigger, first in (
            (self.compose.click, self.write),
            (self.illustrate.click, None),
            (self.go_on.click, self.more),
        ):
            begin = self.begin if first else self.begin_pictures
            event = trigger(begin, start, self.shown, **AT_ONCE)
            steps = [self.places, self.captions, self.choose] if first is not self.more else []
            for step in [first, *steps] if first else steps:
                event = event.then(step, given, self.shown, show_progress_on=[self.note], **MODEL)
                running.append(event)
        asked = self.sheet.ask(self.begin_edit, start, self.shown, **AT_ONCE).then(
            self.ask, [*start, self.gallery, *shell.choices], self.shown, show_progress_on=[self.note], **MODEL
        )
        self.sheet.act(self.act, start, self.shown, **AT_ONCE)
        self.halt.click(self.stop, start, self.shown, cancels=[*running, asked], **AT_ONCE)
        self.opened.upload(self.open, [*start, self.opened], [*self.shown, self.opened], **AT_ONCE)
        for suffix, save in self.saves.items():
            shell.downloads(save.click, self._saver(suffix), [], self.note)

    # --------------------------------------------------------------------------------------------------------- showing

    def _shown(self, workspace: Workspace, language: str, note: str = "") -> tuple:
        busy = "article" in workspace.running
        return sheet_of(workspace, language), self._steps(workspace, language), note, gr.update(interactive=busy)

    @staticmethod
    def _steps(workspace: Workspace, language: str) -> str:
        rows = []
        for step, state in workspace.draft.steps.items():
            kind = "on" if state.startswith("…") else "done" if state else "off"
            words = f"{text(f'step_{step}', language)} {state.lstrip('…✓').strip()}".strip()
            rows.append(f'<li class="{kind}">{html.escape(words)}</li>')
        return f'<ul class="steps">{"".join(rows)}</ul>' if rows else ""

    def _restore(self, workspace: Workspace, language: str) -> Sequence[Any]:
        count = len(in_folder(self.shell.folder)) if self.shell.folder else 0
        offered = said(text("candidates_folder", language, count)) if count else ""
        article = workspace.draft.now
        instruction = article.instruction if article.instruction else gr.skip()
        return (
            instruction,
            gr.update(choices=_counts(language)),
            offered,
            *self._shown(workspace, language, self._lost(workspace, language)),
        )

    @staticmethod
    def _lost(workspace: Workspace, language: str) -> str:
        lost = [
            block for block in workspace.draft.now.places if block.picture and block.picture not in workspace.pictures
        ]
        return said(text("lost", language, len(lost)), "error") if lost else ""

    # ---------------------------------------------------------------------------------------------------- the model's

    def begin(self, token: str, language: str) -> tuple:
        """The buttons change before the model's turn comes."""
        workspace = self.shell.workspace(token)
        workspace.begin("article")
        workspace.draft.steps = {}
        workspace.draft.ghost = None
        return self._shown(workspace, language)

    def begin_pictures(self, token: str, language: str) -> tuple:
        workspace = self.shell.workspace(token)
        if not workspace.draft.now.paragraphs:
            return self._shown(workspace, language, said(text("no_article", language), "error"))
        shown = self.begin(token, language)
        workspace.draft.steps = dict.fromkeys(STEPS[1:], "")
        return shown

    def begin_edit(self, token: str, language: str, event: gr.EventData) -> tuple:
        """What the sheet asks of the model; remembered, as a step's own event has no data."""
        workspace = self.shell.workspace(token)
        if "article" in workspace.running:
            return self._shown(workspace, language, said(text("busy", language)))
        workspace.draft.asked = {name: str(getattr(event, name, "")) for name in ("do", "block", "note")}
        return self.begin(token, language)

    def write(
        self, token: str, language: str, instruction: str, count: int, gallery: Any, material: Any, *choices: Any
    ):
        def start(workspace: Workspace, composer: Composer):
            steps = STEPS if count else STEPS[:1]
            workspace.draft.steps = dict.fromkeys(steps, "")
            given = [workspace.pictures.add(path) for path in material or ()]
            chosen = choices_of(choices)
            return composer.write(instruction or "", given, chosen.of_article(), chosen.seed)

        yield from self._step(token, language, "write", start)

    def more(self, token: str, language: str, *_: Any):
        def start(workspace: Workspace, composer: Composer):
            if not workspace.draft.now.paragraphs:
                raise ValueError(text("no_article", language))
            workspace.draft.steps = {"write": ""}
            return composer.continue_(workspace.draft.now)

        yield from self._step(token, language, "write", start)

    def places(self, token: str, language: str, _: str, count: int, *__: Any):
        def start(workspace: Workspace, composer: Composer):
            return composer.places(workspace.draft.now, count if count > 0 else None)

        yield from self._step(token, language, "places", start)

    def captions(self, token: str, language: str, *_: Any):
        yield from self._step(
            token, language, "captions", lambda workspace, composer: composer.captions(workspace.draft.now)
        )

    def choose(self, token: str, language: str, _: str, __: int, gallery: Any, *___: Any):
        def start(workspace: Workspace, composer: Composer):
            return composer.choose(workspace.draft.now, self._candidates(workspace, gallery), ranks=RANKS)

        yield from self._step(token, language, "choose", start)

    def _candidates(self, workspace: Workspace, gallery: Any) -> list[str]:
        """Ids of the visitor's pictures, then of the operator's."""
        paths = [Path(entry[0] if isinstance(entry, list | tuple) else entry) for entry in gallery or ()]
        paths += in_folder(self.shell.folder) if self.shell.folder else []
        return [workspace.pictures.add(path) for path in paths]

    def _step(self, token: str, language: str, step: str, start: Any) -> Iterator[tuple]:
        """One step of the model, shown as it goes. What there is when it stops or fails stays, and can be undone."""
        workspace = self.shell.workspace(token)
        work, draft = workspace.running.get("article"), workspace.draft
        if work is None or (draft.steps and step not in draft.steps):
            yield (gr.skip(),) * 4
            return
        before, note, seen, went_on = draft.now, "", 0.0, False
        try:
            composer = Composer(self.desk.model, getattr(self.desk.model, "tokenizer", None), workspace.pictures)
            steps = start(workspace, composer)
            draft.steps[step] = "…"
            yield self._shown(workspace, language)
            with closing(steps):
                for article, said_now in steps:
                    if not workspace.goes_on("article", work):
                        return
                    draft.now = article
                    progress = f"{said_now.done}/{said_now.of}" if said_now.of > 1 else ""
                    draft.steps[step] = f"… {progress}"
                    note = said_now.text if said_now.answer else note
                    if time.monotonic() - seen > EVERY_S:
                        yield self._shown(workspace, language, said(note))
                        seen = time.monotonic()
            draft.steps[step] = f"✓ {progress}" if before != draft.now else "✓"
            went_on = step != list(draft.steps)[-1]
        except EXPECTED as error:
            note = one_line(error)
            draft.steps = {name: state for name, state in draft.steps.items() if state.startswith("✓")}
        finally:
            if draft.now != before and (workspace.goes_on("article", work) or workspace.running.get("article") is None):
                draft.put(draft.now, before)
            if not went_on:
                workspace.end("article", work)
        yield self._shown(workspace, language, said(note, "" if went_on or not note else "error"))

    def ask(self, token: str, language: str, gallery: Any, *choices: Any) -> Iterator[tuple]:
        """An edit of a paragraph, into a ghost beside it; or a caption or a picture for one place."""
        workspace = self.shell.workspace(token)
        work, draft = workspace.running.get("article"), workspace.draft
        if work is None:
            yield (gr.skip(),) * 4
            return
        do, block, note = (draft.asked[name] for name in ("do", "block", "note"))
        if do == "caption":
            yield from self._step(token, language, "captions", lambda w, c: c.caption(w.draft.now, block))
            return
        if do == "choose":
            one = lambda w, c: c.choose(w.draft.now, self._candidates(w, gallery), [block], RANKS)  # noqa: E731
            yield from self._step(token, language, "choose", one)
            return
        problem, seen = "", 0.0
        try:
            if do not in EDITS:
                raise ValueError(f"unknown edit {do!r}")
            composer = Composer(self.desk.model, getattr(self.desk.model, "tokenizer", None), workspace.pictures)
            with closing(composer.edit(draft.now, block, do, note)) as steps:
                for article, noted in steps:
                    if not workspace.goes_on("article", work):
                        return
                    draft.ghost, problem = Ghost(article, block, do), noted.text if noted.answer else ""
                    if time.monotonic() - seen > EVERY_S:
                        yield self._shown(workspace, language)
                        seen = time.monotonic()
            if draft.ghost and draft.ghost.article != draft.now:
                draft.ghost.done = True
            else:
                draft.ghost = None
        except EXPECTED as error:
            draft.ghost, problem = None, one_line(error)
        finally:
            workspace.end("article", work)
            if draft.ghost:
                draft.ghost.done = True
        yield self._shown(workspace, language, said(problem, "error"))

    def stop(self, token: str, language: str) -> tuple:
        """What was written stays."""
        workspace = self.shell.workspace(token)
        workspace.end("article")
        draft = workspace.draft
        draft.steps = {name: state for name, state in draft.steps.items() if state.startswith("✓")}
        if draft.ghost:
            draft.ghost.done = True
        return self._shown(workspace, language, said(text("stopped", language)))

    # ------------------------------------------------------------------------------------------------------- by hand

    def act(self, token: str, language: str, event: gr.EventData) -> tuple:
        """A change by the visitor's hand, in the sheet."""
        workspace, values = self.shell.workspace(token), dict(event._data or {})
        draft, do, block = workspace.draft, str(values.pop("do", "")), str(values.pop("block", ""))
        if "article" in workspace.running:
            return self._shown(workspace, language, said(text("busy", language)))
        try:
            if do in ("undo", "redo"):
                draft.ghost = None
                getattr(draft, do)()
            elif do in ("keep", "discard"):
                draft.keep(do == "keep")
            elif do == "upload":
                picture = workspace.pictures.add(_decoded(values))
                place = draft.now.block(block)
                draft.put(draft.now.changed(block, picture=picture, candidates=(picture, *place.candidates)))
            else:
                draft.ghost = None
                draft.act(do, block, **values)
        except EXPECTED as error:
            return self._shown(workspace, language, said(one_line(error), "error"))
        return self._shown(workspace, language, self._lost(workspace, language))

    def open(self, token: str, language: str, path: str) -> tuple:
        """An article from its JSON; the one that was there can be had back by undo."""
        workspace = self.shell.workspace(token)
        workspace.end("article")
        try:
            workspace.draft.put(Article.from_json(Path(path).read_text(encoding="utf-8")))
        except EXPECTED as error:
            return *self._shown(workspace, language, said(without_paths(one_line(error), Path(path)), "error")), None
        workspace.draft.ghost = None
        return *self._shown(workspace, language, self._lost(workspace, language)), None

    @staticmethod
    def _saver(suffix: str):
        def save(workspace: Workspace, language: str) -> tuple[str, bytes]:
            article = workspace.draft.now
            if not article.paragraphs:
                raise ValueError(text("no_article", language))
            return file_name(article, suffix), render(article, workspace.pictures, suffix)

        return save


def _counts(language: str) -> list[tuple[str, int]]:
    """How many pictures an article may have, for people; -1: the model decides."""
    words = [(text("count_auto", language), -1), (text("count_none", language), 0)]
    return words + [(str(number), number) for number in range(1, 11)]


def _decoded(values: dict[str, Any]) -> bytes:
    """A picture that the sheet sends along. Raises: ValueError: it is none, or too large."""
    name, data = str(values.get("name", "picture"))[-80:], str(values.get("data", ""))
    if len(data) > MOST_UPLOAD * 4 // 3:
        raise ValueError(f"{name} is over {MOST_UPLOAD >> 20} MB: give a smaller picture")
    try:
        return base64.b64decode(data.partition(",")[2], validate=True)
    except binascii.Error as error:
        raise ValueError(f"{name} cannot be read as a picture") from error

"""The article tab: the controls on the left, the sheet (sheet.*) on the right."""

import base64
import binascii
import html
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from xcomposer.article import EDITS, FORMATS, Article, Composer, Note, file_name, render
from xcomposer.article.pictures import in_folder
from xcomposer.studio.draft import Ghost
from xcomposer.studio.line import Now, Work
from xcomposer.studio.media import EXPECTED, one_line, without_paths
from xcomposer.studio.shell import AT_ONCE, EVERY_S, Shell, choices_of, said
from xcomposer.studio.texts import TEXTS, text
from xcomposer.studio.workspace import Workspace

FILES = Path(__file__).parent
SHOWN_CANDIDATES, THUMBNAIL = 12, 128
RANKS = 2  # places are shown the model's choice and its runner-up first
MOST_UPLOAD = 20 * 2**20  # bytes of a picture that comes through the sheet
STATES = itertools.count(1)  # of any sheet: one may reach its page after a newer one, and is no news there
Steps = Iterator[tuple[Article, Note]]
Step = Callable[[Composer, Article], Steps]  # of the article as it is when the step begins
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
    view = {"title": article.title, "blocks": blocks, "busy": busy, "ghost": ghost, "number": next(STATES)}
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
                self.count = label(gr.Dropdown(_counts("en"), value=-1, filterable=False), label="count")
                with gr.Row():
                    self.compose = label(gr.Button(variant="primary", min_width=110), value="compose")
                    self.halt = label(gr.Button(variant="stop", min_width=80, interactive=False), value="stop")
                with gr.Row():
                    self.illustrate = label(gr.Button(size="sm", min_width=90), value="illustrate")
                    self.go_on = label(gr.Button(size="sm", min_width=90), value="go_on")
                self.steps = gr.HTML(elem_classes="line")
                self.note = gr.HTML(elem_classes="line")
                self.gallery = label(
                    gr.Gallery(
                        columns=4, height=190, interactive=True, file_types=["image"], type="filepath", buttons=[],
                    ),
                    label="candidates",
                )  # fmt: skip
                if about.article:
                    gr.Examples(
                        [[example["text"], example["files"]] for example in about.article],
                        [self.instruction, self.gallery],
                        label="",
                    )
                self.offered = gr.HTML(elem_classes="line")
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
        for begun in (
            self.compose.click(self.write, given, self.shown, **AT_ONCE),
            self.illustrate.click(self.add_pictures, [*start, self.count, self.gallery], self.shown, **AT_ONCE),
            self.go_on.click(self.more, start, self.shown, **AT_ONCE),
            self.sheet.ask(self.ask, [*start, self.gallery], self.shown, **AT_ONCE),
        ):
            shell.model("article", begun, [shell.language], self.shown, self._left, show_progress="hidden")
        # "multiple": what is typed is told when it is left, often by a click that is an act of its own.
        self.sheet.act(self.act, start, self.shown, trigger_mode="multiple", **AT_ONCE)
        self.halt.click(self.stop, start, self.shown, **AT_ONCE)
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

    def write(
        self, token: str, language: str, instruction: str, count: int, gallery: Any, material: Any, *choices: Any
    ) -> tuple:
        """A new article, and its pictures if it is to have some."""
        workspace = self.shell.workspace(token)
        try:
            chosen = choices_of(choices, language)
        except ValueError as error:
            return self._shown(workspace, language, said(one_line(error), "error"))

        def start(composer: Composer, article: Article) -> Steps:
            given = [workspace.pictures.add(path) for path in material or ()]
            return composer.write(instruction or "", given, chosen.of_article(), chosen.seed)

        return self._begin(workspace, language, {"write": start} | self._pictures(workspace, count, gallery))

    def add_pictures(self, token: str, language: str, count: int, gallery: Any) -> tuple:
        """Places, captions and pictures for the article that is there."""
        workspace = self.shell.workspace(token)
        return self._begin(workspace, language, self._pictures(workspace, count or -1, gallery), needs_text=True)

    def more(self, token: str, language: str) -> tuple:
        return self._begin(
            self.shell.workspace(token),
            language,
            {"write": lambda composer, article: composer.continue_(article)},
            needs_text=True,
        )

    def ask(self, token: str, language: str, gallery: Any, event: gr.EventData) -> tuple:
        """What the sheet asks of the model for one block: an edit, a caption, a picture."""
        workspace = self.shell.workspace(token)
        do, block, note = (str(getattr(event, name, "")) for name in ("do", "block", "note"))
        if do == "caption":
            steps = {"captions": lambda composer, article: composer.caption(article, block)}
        elif do == "choose":
            steps = self._choice(workspace, gallery, [block])
        else:
            return self._begin(workspace, language, {}, partial(self._edit, do=do, block=block, note=note))
        return self._begin(workspace, language, steps)

    def _pictures(self, workspace: Workspace, count: int, gallery: Any) -> dict[str, Step]:
        """The steps to `count` pictures; -1: as many as the model likes; 0: none."""
        if not count:
            return {}
        steps: dict[str, Step] = {
            "places": lambda composer, article: composer.places(article, count if count > 0 else None),
            "captions": lambda composer, article: composer.captions(article),
        }
        return steps | self._choice(workspace, gallery)

    def _choice(self, workspace: Workspace, gallery: Any, blocks: list[str] | None = None) -> dict[str, Step]:
        return {
            "choose": lambda composer, article: composer.choose(
                article, self._candidates(workspace, gallery), blocks, RANKS
            )
        }

    def _candidates(self, workspace: Workspace, gallery: Any) -> list[str]:
        """Ids of the visitor's pictures, then of the operator's."""
        paths = [Path(entry[0] if isinstance(entry, list | tuple) else entry) for entry in gallery or ()]
        paths += in_folder(self.shell.folder) if self.shell.folder else []
        return [workspace.pictures.add(path) for path in paths]

    def _begin(
        self,
        workspace: Workspace,
        language: str,
        steps: dict[str, Step],
        do: Callable[..., Iterator[tuple]] | None = None,
        needs_text: bool = False,
    ) -> tuple:
        """The buttons change before the model's turn comes. do: in place of taking the steps one by one."""
        draft = workspace.draft
        if "article" in workspace.running:
            return self._shown(workspace, language, said(text("busy", language)))
        if needs_text and not draft.now.paragraphs:
            return self._shown(workspace, language, said(text("no_article", language), "error"))
        draft.steps, draft.ghost = dict.fromkeys(steps, ""), None
        work = partial(do or partial(self._take, steps=steps), workspace, language)
        workspace.begin("article", Work(work, draft.keep_work))
        return self._shown(workspace, language)

    def _take(self, workspace: Workspace, language: str, work: Work, steps: dict[str, Step]) -> Iterator[tuple]:
        """The steps, each in a turn of its own and undone as one; shown as they go."""
        draft = workspace.draft
        notes: list[str] = []
        try:
            for name, start in steps.items():
                draft.begin(name)
                yield self._shown(workspace, language, said(" ".join(notes)))
                progress, problem = "", ""
                for now in self._turn(workspace, work, start):
                    if now.value is None:
                        yield gr.skip(), gr.skip(), self.shell.waiting(now, language), gr.skip()
                        continue
                    draft.now, note = now.value
                    progress = f"{note.done}/{note.of}" if note.of > 1 else ""
                    draft.steps[name] = f"… {progress}"
                    problem = note.text if note.answer else problem
                    if now.due:
                        yield self._shown(workspace, language, said(problem))
                if work.left:
                    return
                draft.done(name, progress)
                notes += [problem] if problem else []
        except EXPECTED as error:
            notes.append(one_line(error))
        if workspace.end("article", work):
            yield self._shown(workspace, language, said(" ".join(notes), "error"))

    def _edit(self, workspace: Workspace, language: str, work: Work, do: str, block: str, note: str) -> Iterator[tuple]:
        """An edit of a paragraph, into a ghost beside it."""
        draft, problem = workspace.draft, ""
        try:
            if do not in EDITS:
                raise ValueError(f"unknown edit {do!r}")
            for now in self._turn(workspace, work, lambda composer, article: composer.edit(article, block, do, note)):
                if now.value is None:
                    yield gr.skip(), gr.skip(), self.shell.waiting(now, language), gr.skip()
                    continue
                article, noted = now.value
                draft.ghost, problem = Ghost(article, block, do), noted.text if noted.answer else ""
                if now.due:
                    yield self._shown(workspace, language)
            if work.left:
                return
            if draft.ghost and draft.ghost.article == draft.now:  # nothing came of it
                draft.ghost = None
        except EXPECTED as error:
            draft.ghost, problem = None, one_line(error)
        if workspace.end("article", work):
            yield self._shown(workspace, language, said(problem, "error"))

    def _turn(self, workspace: Workspace, work: Work, start: Step) -> Iterator[Now]:
        """A turn with the model for one step of the article as it is now."""

        def steps() -> Steps:
            model = self.desk.model
            composer = Composer(model, getattr(model, "tokenizer", None), workspace.pictures)
            return start(composer, workspace.draft.now)

        with closing(self.desk.line.turn(work, steps, EVERY_S)) as turn:
            yield from turn

    def stop(self, token: str, language: str) -> tuple:
        """What was written stays."""
        workspace, note = self.shell.workspace(token), said(text("stopped", language))
        workspace.end("article", note=note)
        return self._shown(workspace, language, note)

    def _left(self, workspace: Workspace, note: str, language: str) -> tuple:
        return gr.skip(), *self._shown(workspace, language, note)[1:]  # the sheet knows which of its states is newest

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

"""The chat tab."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from xcomposer.model.media_internlm_xcomposer2 import load_media
from xcomposer.studio.conversation import Conversation, Turn, as_typed, from_json, to_json, to_markdown
from xcomposer.studio.desk import Choices
from xcomposer.studio.line import Work
from xcomposer.studio.media import EXPECTED, one_line, read_media, strip_of
from xcomposer.studio.shell import AT_ONCE, EVERY_S, Shell, choices_of, said
from xcomposer.studio.texts import text
from xcomposer.studio.workspace import Workspace

ADDRESS_BYTES, ADDRESS_S = 64 * 2**20, 20
HEIGHT = "max(320px, calc(100vh - 350px))"  # of the conversation: the box stays in sight
READY, WRITING = {"submit_btn": True, "stop_btn": False}, {"submit_btn": False, "stop_btn": True}


def messages_of(conversation: Conversation) -> list[dict]:
    """The turns as gradio's chatbot takes them."""
    messages = []
    for turn in conversation.turns:
        shown: list[Any] = [{"path": str(one.path), "alt_text": one.name} for one in turn.media]
        shown += [as_typed(turn.question)] if turn.question else []
        messages.append({"role": "user", "content": shown})
        if turn.answer:
            messages.append({"role": "assistant", "content": as_typed(turn.answer)})
    return messages


def boxed(turn: Turn) -> dict:
    """A question, back in its box."""
    return {"text": turn.question, "files": [str(one.source) for one in turn.media]}


def titles(workspace: Workspace, language: str) -> Any:
    """The list of conversations, the newest first."""
    rows = [(each.title or text("untitled", language), at) for at, each in enumerate(workspace.conversations)]
    return gr.update(choices=rows[::-1], value=workspace.at)


class ChatTab:
    def __init__(self, shell: Shell):
        self.shell, self.desk = shell, shell.desk
        label = shell.labelled
        with label(gr.Tab(id="chat"), label="chat"), gr.Row(elem_classes="workbench"):
            with gr.Column(scale=1, min_width=220, elem_classes="side"):
                self.new = label(gr.Button(size="sm"), value="new_chat")
                self.list = label(gr.Radio([], elem_classes="list", container=False), label="conversations")
                with label(gr.Accordion(open=False), label="files"):
                    with gr.Row():
                        self.markdown = label(gr.Button(size="sm", min_width=60), value="as_markdown")
                        self.json = label(gr.Button(size="sm", min_width=60), value="as_json")
                    self.opened = label(
                        gr.UploadButton(size="sm", file_types=[".json"], type="filepath"), label="open_json"
                    )
            with gr.Column(scale=4, min_width=320):
                self.chatbot = gr.Chatbot(
                    show_label=False, label="Conversation", height=HEIGHT, editable="user", buttons=["copy"],
                    layout="bubble", elem_classes="conversation", examples=self._examples(),
                    placeholder=self._welcome("en"),
                )  # fmt: skip
                self.box = label(
                    gr.MultimodalTextbox(
                        file_count="multiple", file_types=["image", "video"], show_label=False, label="Question",
                        max_plain_text_length=20000, elem_classes="question",
                    ),
                    placeholder="ask",
                )  # fmt: skip
                self.note = gr.HTML(elem_classes="line")
                self.attached = gr.HTML(elem_classes="attached")
                with label(gr.Accordion(open=False), label="more_sources"), gr.Row():
                    self.camera = label(gr.Image(sources=["webcam"], type="filepath", height=220), label="camera")
                    with gr.Column(visible=shell.addresses):
                        self.address = label(gr.Textbox(placeholder="https://"), label="address")
                        self.fetch = label(gr.Button(size="sm"), value="add")
        self._wire()
        shell.restores(self._restore, [self.chatbot, self.list, self.box])

    def _examples(self) -> list[dict]:
        return [{"text": each["text"], "files": each["files"]} for each in self.desk.about.chat]

    @staticmethod
    def _welcome(language: str) -> str:
        return f"### {text('chat_empty', language)}\n{text('chat_empty_more', language)}"

    def _wire(self) -> None:
        shell, shown = self.shell, [self.chatbot, self.box, self.note, self.list]
        start = [shell.token, shell.language]
        begins = (
            self.box.submit(self.send, [*start, self.box, *shell.choices], [*shown, self.attached], **AT_ONCE),
            self.chatbot.example_select(self.example, [*start, *shell.choices], [*shown, self.attached], **AT_ONCE),
            self.chatbot.retry(self.retry, [*start, *shell.choices], shown, **AT_ONCE),
            self.chatbot.edit(self.edit, [*start, *shell.choices], shown, **AT_ONCE),
        )
        fills = (  # what puts something into the box: gradio tells of a change only where a visitor made it
            *(shell.model("chat", begun, [shell.language], shown, self._left) for begun in begins),
            self.box.stop(self.stop, start, shown, **AT_ONCE),
            self.chatbot.undo(self.undo, start, shown, **AT_ONCE),
            self.camera.input(self.add_picture, [self.box, self.camera], [self.box, self.camera], **AT_ONCE),
            self.fetch.click(
                self.add_address, [*start, self.box, self.address], [self.box, self.address, self.note], **AT_ONCE
            ),
        )
        looked_at = {"fn": self.attach, "inputs": [*start, self.box, *shell.choices], "outputs": self.attached}
        self.box.change(**looked_at, trigger_mode="always_last", **AT_ONCE)
        for event in fills:
            event.then(**looked_at, trigger_mode="always_last", **AT_ONCE)
        self.chatbot.clear(self.clear, start, shown, **AT_ONCE)
        self.new.click(self.begin_new, start, shown, **AT_ONCE)
        self.list.input(self.switch, [*start, self.list], shown, **AT_ONCE)
        self.opened.upload(self.open, [*start, self.opened], [*shown, self.opened], **AT_ONCE)
        shell.downloads(self.markdown.click, self._as_markdown, [], self.note)
        shell.downloads(self.json.click, self._as_json, [], self.note)

    def _restore(self, workspace: Workspace, language: str) -> Sequence[Any]:
        """After a reload: a question that was not answered yet is back in its box."""
        box = gr.update()
        turns = workspace.conversation.turns
        if turns and not turns[-1].answer and "chat" not in workspace.running:
            box = gr.update(value=boxed(turns.pop()), **READY)
        chatbot = gr.update(value=messages_of(workspace.conversation), placeholder=self._welcome(language))
        return chatbot, titles(workspace, language), box

    def _shown(self, workspace: Workspace, language: str, box: Any = None, note: str = "") -> tuple:
        box = gr.update() if box is None else box
        return messages_of(workspace.conversation), box, note, titles(workspace, language)

    def _begin(self, workspace: Workspace, language: str, turn: Turn, choices: Choices) -> tuple:
        turns = workspace.conversation.turns
        turns.append(turn)
        workspace.begin("chat", Work(partial(self._answer, workspace, language, turns, choices)))
        return self._shown(workspace, language, gr.update(value=None, **WRITING))

    # ------------------------------------------------------------------------------------------------- what begins one

    def send(self, token: str, language: str, box: dict, *choices: Any) -> tuple:
        """A new question from the box, if it can be read."""
        workspace = self.shell.workspace(token)
        question, files = (box.get("text") or "").strip(), box.get("files") or []
        if "chat" in workspace.running:
            return *self._shown(workspace, language, note=said(text("busy", language))), gr.skip()
        if not question and not files:
            return *self._shown(workspace, language, note=said(text("nothing_asked", language))), gr.skip()
        try:
            chosen = choices_of(choices, language)
        except ValueError as error:
            return *self._shown(workspace, language, note=said(one_line(error), "error")), gr.skip()
        try:
            media = [workspace.media(path) for path in files]
        except EXPECTED as error:
            return *self._shown(workspace, language), said(one_line(error), "error")
        return *self._begin(workspace, language, Turn(question, media), chosen), ""

    def example(self, token: str, language: str, event: gr.SelectData, *choices: Any) -> tuple:
        at = event.index[0] if isinstance(event.index, list | tuple) else event.index
        example = self.desk.about.chat[int(at)]
        return self.send(token, language, example, *choices)

    def retry(self, token: str, language: str, event: gr.RetryData, *choices: Any) -> tuple:
        return self._again(token, language, event, choices, None)

    def edit(self, token: str, language: str, event: gr.EditData, *choices: Any) -> tuple:
        typed = event.value.replace("&lt;", "<").replace("&amp;", "&").strip() if isinstance(event.value, str) else None
        return self._again(token, language, event, choices, typed)

    def _again(self, token: str, language: str, event: Any, choices: Sequence[Any], typed: str | None) -> tuple:
        """A turn anew, with another question if one was typed; those after it are left."""
        workspace = self.shell.workspace(token)
        try:
            chosen = choices_of(choices, language)
        except ValueError as error:
            return self._shown(workspace, language, note=said(one_line(error), "error"))
        turn = self._cut(token, event.index)
        return self._begin(workspace, language, Turn(turn.question if typed is None else typed, turn.media), chosen)

    def _cut(self, token: str, index: int | Sequence[int]) -> Turn:
        """Leave a turn and all after it; returns it. index: of one of its two messages."""
        workspace = self.shell.workspace(token)
        workspace.end("chat")
        at = int(index[0] if isinstance(index, list | tuple) else index) // 2
        turns = workspace.conversation.turns
        at = max(0, min(at, len(turns) - 1))
        turn = turns[at]
        del turns[at:]
        return turn

    # --------------------------------------------------------------------------------------------------------- answers

    def _answer(
        self, workspace: Workspace, language: str, turns: list[Turn], choices: Choices, work: Work
    ) -> Iterator[tuple]:
        """The answer to the last turn as it grows. A question that fails goes back to its box."""
        turn = turns[-1]
        answers = partial(self.desk.answer, turns, choices)
        try:
            with closing(self.desk.line.turn(work, answers, EVERY_S)) as steps:
                for now in steps:
                    if now.value is None:
                        yield gr.skip(), gr.skip(), self.shell.waiting(now, language), gr.skip()
                        continue
                    turn.answer = now.value
                    if now.due:
                        yield messages_of(workspace.conversation), gr.skip(), "", gr.skip()
            if not work.left:
                turn.answer = turn.answer or "…"
                workspace.end("chat", work)
                yield self._shown(workspace, language, gr.update(**READY))
        except EXPECTED as error:
            if workspace.end("chat", work):
                turns.remove(turn)
                box = gr.update(value=boxed(turn), **READY)
                yield self._shown(workspace, language, box, said(one_line(error), "error"))

    def stop(self, token: str, language: str) -> tuple:
        """What was written stays; a question without an answer goes back to its box."""
        workspace, note = self.shell.workspace(token), said(text("stopped", language))
        workspace.end("chat", note=note)
        turns = workspace.conversation.turns
        value = {"value": boxed(turns.pop())} if turns and not turns[-1].answer else {}
        return self._shown(workspace, language, gr.update(**value, **READY), note)

    def _left(self, workspace: Workspace, note: str, language: str) -> tuple:
        return self._shown(workspace, language, gr.update(**READY), note)

    def undo(self, token: str, language: str, event: gr.UndoData) -> tuple:
        turn = self._cut(token, event.index)
        return self._shown(self.shell.workspace(token), language, gr.update(value=boxed(turn), **READY))

    def clear(self, token: str, language: str) -> tuple:
        workspace = self.shell.workspace(token)
        workspace.end("chat")
        workspace.conversation.turns.clear()
        return self._shown(workspace, language, gr.update(**READY))

    # --------------------------------------------------------------------------------------------------- conversations

    def begin_new(self, token: str, language: str) -> tuple:
        workspace = self.shell.workspace(token)
        self._leave(workspace)
        if workspace.conversations[-1].turns:
            workspace.conversations.append(Conversation(len(workspace.conversations) + 1))
        workspace.at = len(workspace.conversations) - 1
        return self._shown(workspace, language, gr.update(**READY))

    def switch(self, token: str, language: str, at: int | None) -> tuple:
        workspace = self.shell.workspace(token)
        self._leave(workspace)
        workspace.at = at if isinstance(at, int) and 0 <= at < len(workspace.conversations) else workspace.at
        return self._shown(workspace, language, gr.update(**READY))

    def open(self, token: str, language: str, path: str) -> tuple:
        """A conversation from its JSON, beside the others; the button forgets the file, which may be opened again."""
        workspace = self.shell.workspace(token)
        try:
            opened = from_json(Path(path).read_text(encoding="utf-8"), workspace.folder, read_media)
        except EXPECTED as error:
            return *self._shown(workspace, language, note=said(one_line(error), "error")), None
        self._leave(workspace)
        workspace.conversations.append(opened)
        workspace.at = len(workspace.conversations) - 1
        return *self._shown(workspace, language, gr.update(**READY)), None

    @staticmethod
    def _leave(workspace: Workspace) -> None:
        workspace.end("chat")
        turns = workspace.conversation.turns
        if turns and not turns[-1].answer:
            turns.pop()

    # -------------------------------------------------------------------------------------------------------- pictures

    def attach(self, token: str, language: str, box: dict, *choices: Any) -> str:
        """What the box holds: each picture's tiles, a video's frames, and the length of the prompt."""
        workspace = self.shell.workspace(token)
        question, files = box.get("text") or "", box.get("files") or []
        if not files and not question:
            return ""
        try:
            media = [workspace.media(path) for path in files]
            turns = [*(turn for turn in workspace.conversation.turns if turn.answer), Turn(question, media)]
            sizes, whole, limit = self.desk.count(turns, choices_of(choices, language))
        except EXPECTED as error:
            return said(one_line(error), "error")
        notes = [
            text("frames" if one.times else "tiles", language, len(one.times) or tiles, tokens)
            for one, (tiles, tokens) in zip(media, sizes, strict=True)
        ]
        count = text("prompt", language, whole, limit) if limit else ""
        wrong = "over" if limit and whole >= limit else ""
        return f'{strip_of(media, notes)}<p class="count {wrong}">{count}</p>'

    @staticmethod
    def add_picture(box: dict, path: str | None) -> tuple[Any, Any]:
        """A picture from the camera, into the box."""
        if not path:
            return gr.skip(), gr.skip()
        return {"text": box.get("text") or "", "files": [*(box.get("files") or []), path]}, None

    def add_address(self, token: str, language: str, box: dict, address: str) -> tuple[Any, Any, str]:
        """A picture or a video from an address, into the box."""
        workspace = self.shell.workspace(token)
        if not self.shell.addresses:
            raise gr.Error("This server does not fetch from addresses.")
        address = address.strip()
        try:
            if not address.lower().startswith(("http://", "https://")):
                raise ValueError(f"{address[:80]!r} is no address: write http(s)://...")
            picture = load_media(address, timeout=ADDRESS_S, max_bytes=ADDRESS_BYTES)
        except EXPECTED as error:
            return gr.skip(), gr.skip(), said(one_line(error), "error")
        frames = picture if isinstance(picture, list) else [picture]
        kept = (
            workspace.folder / f"address-{len(list(workspace.folder.iterdir()))}{'.gif' if len(frames) > 1 else '.png'}"
        )
        frames[0].save(
            kept, save_all=len(frames) > 1, append_images=frames[1:], **({"duration": 1000} if len(frames) > 1 else {})
        )
        return {"text": box.get("text") or "", "files": [*(box.get("files") or []), str(kept)]}, "", ""

    # ----------------------------------------------------------------------------------------------------------- files

    @staticmethod
    def _as_markdown(workspace: Workspace, language: str) -> tuple[str, bytes]:
        return "conversation.md", to_markdown(workspace.conversation).encode()

    @staticmethod
    def _as_json(workspace: Workspace, language: str) -> tuple[str, bytes]:
        return "conversation.json", to_json(workspace.conversation).encode()

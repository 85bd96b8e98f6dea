"""The model in a browser: chat about pictures and videos, webpages, articles.

    pip install "gradio>=6"
    python gradio_demo/app.py --model FOLDER

Serves http://127.0.0.1:7860, to this machine alone; `--host 0.0.0.0` opens it to the network. One answer is
written at a time, others wait.
"""

import html
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from xcomposer.loading import arguments, load

MARK = "<ImageHere>"
FAILED = "⚠️ "  # begins a turn's answer that is an error; such turns are no part of the conversation
EXPECTED = (OSError, ValueError, TypeError, ImportError, RuntimeError)  # bad input, missing decoder, memory full
KINDS = ("from an instruction", "from a resume (Markdown)", "from a screenshot")
BUSY = threading.Lock()


def parts_of(content: Any) -> tuple[str, list[str]]:
    """(text, files) of a chat message's content: text, a part, or a list of parts."""
    if isinstance(content, str):
        return content, []
    if isinstance(content, list):
        texts, files = zip(*map(parts_of, content), strict=True) if content else ((), ())
        return "\n".join(filter(None, texts)), [file for some in files for file in some]
    if content.get("type") == "text":
        return content["text"], []
    file = content.get("file", content)
    return "", [file if isinstance(file, str) else file["path"]]


def marked(text: str, files: Sequence[str]) -> str:
    """A question with a mark for each file: at the marks it has, if there is one for each, else in front."""
    if text.count(MARK) == len(files):
        return text
    return MARK * len(files) + text.replace(MARK, "")


def read_messages(messages: Sequence[dict]) -> tuple[list[tuple[str, str]], list[str]]:
    """gradio's messages -> (question, answer) pairs and all their files, without turns that have no answer."""
    history: list[tuple[str, str]] = []
    kept: list[str] = []
    text, files = "", []
    for message in messages:
        said, sent = parts_of(message["content"])
        if message["role"] == "user":
            text, files = said, sent
        elif said and not said.startswith(FAILED):
            history.append((marked(text, files), said.replace(MARK, "")))
            kept += files
    return history, kept


def failure(error: BaseException) -> str:
    return FAILED + (" ".join(str(error).split()) or type(error).__name__)


class Desk:
    """What the tabs do. Knows the model, not gradio."""

    def __init__(self, model, max_new_tokens: int):
        self.model, self.max_new_tokens = model, max_new_tokens

    def stream(self, query: str, images: list[str], **settings) -> Iterator[str]:
        """The answer so far, again and again, or an error."""
        settings = {"max_new_tokens": self.max_new_tokens, **settings}
        with BUSY:
            try:
                for text, _ in self.model.stream_chat(None, query, images, **settings):
                    yield text
            except EXPECTED as error:
                yield failure(error)

    def chat(self, message: dict, messages: Sequence[dict], hd_num: int = 0, greedy: bool = False) -> Iterator[str]:
        """A turn of the chat tab: {"text", "files"} after gradio's messages. hd_num 0: the model's default."""
        history, images = read_messages(messages)
        files = [parts_of(file)[1][0] if isinstance(file, dict) else str(file) for file in message.get("files") or ()]
        query, images = marked(message.get("text") or "", files), [*images, *files]
        queries = [asked for asked, _ in history] + [query]
        if len(images) == 1:
            queries[0] = queries[0].removeprefix(MARK)  # a single picture goes unmarked, as the model was trained
        turns = [(asked, said) for asked, (_, said) in zip(queries, history, strict=False)]
        yield from self.stream(
            queries[-1], images, history=turns, hd_num=hd_num or None, do_sample=not greedy, use_meta=True
        )

    def article(self, instruction: str, files: Sequence[str] | None, max_new_tokens: int) -> Iterator[str]:
        """An article as it is written, with the write adapter on."""
        images = list(files or ())
        query = marked(instruction, images)
        yield from self.stream(query, images, infer_mode="write", top_k=40, max_new_tokens=int(max_new_tokens))

    def webpage(self, kind: str, text: str, file: str | None, max_new_tokens: int, seed: int) -> tuple[str, str]:
        """(HTML, its preview); an error in place of the preview."""
        settings = dict(max_new_tokens=int(max_new_tokens), seed=int(seed), output_path=None)
        with BUSY:
            try:
                if kind == KINDS[0]:
                    page = self.model.write_webpage(text, **settings)
                elif file is None:
                    raise ValueError(f"a webpage {kind} needs the file: drop it in the box")
                elif kind == KINDS[1]:
                    page = self.model.resume_2_webpage(file, **settings)
                else:
                    page = self.model.screen_2_webpage(text, [file], **settings)
            except EXPECTED as error:
                return "", html.escape(failure(error))
        return page, preview(page)


def preview(page: str) -> str:
    """The page in a frame of its own: its scripts run, but reach nothing of this app."""
    frame = 'sandbox="allow-scripts" style="width: 100%; height: 600px; border: 1px solid #ccc; background: white"'
    return f'<iframe title="preview" {frame} srcdoc="{html.escape(page)}"></iframe>'


def build(desk: Desk):
    """The app of three tabs.

    Raises:
        SystemExit: gradio is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio as gr
    except ImportError as error:
        raise SystemExit(f"the demo needs gradio ({error}): pip install 'gradio>=6'") from error

    with gr.Blocks(title="InternLM-XComposer-2.5") as app:
        gr.Markdown("# InternLM-XComposer-2.5")
        with gr.Tab("Chat"):
            gr.ChatInterface(
                desk.chat,
                multimodal=True,
                textbox=gr.MultimodalTextbox(
                    file_count="multiple",
                    file_types=["image", "video"],
                    placeholder=f"Ask; drop pictures and videos here. {MARK} in the text says where one belongs.",
                ),
                additional_inputs=[
                    gr.Slider(0, 40, 0, step=1, label="hd_num: most tiles of a picture (0: the default)", render=False),
                    gr.Checkbox(False, label="greedy: the same answer every time", render=False),
                ],
                additional_inputs_accordion=gr.Accordion("Settings", open=False, render=False),
            )
        with gr.Tab("Webpage"):
            kind = gr.Radio(KINDS, value=KINDS[0], label="Webpage")
            text = gr.Textbox(lines=4, label="Instruction")
            file = gr.File(label="Resume or screenshot", type="filepath")
            with gr.Row():
                length = gr.Slider(16, 8000, 4800, step=16, label="Most tokens")
                seed = gr.Number(-1, precision=0, label="Seed (-1: another page each time)")
            go = gr.Button("Write the page", variant="primary")
            shown = gr.HTML()
            code = gr.Code(language="html", label="HTML")
            go.click(desk.webpage, [kind, text, file, length, seed], [code, shown])
        with gr.Tab("Article"):
            instruction = gr.Textbox(lines=4, label="Instruction")
            pictures = gr.File(label="Pictures", file_count="multiple", file_types=["image"], type="filepath")
            size = gr.Slider(16, 8000, 4096, step=16, label="Most tokens")
            write = gr.Button("Write the article", variant="primary")
            written = gr.Markdown()
            write.click(desk.article, [instruction, pictures, size], written)
    return app


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, max_new_tokens=1024)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args(argv)
    build(Desk(None, args.max_new_tokens))  # before the model: a missing gradio shows at once
    model, _ = load(args)
    build(Desk(model, args.max_new_tokens)).launch(server_name=args.host, server_port=args.port)


if __name__ == "__main__":
    main()

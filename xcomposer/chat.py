"""Chat about pictures and videos: one question, or a conversation.

    xcomposer chat --model FOLDER --image a.jpg b.jpg --text "What differs?"
    xcomposer chat --model FOLDER --video clip.mp4 --text "What happens?" --num_gpus 2
    xcomposer chat --model FOLDER
    xcomposer chat --model FOLDER --image a.jpg --text "What is it?" --stay

The last two ask for questions. In a question, <img>path-or-url</img> puts a picture or a video at that place; `clear`
forgets the conversation, `exit` or Ctrl-D leaves. Pictures of earlier turns stay in the conversation.
"""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from transformers import TextStreamer

from xcomposer.loading import EXPECTED, arguments, check_folder, load, one_line
from xcomposer.model.ixc_utils import load_media
from xcomposer.model.prompting_internlm_xcomposer2 import IMAGE_MARK as MARK
from xcomposer.model.prompting_internlm_xcomposer2 import TURN_CLOSE

INLINE = re.compile(rf"<img>(.*?)</img>|{MARK}")


class Media(NamedTuple):
    """An opened picture (PIL) or video (a list of frames) and what to call it."""

    name: str
    picture: Any


def media_opener(num_frm: int) -> Callable[[str], Media]:
    """A function that opens a path or an address, once, with the model's own reader."""

    def open_media(source: str) -> Media:
        picture = load_media(source, num_frm=num_frm)
        size = f"{len(picture)} frames" if isinstance(picture, list) else f"{picture.width} x {picture.height}"
        return Media(f"{short_name(source)}, {size}", picture)

    return open_media


def short_name(source: str) -> str:
    """A file's or an address's last part."""
    if source.startswith("data:"):
        return source[: source.find(",")]
    if "://" in source:
        address = urlsplit(source)
        return Path(address.path).name or address.netloc
    return Path(source).name


def lay_out(text: str, given: Sequence[Any] = ()) -> tuple[str, list[Any]]:
    """(question with a mark at each picture's place, its pictures in that order).

    `<img>source</img>` is a picture's place and name, a bare mark takes the next of `given`, and those of `given` that
    have no mark stand in front.

    Raises:
        ValueError: a mark without a picture, an `<img>` that is empty or not closed.
    """
    waiting, placed = list(given), []

    def place(found: re.Match) -> str:
        source = found[1]
        if source is None:
            if not waiting:
                raise ValueError(f"{MARK} stands for a picture given with --image; write <img>path-or-url</img> here")
            placed.append(waiting.pop(0))
        elif not source.strip():
            raise ValueError("<img></img> names no picture; write <img>path-or-url</img>")
        else:
            placed.append(source.strip())
        return MARK

    query = INLINE.sub(place, text)
    if "<img>" in query or "</img>" in query:
        raise ValueError("<img> and </img> must come in pairs: <img>path-or-url</img>")
    return MARK * len(waiting) + query, waiting + placed


class AnswerStreamer(TextStreamer):
    """Prints an answer while it is written, without the token that ends it."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(text.split(TURN_CLOSE)[0], stream_end)


class Conversation:
    """Turns and pictures so far. A turn that fails leaves both as they were."""

    def __init__(self, model, tokenizer, open_media: Callable[[str], Media], **settings):
        self.model, self.tokenizer, self.open_media, self.settings = model, tokenizer, open_media, settings
        self.clear()

    def clear(self) -> None:
        self.history: list[tuple[str, str]] = []
        self.media: list[Media] = []

    def ask(self, text: str, given: Sequence[Media] = (), typed: bool = False) -> str:
        """Print the question with its pictures' names, then the answer; returns the answer.

        typed: `text` already stands on the screen; it is printed again only where pictures' names change it.
        """
        query, placed = lay_out(text, given)
        new = [item if isinstance(item, Media) else self.open_media(item) for item in placed]
        names = iter(new)
        spaced = re.sub(rf"({MARK})(?=[\w<])", r"\1 ", query)
        shown = re.sub(MARK, lambda _: f"[{next(names).name}]", spaced)
        if shown != text or not typed:
            print(shown, flush=True)

        media = self.media + new
        queries = [asked for asked, _ in self.history] + [query]
        if len(media) == 1:
            queries[0] = queries[0].removeprefix(MARK)  # a single picture goes unmarked, as the model was trained
        history = [(asked, said) for asked, (_, said) in zip(queries, self.history, strict=False)]
        streamer = AnswerStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        streams = self.settings.get("num_beams", 1) == 1  # beam search knows its answer only at the end
        answer, _ = self.model.chat(
            self.tokenizer,
            queries[-1],
            [item.picture for item in media],
            history=history,
            streamer=streamer if streams else None,
            use_meta=True,
            escape_control_tokens=True,
            **self.settings,
        )
        if not streams:
            print(answer)
        self.media = media
        self.history.append((query, answer.replace(MARK, "")))  # a mark in an answer would ask for one more picture
        return answer


def talk(conversation: Conversation, given: Sequence[Media] = ()) -> None:
    """Ask for questions until `exit` or the end of input. `given` goes with the first question that is answered."""
    print("Ask. <img>path-or-url</img> attaches a picture or a video, `clear` forgets, `exit` leaves.")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(`exit` or Ctrl-D leaves)")
            continue
        if line == "exit":
            return
        if line == "clear":
            conversation.clear()
            given = ()
            print("(forgotten)")
        elif line:
            try:
                conversation.ask(line, given, typed=sys.stdin.isatty())
                given = ()
            except KeyboardInterrupt:
                print("\n(stopped; this question is forgotten)")
            except EXPECTED as error:
                print(f"error: {one_line(error)}", file=sys.stderr, flush=True)


def parse(argv: Sequence[str] | None):
    parser = arguments(__doc__, 1024, command="chat", example='--image photo.jpg --text "What is this?"')
    for name in ("--image", "--video"):
        parser.add_argument(name, dest="media", nargs="+", action="extend", default=[], metavar="SOURCE",
                            help="paths or URLs; in front of the text, or at its <ImageHere> marks")  # fmt: skip
    parser.add_argument("--text", help="one question; without it, questions are asked for")
    parser.add_argument("--stay", action="store_true", help="ask for more questions after --text")
    parser.add_argument("--hd_num", type=int, help="most tiles of a picture (default: 24, or 6 each of several)")
    parser.add_argument("--num_frm", type=int, default=32, help="most frames of a video")
    parser.add_argument("--beams", type=int, default=1, help="beam search; its answer comes in one piece")
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token: the same answer every time")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    check_folder(args.model)
    open_media = media_opener(args.num_frm)
    try:
        given = [open_media(source) for source in args.media]  # before the model: a wrong path shows at once
    except EXPECTED as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    model, tokenizer = load(args)
    settings = dict(
        hd_num=args.hd_num, max_new_tokens=args.max_new_tokens, num_beams=args.beams, do_sample=not args.greedy
    )
    conversation = Conversation(model, tokenizer, open_media, **settings)
    if args.text is None:
        talk(conversation, given)
        return 0
    try:
        conversation.ask(args.text, given)
    except EXPECTED as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    if args.stay:
        talk(conversation)
    return 0


if __name__ == "__main__":
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")  # a console that cannot show a character shows ? instead
    try:
        import readline  # noqa: F401  line editing in the loop, where the system has it
    except ImportError:
        pass
    sys.exit(main())

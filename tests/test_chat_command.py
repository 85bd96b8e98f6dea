"""`xcomposer chat`, on a tiny checkpoint: what it prints is what the model answers."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from xcomposer import chat as example_chat
from xcomposer import loading as common
from xcomposer.checkpoints import tiny

REPO = Path(__file__).resolve().parents[1]
EXAMPLES = REPO / "examples"
DATA = EXAMPLES / "data"
SHAPES, HOUSE, CLIP = (str(DATA / name) for name in ("shapes.png", "house.png", "rolling_ball.mp4"))
SHAPES_NAME, HOUSE_NAME, CLIP_NAME = "[shapes.png, 900 x 420]", "[house.png, 600 x 800]", "[rolling_ball.mp4, 6 frames]"
MARK = example_chat.MARK
SHORT = ["--greedy", "--max_new_tokens", "12"]
INTRO = "Ask. <img>path-or-url</img> attaches a picture or a video, `clear` forgets, `exit` leaves.\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("examples") / "IXC-2.5 tiny v1.0")


@pytest.fixture(scope="module")
def model(folder):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    model.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return model


@pytest.fixture(scope="module")
def answer(model):
    """The answer that `SHORT` asks for, straight from `chat`."""

    def answer(query, images=(), history=(), **kwargs):
        settings = dict(do_sample=False, max_new_tokens=12, use_meta=True) | kwargs
        return model.chat(model.tokenizer, query, list(images), history=list(history), **settings)[0]

    return answer


@pytest.fixture
def chat(folder, capsys, monkeypatch):
    """Runs example_chat in this process: (exit status, stdout, stderr)."""

    def chat(*argv, lines=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        status = example_chat.main(["--model", str(folder), *SHORT, *argv])
        return (status, *capsys.readouterr())

    return chat


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(folder, cwd, *argv, stdin=""):
    command = [sys.executable, str(EXAMPLES / "example_chat.py"), "--model", str(folder), *SHORT, *argv]
    return subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, encoding="utf-8", timeout=100)


# One question.


def test_a_picture_from_another_directory(folder, answer, tmp_path):
    done = run(folder, tmp_path, "--image", SHAPES, "--text", "What is in the picture?", "--num_gpus", "0")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{SHAPES_NAME} What is in the picture?\n{answer('What is in the picture?', [SHAPES])}\n"
    assert f"{folder} in float32 on the CPU" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argv, query, images, shown",
    [
        (["--image", SHAPES, HOUSE], f"{MARK}{MARK}Compare.", [SHAPES, HOUSE], f"{SHAPES_NAME} {HOUSE_NAME} Compare."),
        (["--image", HOUSE, "--image", SHAPES], f"{MARK}{MARK}Compare.", [HOUSE, SHAPES],
         f"{HOUSE_NAME} {SHAPES_NAME} Compare."),
        (["--video", CLIP], "Compare.", [CLIP], f"{CLIP_NAME} Compare."),
        (["--image", SHAPES, "--video", CLIP], f"{MARK}{MARK}Compare.", [SHAPES, CLIP],
         f"{SHAPES_NAME} {CLIP_NAME} Compare."),
        ([], "Compare.", [], "Compare."),
    ],
)  # fmt: skip
def test_media_stand_in_front_in_the_order_given(chat, answer, argv, query, images, shown):
    status, out, _ = chat(*argv, "--text", "Compare.")
    assert (status, out) == (0, f"{shown}\n{answer(query, images)}\n")


def test_marks_in_the_text_place_the_pictures(chat, answer):
    text = f"Is {MARK} like {MARK}?"
    _, out, _ = chat("--image", SHAPES, HOUSE, "--text", text)
    assert out == f"Is {SHAPES_NAME} like {HOUSE_NAME}?\n{answer(text, [SHAPES, HOUSE])}\n"


def test_hd_num_frames_and_beams_reach_the_model(chat, answer):
    _, out, _ = chat("--image", HOUSE, "--text", "What?", "--hd_num", "2", "--beams", "2")
    assert out == f"{HOUSE_NAME} What?\n{answer('What?', [HOUSE], hd_num=2, num_beams=2)}\n"
    _, out, _ = chat("--video", CLIP, "--text", "What?", "--num_frm", "2")
    assert out.startswith("[rolling_ball.mp4, 2 frames] What?\n")


def test_the_answer_comes_in_pieces(folder, model):
    pieces = []

    class Watched(example_chat.AnswerStreamer):
        def on_finalized_text(self, text, stream_end=False):
            pieces.append(text)

    streamer = Watched(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    said, _ = model.chat(model.tokenizer, "Hello", do_sample=False, max_new_tokens=12, streamer=streamer)
    assert len([piece for piece in pieces if piece]) > 2 and "".join(pieces) == said


def test_the_closing_token_is_not_printed(model, capsys):
    streamer = example_chat.AnswerStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.put(torch.tensor([[]]))
    for token in model.tokenizer("A small model[UNUSED_TOKEN_145]", add_special_tokens=False).input_ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert capsys.readouterr().out == "A small model\n"


# A conversation.


def test_a_conversation_through_a_pipe(folder, answer, tmp_path):
    (tmp_path / "my picture.png").write_bytes(Path(SHAPES).read_bytes())
    lines = [
        "Hello",
        "<img>nothing.png</img> What?",
        "From <img> my picture.png </img> to <img>" + HOUSE + "</img>?",
        "<img>http://127.0.0.1:9/a.png</img> What?",
        "<img>my picture.png",
        "Why?",
        "clear",
        "",
        "Why?",
        "exit",
        "unheard",
    ]
    done = run(folder, tmp_path, stdin="\n".join(lines))
    assert done.returncode == 0, done.stderr

    images = [SHAPES, HOUSE]
    first = answer("Hello")
    placed = f"From {MARK} to {MARK}?"
    second = answer(placed, images, [("Hello", first)])
    third = answer("Why?", images, [("Hello", first), (placed, second)])
    assert done.stdout == INTRO + (
        f"> Hello\n{first}\n"
        f"> > From [my picture.png, 900 x 420] to {HOUSE_NAME}?\n{second}\n"
        f"> > > Why?\n{third}\n"
        f"> (forgotten)\n"
        f"> > Why?\n{answer('Why?')}\n"
        f"> "
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3 and "Traceback" not in done.stderr
    assert "nothing.png" in errors[0] and "127.0.0.1" in errors[1] and "pairs" in errors[2]
    assert [path.name for path in tmp_path.iterdir()] == ["my picture.png"]


def test_given_pictures_go_with_the_first_question_that_is_answered(chat, answer):
    status, out, err = chat("--image", SHAPES, lines=["<img>nothing.png</img>", "What?", f"Or <img>{HOUSE}</img>?"])
    first = answer("What?", [SHAPES])
    second = answer(f"Or {MARK}?", [SHAPES, HOUSE], [(f"{MARK}What?", first)])
    shown = f"> > {SHAPES_NAME} What?\n{first}\n> Or {HOUSE_NAME}?\n{second}\n> \n"
    assert (status, out) == (0, INTRO + shown)  # the end of input leaves
    assert err.count("error: ") == 1


def test_a_picture_of_a_later_turn_is_marked_there(chat, answer):
    _, out, _ = chat(lines=["Hello", f"<img>{SHAPES}</img>What?"])
    first = answer("Hello")
    second = answer(f"{MARK}What?", [SHAPES], [("Hello", first)])
    assert out == INTRO + f"> Hello\n{first}\n> {SHAPES_NAME} What?\n{second}\n> \n"


@pytest.mark.parametrize("failure", [RuntimeError("out of\nmemory"), KeyboardInterrupt()])
def test_a_turn_that_fails_leaves_the_conversation_as_it_was(model, monkeypatch, capsys, failure):
    settings = dict(do_sample=False, max_new_tokens=4)
    conversation = example_chat.Conversation(model, model.tokenizer, lambda source: pytest.fail("opened"), **settings)
    conversation.ask("Hello")
    before = (list(conversation.history), list(conversation.media))

    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr(type(model), "chat", fail)
    monkeypatch.setattr(sys, "stdin", io.StringIO("again\nexit\n"))
    example_chat.talk(conversation)
    assert (conversation.history, conversation.media) == before
    out, err = capsys.readouterr()
    assert err == ("error: out of memory\n" if isinstance(failure, RuntimeError) else "")
    assert ("stopped" in out) == isinstance(failure, KeyboardInterrupt)


def test_a_mark_that_the_model_writes_asks_for_no_picture(model, monkeypatch):
    conversation = example_chat.Conversation(model, model.tokenizer, None)
    monkeypatch.setattr(type(model), "chat", lambda *args, **kwargs: (f"look: {MARK}!", []))
    assert conversation.ask("Hello") == f"look: {MARK}!"
    assert conversation.history == [("Hello", "look: !")]


@pytest.mark.parametrize(
    "text, given, query, placed",
    [
        ("a <img>x.png</img> b <img>http://h/y z?q=1</img>", [], f"a {MARK} b {MARK}", ["x.png", "http://h/y z?q=1"]),
        ("a", [1, 2], f"{MARK}{MARK}a", [1, 2]),
        (f"<img>x</img> {MARK} a", [1, 2], f"{MARK}{MARK} {MARK} a", [2, "x", 1]),
        ("no picture", [], "no picture", []),
    ],
)
def test_lay_out(text, given, query, placed):
    assert example_chat.lay_out(text, given) == (query, placed)


REFUSED = [f"a {MARK}", "<img></img>", "<img> </img>", "<img>a", "a</img>", "<img>a</img></img>"]


@pytest.mark.parametrize("text", REFUSED)
def test_lay_out_refuses(text):
    with pytest.raises(ValueError, match="<img>"):
        example_chat.lay_out(text)


@pytest.mark.parametrize(
    "source, name",
    [
        ("/a/b c.png", "b c.png"),
        ("https://example.org/x/y.jpg?size=2", "y.jpg"),
        ("https://example.org", "example.org"),
        ("data:image/png;base64,AAAA", "data:image/png;base64"),
    ],
)
def test_short_name(source, name):
    assert example_chat.short_name(source) == name


# What goes wrong before a question is asked.


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--model", "nowhere"], ["nowhere is no folder", "a small model to try", "--model"]),
        (["--model", str(DATA)], ["has no config.json", "a small model to try"]),
        (["--num_gpus", "99"], ["--num_gpus 99", "--num_gpus 0"]),
        (["--num_gpus", "-1"], ["--num_gpus -1"]),
        (["--device", "toaster"], ["--device toaster"]),
        (["--adapter", "nowhere"], ["nowhere is no adapter folder", "adapter_config.json"]),
    ],
)
def test_a_wrong_start_says_the_remedy_in_one_line(chat, argv, words):
    with pytest.raises(SystemExit) as stopped:
        chat(*argv, "--text", "Hello")
    message = str(stopped.value)
    assert "\n" not in message and all(word in message for word in words)


def test_a_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"has no weights .*git checkout"):
        common.check_folder(tmp_path)


@pytest.mark.parametrize("argv", [["--image", "nothing.png"], ["--video", str(DATA / "resume.md")]])
def test_a_wrong_picture_shows_before_the_model_loads(chat, argv, monkeypatch):
    monkeypatch.setattr(example_chat, "load", lambda args: pytest.fail("loaded"))
    status, out, err = chat(*argv, "--text", "What?")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: ") and Path(argv[1]).name in err


def test_a_failing_question_is_one_line(chat):
    status, _, err = chat("--image", SHAPES, "--text", "What?", "--hd_num", "0")
    assert status == 1 and "error: hd_num is 0" in err and "Traceback" not in err


def test_cards_get_what_is_free_and_the_cpu_nothing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((10 + device.index) * 100, 10000))
    cards = common.pick_devices(3, None)
    assert [str(card) for card in cards] == ["cuda:0", "cuda:1", "cuda:2"]
    assert common.free_memory(cards) == {0: 900, 1: 990, 2: 1080, "cpu": 0}
    assert [str(card) for card in common.pick_devices(None, None)] == ["cuda:0"]
    assert [str(card) for card in common.pick_devices(0, None)] == ["cpu"]


def test_dtype(chat, folder):
    _, _, err = chat("--text", "Hello", "--dtype", "bfloat16")
    assert f"{folder} in bfloat16 on the CPU" in err


def test_adapter(folder, tmp_path, model, chat):
    peft = pytest.importorskip("peft")
    fresh = AutoModel.from_pretrained(folder, trust_remote_code=True)
    config = peft.LoraConfig(r=4, target_modules=["wqkv.linear"], init_lora_weights=False)
    peft.get_peft_model(fresh, config).save_pretrained(tmp_path / "lora")
    plain, tuned = (chat("--text", "Hello", *more)[1] for more in ([], ["--adapter", str(tmp_path / "lora")]))
    assert plain.startswith("Hello\n") and tuned.startswith("Hello\n") and plain != tuned

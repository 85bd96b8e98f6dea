"""The examples, on a tiny checkpoint: what they print is what the model answers, and they write where they say."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

REPO = Path(__file__).resolve().parents[1]
EXAMPLES = REPO / "examples"
DATA = EXAMPLES / "data"
sys.path.insert(0, str(EXAMPLES))

import article  # noqa: E402
import compose_article as compose  # noqa: E402
import high_resolution  # noqa: E402
import multi_image  # noqa: E402
import video  # noqa: E402
import webpage_from_instruction  # noqa: E402
import webpage_from_resume  # noqa: E402
import webpage_from_screenshot  # noqa: E402

from xcomposer import chat as example_chat  # noqa: E402
from xcomposer import loading as common  # noqa: E402
from xcomposer.checkpoints import tiny  # noqa: E402
from xcomposer.studio import app  # noqa: E402

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


# The short scripts.


def test_multi_image(folder, answer, here, capsys):
    history = multi_image.main(["--model", str(folder), "--max_new_tokens", "8"])
    images, settings = [SHAPES, HOUSE, str(DATA / "report.png")], dict(num_beams=3, max_new_tokens=8)
    assert [asked.count(MARK) for asked, _ in history] == [2, 1, 0]
    for at, (asked, said) in enumerate(history):
        assert said == answer(asked, images[: 2 + (at > 0)], history[:at], **settings)
    assert capsys.readouterr().out == "\n\n".join(f"Q: {asked}\nA: {said}" for asked, said in history) + "\n"
    assert not list(here.iterdir())


def test_video(folder, answer, here, capsys):
    history = video.main(["--model", str(folder), "--max_new_tokens", "8"])
    assert history[0][1] == answer(history[0][0], [CLIP], num_beams=3, max_new_tokens=8)
    assert history[1][1] == answer(history[1][0], [CLIP], history[:1], num_beams=3, max_new_tokens=8)
    assert history[1][1] in capsys.readouterr().out
    assert not list(here.iterdir())


def test_high_resolution(folder, answer, here, capsys):
    answers = high_resolution.main(["--model", str(folder), "--max_new_tokens", "8", "--text", "Read."])
    report = str(DATA / "report.png")
    assert answers == [answer("Read.", [report], hd_num=n, num_beams=3, max_new_tokens=8) for n in (24, 6)]
    out = capsys.readouterr().out
    assert "at most 24 tiles" in out and "at most 6 tiles" in out
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    "script, name",
    [
        (webpage_from_instruction, "Instruction-aware_Webpage_Generation.html"),
        (webpage_from_resume, "Resume-to-Personal_Page.html"),
        (webpage_from_screenshot, "Screenshot-to-Webpage.html"),
    ],
)
def test_webpages(folder, here, capsys, script, name):
    (here / "pages").mkdir()
    argv = ["--model", str(folder), "--max_new_tokens", "8", "--seed", "3"]
    html = script.main(argv)
    assert (here / name).read_text(encoding="utf-8") == html
    assert f"{len(html)} characters of HTML in {name}" in capsys.readouterr().out
    assert script.main([*argv, "--out", "pages/mine.html"]) == html  # the seed makes it the same page
    assert (here / "pages" / "mine.html").read_text(encoding="utf-8") == html
    written = {str(path.relative_to(here)) for path in here.rglob("*") if path.is_file()}
    assert written == {name, str(Path("pages/mine.html"))}


def test_article(folder, model, here, capsys):
    plain, with_picture = article.main(["--model", str(folder), "--max_new_tokens", "8", "--text", "Write."])
    assert plain == model.write_artical("Write.", seed=8192, max_new_tokens=8)
    out = capsys.readouterr().out
    assert plain in out and with_picture in out
    assert not list(here.iterdir())


# Composing.


@pytest.mark.parametrize("seed", ["1", "2"])
def test_composing_survives_what_a_random_model_writes(folder, here, capsys, seed):
    text = compose.main(["--model", str(folder), "--max_new_tokens", "30", "--seed", seed, "--image", SHAPES])
    assert capsys.readouterr().out.endswith(f"\n{text}\n")
    assert not list(here.iterdir())


class Scripted(compose.Composer):
    """Answers from a list, and keeps what it was asked."""

    def __init__(self, answers):
        self.answers, self.asked = iter(answers), []

    def ask(self, prompt, images=(), begun="", **settings):
        self.asked.append((prompt, list(images), begun))
        return next(self.answers)


def test_composing_asks_as_the_model_was_trained(monkeypatch, folder, here, capsys):
    composer = Scripted(
        [
            "Title\n\n<Seg1> One.\nTwo.\n",
            "<Seg2>, <Seg0>, <Seg7>, <Seg2>, <Seg1>",
            'The "harbour"。',
            'Noon"',
            'Evening" and more',
            "C.",
            "8",
            "(a)",
            " Short. ",
        ]
    )
    monkeypatch.setattr(compose, "load", lambda args: (None, None))
    monkeypatch.setattr(compose, "Composer", lambda *args, **settings: composer)
    compose.main(["--text", "Write.", "--image", "given.png", "--candidate", "x", "y", "z", "--out", "a.md"])
    whole = "<Seg0> Title\n<Seg1> One.\n<Seg2> Two.\n"
    assert composer.asked == [
        (f"{MARK}Write.", ["given.png"], ""),
        (f'{MARK}给定文章"{whole}" 根据上述文章，选择适合插入图像的行', ["given.png"], "适合插入图像的行是"),
        ('给定文章"<Seg0> Title\n<Seg1> One.\n" 给出适合在<Seg0>后插入的图像对应的标题。', [], '标题是"'),
        (f'给定文章"{whole}" 现在<Seg0>后插入图像对应的标题是"The "harbour"。给出适合在<Seg1>后插入的图像对应的标题。',
         [], '标题是"'),
        (f'给定文章"{whole}" 现在<Seg0>后插入图像对应的标题是"The "harbour"， <Seg1>后插入图像对应的标题是"Noon"。'
         "给出适合在<Seg2>后插入的图像对应的标题。", [], '标题是"'),
        (f"根据给定上下文和候选图像，选择合适的配图：Title\n候选图像包括: A.{MARK}\nB.{MARK}\nC.{MARK}",
         ["x", "y", "z"], "最合适的图是"),
        (f"根据给定上下文和候选图像，选择合适的配图：Title\n{MARK}One.\n候选图像包括: A.{MARK}\nB.{MARK}",
         ["z", "x", "y"], "最合适的图是"),
        (f"根据给定上下文和候选图像，选择合适的配图：Title\n{MARK}One.\nTwo.\n候选图像包括: A.{MARK}\nB.{MARK}",
         ["z", "x", "y"], "最合适的图是"),
        ("缩写以下段落：Two.", [], ""),
    ]  # fmt: skip
    written = (here / "a.md").read_text(encoding="utf-8")
    assert written == 'Title\n\n![The "harbour](<z>)\n\nOne.\n\n*(a picture: Noon)*\n\nShort.\n\n![Evening](<x>)\n'
    assert [path.name for path in here.iterdir()] == ["a.md"]
    assert "article in a.md" in capsys.readouterr().out


def test_composing_prompts_fit_the_model(model):
    composer = compose.Composer(model, model.tokenizer, max_new_tokens=4)
    assert isinstance(composer.choose(["One.", "Two."], [0, 1], [SHAPES, HOUSE]), dict)
    for how in compose.EDITS:
        assert isinstance(composer.edit(how, "One.", "more", "Two."), str)


def test_the_beginning_of_an_answer_is_part_of_the_prompt(model):
    composer = compose.Composer(model, model.tokenizer, max_new_tokens=6, do_sample=False, top_k=None, top_p=None)
    composer.settings["temperature"] = None
    whole = composer.ask("Hello")
    assert whole == model.chat(model.tokenizer, "Hello", max_new_tokens=6, do_sample=False, infer_mode="write")[0]
    assert composer.ask("Hello", begun="标题是") != whole


@pytest.mark.parametrize(
    "answer, places",
    [("", []), ("<Seg>", []), ("<Seg1><Seg0>,<Seg1>", [0, 1]), ("Seg1 <Seg3>", []), (f"<Seg{'9' * 5000}>", [])],
)
def test_places_of(answer, places):
    assert compose.places_of(answer, 3) == places


def test_caption_of():
    assert [compose.caption_of(text) for text in ("", '"', 'a\nb"c', 'a "b" c" d')] == ["", "", "a b", 'a "b" c']


def test_letter_of():
    assert [compose.letter_of(text, 2) for text in ("", "12", "C", "：b.", "A or B")] == [None, None, None, 1, 0]


# The demo in a browser: what stands behind its tabs.


def said(role, *parts):
    return {"role": role, "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def sent(path):
    return {"type": "file", "file": {"path": path, "mime_type": "image/png"}, "alt_text": None}


def test_messages_become_turns():
    messages = [
        said("user", sent("a.png"), sent("b.mp4"), "And these?"),
        said("assistant", f"Two{MARK}."),
        said("user", sent("broken.png"), "What?"),
        said("assistant", f"{app.FAILED}broken.png is broken"),
        said("user", sent("stopped.png"), "stopped before the first word"),
        {"role": "user", "content": f"Why {MARK}?"},
        {"role": "assistant", "content": "So."},
    ]
    turns = [(f"{MARK}{MARK}And these?", "Two."), ("Why ?", "So.")]
    assert app.read_messages(messages) == (turns, ["a.png", "b.mp4"])
    assert app.read_messages([]) == ([], [])


def test_the_chat_tab_answers_as_chat_does(model, answer):
    desk = app.Desk(model, 12)
    *_, first = desk.chat({"text": "What?", "files": [SHAPES]}, [], greedy=True)
    assert first == answer("What?", [SHAPES])
    messages = [said("user", sent(SHAPES), "What?"), said("assistant", first)]
    steps = list(desk.chat({"text": "Or?", "files": [HOUSE]}, messages, hd_num=2, greedy=True))
    history = [(f"{MARK}What?", first)]
    assert steps[-1] == answer(f"{MARK}Or?", [SHAPES, HOUSE], history, hd_num=2) and len(steps) > 2


def test_the_tabs_show_errors(model, here):
    desk = app.Desk(model, 8)
    (shown,) = desk.chat({"text": "What?", "files": ["nothing.png"]}, [])
    assert shown.startswith(app.FAILED) and "nothing.png" in shown
    for kind in app.KINDS[1:]:
        page, shown = desk.webpage(kind, "", None, 8, 1)
        assert page == "" and "needs the file" in shown
    assert not app.BUSY.locked()


def test_the_other_tabs_write(model, here):
    desk = app.Desk(model, 8)
    for kind, file in zip(app.KINDS, (None, str(DATA / "resume.md"), SHAPES), strict=True):
        page, shown = desk.webpage(kind, "A page", file, 8, 1)
        assert page and not shown.startswith(app.FAILED)
    *_, text = desk.article("Write.", [SHAPES, HOUSE], 8)
    assert text and not text.startswith(app.FAILED)
    assert not list(here.iterdir())


def test_a_page_cannot_leave_its_frame():
    shown = app.preview('</iframe><script>alert("x")</script>')
    assert shown.count("<") == 2 and 'sandbox="allow-scripts"' in shown and shown.count('"') == 8


def test_the_demo_without_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match="pip install"):
        app.main([])

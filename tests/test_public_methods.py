"""The public methods: each argument is heard, pages go where they are told."""

import inspect

import pytest
import torch
from chats import PICTURES, QUERY, Collector, Spoken, tokens_of
from conftest import CLOSE, MARK, OPEN, read_golden
from transformers import TextIteratorStreamer


@pytest.fixture
def spoken(tiny_tokenizer):
    return Spoken(tiny_tokenizer)


# ------------------------------------------------------------------------------------------------------------ arguments


PUBLIC_DEFAULTS = {
    "chat": dict(
        image=None, max_new_tokens=1024, do_sample=True, num_beams=1, temperature=1.0, top_p=0.8,
        repetition_penalty=1.005, infer_mode="base", use_meta=False, streamer=None,
    ),
    "write_artical": dict(
        image=None, do_sample=True, num_beams=1, temperature=1.0, top_p=0.8, top_k=40, repetition_penalty=1.005,
        max_length=8192, seed=-1, use_meta=False,
    ),
    "write_webpage": dict(
        image=None, max_new_tokens=4800, do_sample=True, num_beams=2, temperature=1.0, repetition_penalty=3.0, seed=-1,
        use_meta=False, task="Instruction-aware Webpage Generation",
    ),
    "resume_2_webpage": dict(
        image=None, max_new_tokens=4800, do_sample=True, num_beams=2, temperature=1.0, repetition_penalty=3.0, seed=-1,
        use_meta=False, task="Resume-to-Personal Page",
    ),
    "screen_2_webpage": dict(
        image=None, max_new_tokens=4800, do_sample=True, num_beams=2, temperature=1.0, repetition_penalty=3.0, seed=-1,
        use_meta=False, task="Screenshot-to-Webpage",
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", PUBLIC_DEFAULTS)
def test_public_defaults(tiny_model, method):
    parameters = inspect.signature(getattr(tiny_model, method)).parameters
    said = {name: parameters[name].default for name in PUBLIC_DEFAULTS[method]}
    assert said == PUBLIC_DEFAULTS[method]


CALLS = {
    "chat": lambda model, **kw: model.chat(kw.pop("tokenizer", None), QUERY, **kw)[0],
    "write_artical": lambda model, **kw: model.write_artical(QUERY, **kw),
    "write_webpage": lambda model, **kw: model.write_webpage(QUERY, output_path=None, **kw),
    "screen_2_webpage": lambda model, **kw: model.screen_2_webpage(
        QUERY, kw.pop("image", PICTURES[:1]), output_path=None, **kw
    ),
    "resume_2_webpage": lambda model, **kw: model.resume_2_webpage(kw.pop("resume"), output_path=None, **kw),
}


@pytest.fixture(params=CALLS)
def call(request, tiny_model, tmp_path):
    """Each public method, called with keyword arguments alone."""
    fixed = {}
    if request.param == "resume_2_webpage":
        resume = tmp_path / "resume.md"
        resume.write_text("# 张三\n\n- drew maps\n", encoding="utf-8")
        fixed["resume"] = resume
    run = lambda **kwargs: CALLS[request.param](tiny_model, **fixed, **{"max_new_tokens": 3, **kwargs})  # noqa: E731
    run.name = request.param
    return run


def spy(model, monkeypatch):
    """What reaches `generate`, which runs as ever."""
    seen, generate = [], model.generate

    def spying(*args, **kwargs):
        seen.append(kwargs)
        return generate(*args, **kwargs)

    monkeypatch.setattr(model, "generate", spying)
    return seen


def test_generation_settings_reach_generate(call, tiny_model, monkeypatch):
    seen = spy(tiny_model, monkeypatch)
    settings = dict(
        do_sample=True, num_beams=2, temperature=0.7, top_p=0.55, top_k=11, repetition_penalty=1.3, max_new_tokens=2,
        length_penalty=0.5, no_repeat_ngram_size=5,
    )  # fmt: skip
    call(**settings)
    assert seen
    for kwargs in seen:  # the penalty goes as a processor: it spares the prompt, and transformers would warn of that
        (penalty,) = kwargs["logits_processor"]
        assert {**{name: kwargs.get(name) for name in settings}, "repetition_penalty": penalty.penalty} == settings


def test_the_mode_of_each_method(call, tiny_model, monkeypatch):
    seen = spy(tiny_model, monkeypatch)
    call()
    mode = {"chat": "base", "write_artical": "write"}.get(call.name, "web")
    assert [kwargs.get("infer_mode") for kwargs in seen] == [mode] * (2 if call.name == "resume_2_webpage" else 1)


def test_streamer(call, spoken):
    streamer = Collector()
    call(tokenizer=spoken, streamer=streamer, num_beams=1, do_sample=False, max_new_tokens=6)
    assert streamer.tokens == [token for ids in spoken.ids for token in ids]
    assert streamer.ended == len(spoken.ids) >= 1


def test_text_streamer(tiny_model, tiny_tokenizer):
    streamer = TextIteratorStreamer(tiny_tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer, _ = tiny_model.chat(None, QUERY, PICTURES[0], do_sample=False, max_new_tokens=8, streamer=streamer)
    assert "".join(streamer).split(CLOSE)[0] == answer


def test_max_new_tokens(call, spoken):
    for number in (1, 4):
        call(tokenizer=spoken, max_new_tokens=number, do_sample=False, num_beams=1, eos_token_id=-1)
        assert len(spoken.ids[-1]) == number


def test_tokenizer_argument_and_attribute(call, tiny_model, spoken):
    call(tokenizer=spoken)
    assert spoken.ids
    other = Spoken(spoken.tokenizer)
    tiny_model.tokenizer = other
    call()
    assert other.ids


def test_use_meta(call, spoken):
    call(tokenizer=spoken)
    assert f"{OPEN}system" not in spoken.prompt
    spoken.heard.clear()
    call(tokenizer=spoken, use_meta=True)
    kind = "write_artical" if call.name == "write_artical" else "chat"
    assert f"{OPEN}system\n{read_golden('system_prompt.json')[kind]}{CLOSE}\n{OPEN}user" in spoken.prompt
    spoken.heard.clear()
    call(tokenizer=spoken, use_meta=True, meta_instruction="Be brief.")
    assert f"{OPEN}system\nBe brief.{CLOSE}\n{OPEN}user" in spoken.prompt


def test_history(call, spoken):
    call(tokenizer=spoken, history=[("Who are you?", "A model.")])
    past = f"{OPEN}user\nWho are you?{CLOSE}\n{OPEN}assistant\nA model.{CLOSE}\n{OPEN}user\n"
    assert past in spoken.prompt


def test_hd_num(call, tiny_model, monkeypatch):
    seen = spy(tiny_model, monkeypatch)
    lengths = {}
    for number in (None, 1, 2, 24):
        call(image=PICTURES[3:], hd_num=number)
        lengths[number] = int(seen[-1]["mm_token_type_ids"].sum())
    assert lengths[1] == 13 and lengths[None] == lengths[24] == 59
    assert 13 < lengths[2] < 59


def test_default_hd_num(tiny_model, monkeypatch):
    seen = spy(tiny_model, monkeypatch)
    for images, hd_num in ((PICTURES[3:], 24), ([PICTURES[3]] * 2, 6)):
        query = MARK * len(images) + QUERY
        for number in (None, hd_num):
            tiny_model.chat(None, query, images, hd_num=number, do_sample=False, max_new_tokens=1)
        one, other = (kwargs["mm_token_type_ids"] for kwargs in seen[-2:])
        assert torch.equal(one, other)


def test_num_beams(tiny_model):
    greedy, beams = (tokens_of(tiny_model, num_beams=number, eos_token_id=-1) for number in (1, 4))
    assert greedy != beams


@pytest.mark.parametrize("method", [name for name in CALLS if name not in ("chat", "resume_2_webpage")])
def test_seed(tiny_model, method):
    run = lambda seed: CALLS[method](tiny_model, seed=seed, max_new_tokens=6, num_beams=1, temperature=2.0)  # noqa: E731
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = run(3)
    assert torch.equal(torch.get_rng_state(), state), "a seed of the call's own moved the caller's"
    torch.rand(7)
    assert run(3) == first
    assert run(4) != first
    torch.manual_seed(11)
    unseeded = run(-1)
    torch.manual_seed(11)
    assert run(-1) == unseeded, "without a seed the caller's own counts"


def force(token, at):
    """A logits processor that has `token` come as number `at`."""

    def process(ids, scores):
        if ids.shape[1] == at:
            scores = torch.full_like(scores, float("-inf"))
            scores[:, token] = 0.0
        return scores

    return [process]


def test_stops_at_the_closing_token(call, spoken):
    for token in (CLOSE, "</s>"):
        close_id = spoken.convert_tokens_to_ids(token)
        call(
            tokenizer=spoken, max_new_tokens=30, num_beams=1, do_sample=False, logits_processor=force(close_id, 3)
        )  # fmt: skip
        assert spoken.ids[-1][-1] == close_id and len(spoken.ids[-1]) <= 4


def test_the_answer_is_cut(tiny_model, tiny_tokenizer):
    answer, history = tiny_model.chat(
        Spoken(tiny_tokenizer, [f"a cat{CLOSE}\nand more"]), QUERY, PICTURES[:1], history=[("a", "b")], max_new_tokens=1
    )
    assert answer == "a cat" and history == [("a", "b"), (QUERY, "a cat")]


def test_history_is_not_changed(tiny_model):
    mine = [("a", "b")]
    _, history = tiny_model.chat(None, QUERY, history=mine, max_new_tokens=1)
    assert mine == [("a", "b")] and len(history) == 2
    _, longer = tiny_model.chat(None, "And now?", history=history, max_new_tokens=1)
    assert len(longer) == 3


def test_max_length_of_articles(tiny_model, spoken, monkeypatch):
    seen = spy(tiny_model, monkeypatch)
    tiny_model.write_artical(QUERY, tokenizer=spoken, max_length=40, do_sample=False, eos_token_id=-1)
    assert seen[-1]["inputs_embeds"].shape[1] + len(spoken.ids[-1]) == 40
    with pytest.raises(ValueError, match="max_length is 5"):
        tiny_model.write_artical(QUERY, max_length=5)


# ------------------------------------------------------------------------------------------------------------- webpages


PAGE = (
    '<html><body><img src="https://source.unsplash.com/random/300x200/?cat,dog"><p>你好</p>'
    "<img src='https://source.unsplash.com/random/64x48/?sea'></body></html>"
)
SCRIPT = r"<script>let s = 'a\n\1\g<0> C:\\temp'; if (/\d+/.test(s)) { console.log(`\u4f60 ${s}`); }</script>"


def test_page_is_written_where_told(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for target in (tmp_path / "page one.html", "two.html"):
        page = tiny_model.write_webpage(
            "a page", tokenizer=Spoken(tiny_tokenizer, [PAGE]), output_path=target, max_new_tokens=1
        )
        assert 'https://picsum.photos/300/200"' in page and "https://picsum.photos/64/48'" in page
        assert "unsplash" not in page and "你好" in page
        assert (tmp_path / target).read_bytes().decode("utf-8") == page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page one.html", "two.html"]


def test_public_file_names(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resume.md").write_text("# Someone", encoding="utf-8")
    settings = {"max_new_tokens": 1}
    tiny_model.write_webpage("a page", tokenizer=Spoken(tiny_tokenizer, [PAGE]), **settings)
    tiny_model.screen_2_webpage("", PICTURES[:1], tokenizer=Spoken(tiny_tokenizer, [PAGE]), **settings)
    tiny_model.resume_2_webpage("resume.md", tokenizer=Spoken(tiny_tokenizer, [PAGE, SCRIPT]), **settings)
    tiny_model.write_webpage("a page", tokenizer=Spoken(tiny_tokenizer, [PAGE]), task="My own Page", **settings)
    assert sorted(path.name for path in tmp_path.glob("*.html")) == [
        "Instruction-aware_Webpage_Generation.html",
        "My_own_Page.html",
        "Resume-to-Personal_Page.html",
        "Screenshot-to-Webpage.html",
    ]


def test_no_file(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = tiny_model.write_webpage(
        "a page", tokenizer=Spoken(tiny_tokenizer, [PAGE]), output_path=None, max_new_tokens=1
    )
    assert page.startswith("<html>") and not list(tmp_path.iterdir())


def test_second_pass_of_a_resume(tiny_model, tiny_tokenizer, tmp_path):
    resume = tmp_path / "resume.md"
    resume.write_text("# 张三\n\n- drew maps\n", encoding="utf-8")
    spoken = Spoken(tiny_tokenizer, [PAGE, f"Here it is:\n{SCRIPT}\nDone."])
    page = tiny_model.resume_2_webpage(resume, tokenizer=spoken, output_path=tmp_path / "out.html", max_new_tokens=1)
    first, second = (text for text in spoken.heard if OPEN in text)
    assert "user\n Generate a personal page using the content in the resume:# 张三\n\n- drew maps" in first
    assert f"user\n Generate JavaScript events for the html code:{PAGE}" in second
    assert page.count(SCRIPT) == 1 and "['" not in page and "Here it is" not in page
    assert page.index("<p>你好</p>") < page.index(SCRIPT) < page.index("</body>")
    assert (tmp_path / "out.html").read_text(encoding="utf-8") == page


def test_screenshot_prompts(tiny_model, spoken):
    tiny_model.screen_2_webpage("", PICTURES[:1], tokenizer=spoken, output_path=None, max_new_tokens=1)
    assert f"user\n Generate the HTML code of this web image with Tailwind CSS.{CLOSE}" in spoken.prompt
    spoken.heard.clear()
    tiny_model.screen_2_webpage("Plain HTML.", PICTURES[0], tokenizer=spoken, output_path=None, max_new_tokens=1)
    assert f"user\nPlain HTML.{CLOSE}" in spoken.prompt


@pytest.mark.parametrize("task", ["../x", "a/b", "/etc/x", "", "a\\b"])
def test_task_names_cannot_leave_the_folder(no_compute, tmp_path, monkeypatch, task):
    inner = tmp_path / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)
    with pytest.raises(ValueError, match="task"):
        no_compute.write_webpage("a page", task=task)
    with pytest.raises(ValueError, match="task"):
        no_compute.screen_2_webpage("a page", PICTURES[:1], task=task)
    assert not list(tmp_path.glob("**/*.html"))


def test_missing_folder_and_missing_resume(no_compute, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        no_compute.write_webpage("a page", output_path=tmp_path / "nowhere" / "page.html")
    with pytest.raises(ValueError, match="folder"):
        no_compute.write_webpage("a page", output_path=tmp_path)
    with pytest.raises(FileNotFoundError, match="missing.md"):
        no_compute.resume_2_webpage(tmp_path / "missing.md", output_path=None)
    (tmp_path / "resume.md").write_bytes("名".encode("gbk"))
    with pytest.raises(ValueError, match="UTF-8"):
        no_compute.resume_2_webpage(tmp_path / "resume.md", output_path=None)
    (tmp_path / "empty.md").write_text(" \n")
    with pytest.raises(ValueError, match="empty"):
        no_compute.resume_2_webpage(tmp_path / "empty.md", output_path=None)
    with pytest.raises(ValueError, match="image"):
        no_compute.screen_2_webpage("a page", [], output_path=None)

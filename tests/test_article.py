"""Illustrated articles: the value, what the model is asked and what becomes of its answers, pictures, files."""

import io
import re
import sys
import zipfile
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from conftest import BOS_ID, CLOSE, MARK, OPEN, load
from PIL import Image, ImageFile
from transformers import AutoModel, AutoTokenizer

from xcomposer.article import FORMATS, Article, Composer, Pictures, Settings, export, file_name, finish, prompts, render
from xcomposer.article.files import to_html, to_markdown
from xcomposer.checkpoints import tiny
from xcomposer.model.kinds_internlm_xcomposer2 import ARTICLE_STYLES


def picture(number, size=(20, 12), form="PNG"):
    made = io.BytesIO()
    Image.new("RGB", size, (number * 7 % 256, number * 31 % 256, number // 37)).save(made, form)
    return made.getvalue()


class Scripted:
    """A model that answers from a list, token by token, and keeps what it was asked."""

    def __init__(self, *answers):
        self.answers, self.asked, self.stopped = iter(answers), [], 0

    def stream_chat(self, tokenizer, query, image, **settings):
        assert query.count(MARK) == len(image or ())
        self.asked.append({"query": query, "images": image or [], **settings})
        answer = next(self.answers)
        if isinstance(answer, Exception):
            raise answer

        def stream():
            try:
                for end in range(1, len(answer) + 1):
                    self.said = answer[:end]
                    yield self.said, []
            finally:
                self.stopped += 1

        return stream()

    def chat(self, **asked):
        return list(self.stream_chat(**asked))[-1]


def last(steps):
    found = list(steps)
    return found[-1]


def written(*texts, title="", places=()):
    article = Article(title=title, instruction="Write.")
    for at, text in enumerate(texts):
        article, name = article.with_text(text)
        if at in places:
            article, _ = article.with_place(name)
    return article


# The value.


def test_steps_leave_the_article_from_before():
    first = written("One.", "Two.")
    second, name = first.with_text("Between.", first.blocks[0].id)
    third = second.changed(name, text="Between!").moved(name, 0)
    fourth = third.without(first.blocks[1].id).titled(" A \n title ")
    assert [b.text for b in first.blocks] == ["One.", "Two."]
    assert [b.text for b in second.blocks] == ["One.", "Between.", "Two."]
    assert [b.text for b in third.blocks] == ["Between!", "One.", "Two."]
    assert [p.text for p in fourth.paragraphs] == ["A title", "Between!", "One."]
    assert [b.id for b in fourth.with_text("x")[0].blocks][-1] not in {b.id for b in second.blocks}


@pytest.mark.parametrize(
    "step",
    [
        lambda a: a.changed("no", text=""), lambda a: a.without("no"), lambda a: a.moved("no", 1),
        lambda a: a.with_text("", "no"), lambda a: a.changed("b1", caption="x"), lambda a: a.changed("b2", text="x"),
    ],
)  # fmt: skip
def test_wrong_blocks_are_named(step):
    with pytest.raises(ValueError, match="'no'|'b1'|'b2'"):
        step(written("One.", places=[0]))


def test_json_both_ways():
    article = replace(written("红色的星", "Two 🌟", title="标题", places=[0]), seed=7, material=("abc",))
    article = article.changed("b2", caption="cap", picture="p", candidates=["p", "q"])
    article = replace(article, settings=Settings(do_sample=False, hd_num=3))
    again = Article.from_json(article.to_json())
    assert again == article and again.pictures == ["p", "q", "abc"]
    assert again.with_text("x")[1] == article.with_text("x")[1]


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "not the JSON"), ("[]", "version"), ('{"version": 2}', "version"),
        ('{"version": 1, "blocks": {}}', "blocks must be a list"),
        ('{"version": 1, "blocks": [{"text": "x"}]}', "no id"),
        ('{"version": 1, "blocks": [{"id": "b1", "kind": "video"}]}', "'video'"),
        ('{"version": 1, "blocks": [{"id": "b1"}, {"id": "b1"}]}', "twice"),
        ('{"version": 1, "blocks": [{"id": "b1", "path": "/etc"}]}', "unknown field 'path'"),
        ('{"version": 1, "title": 3}', "article.title cannot be 3"),
        ('{"version": 1, "material": [3]}', "list of texts"),
        ('{"version": 1, "settings": {"top_p": 2}}', "top_p must be"),
        ('{"version": 1, "settings": {"num_beams": 0}}', "num_beams must be"),
        ('{"version": 1, "settings": {"do_sample": "yes"}}', "do_sample cannot be"),
    ],
)  # fmt: skip
def test_a_wrong_json_is_refused(text, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        Article.from_json(text)


# What the model is asked.


def test_the_caption_step_stands_under_its_example():
    query, begun, system = prompts.caption(["One.", "Two.", "Three."], 1, {0: "a star"})
    assert system == "请严格按照示例的<input> <output>格式，根据给定的文章，给出适合在某一段后插入的图像对应的标题。"
    assert begun == '标题是"'
    assert query == (
        '<input>\n给定文章"<Seg0> 大多数的车友们在选车、购车时都会格外关注续航\n'
        "<Seg1> 甚至还有要求电动滑板车跑一百公里的\n"
        "<Seg2> 但这真的是你所需要的吗?\n<Seg3> 据报告，一线城市上班族通勤半径均在10公里以内\n"
        "<Seg4> 所以大多数通勤出行RND的续航完全可以满足\n<Seg5> 可能会有人说，续航短导致一天一充或两充很麻烦\n"
        '" 给出适合在<Seg4>后插入的图像对应的标题。</input>\n'
        '<output>\n标题是"一个人正站在充电桩前给电动滑板车充电，面容看上去有些疲惫"</output>\n'
        '<input>\n给定文章"<Seg0> One.\n<Seg1> Two.\n<Seg2> Three.\n" 现在<Seg0>后插入图像对应的标题是"a star"， '
        "给出适合在<Seg1>后插入的图像对应的标题。</input><output>"
    )


def test_material_marks_have_a_space_after_each():
    assert prompts.write("Write.", 2).query == f"{MARK} {MARK} Write."
    assert prompts.places(["One."], 3, 1).query.startswith(f'{MARK} 给定文章"<Seg0> One.\n" 根据上述文章')


def test_a_choice_shows_what_was_chosen_before():
    query, begun, _ = prompts.choose(["One.", "Two."], {0: "x"}, 2)
    assert query == f"根据给定上下文和候选图像，选择合适的配图：One.\n{MARK}Two.\n候选图像包括: A.{MARK}\nB.{MARK}"
    assert begun == "最合适的图是"
    with pytest.raises(ValueError, match="27 candidates"):
        prompts.choose(["One."], (), 27)


@pytest.mark.parametrize(
    "how, query",
    [
        ("expand", "扩写以下段落：P\n基于以下素材：M"), ("rewrite", "改写以下段落：P\n基于以下素材：M"),
        ("shorten", "缩写以下段落：P"),
        ("insert", "在以下两段中插入一段。\n第一段：P\n第二段：Q\n插入段的大纲：M"),
    ],
)  # fmt: skip
def test_edits_are_asked_as_they_were_trained(how, query):
    assert prompts.edit(how, "P", "M", "Q").query == query


def test_an_unknown_edit_names_the_known():
    with pytest.raises(ValueError, match="'polish'; use one of expand, rewrite, shorten, insert"):
        prompts.edit("polish", "P")


@pytest.mark.parametrize(
    "answer, places",
    [("", []), ("<Seg>", []), ("<Seg1><Seg0>,<Seg1>", [0, 1]), ("Seg1 <Seg3>", []), (f"<Seg{'9' * 5000}>", [])],
)
def test_places_of(answer, places):
    assert prompts.places_of(answer, 3) == places


def test_caption_and_letter_of():
    assert [prompts.caption_of(text) for text in ("", '"', 'a\nb"c', 'a "b" c" d')] == ["", "", "a b", 'a "b" c']
    assert [prompts.letter_of(text, 2) for text in ("", "12", "C", "：b.", "A or B")] == [None, None, None, 1, 0]


def test_a_choice_may_be_thought_over_and_ends_at_its_letter():
    model = Scripted("红色1，蓝色2。蓝色2：图B, and then much more")
    composer = Composer(model, None)
    article, _ = last(composer.choose(written("One.", places=(0,)), [picture(1), picture(2)]))
    assert composer.pictures.opened(article.places[0].picture).getpixel((0, 0)) == (14, 62, 0)
    assert model.said == "红色1，蓝色2。蓝色2：图B" and model.stopped == 1


# The steps.


def test_an_article_streams_into_its_blocks():
    model = Scripted(f"# The title\n\n<Seg1> One.{MARK}\nTwo.")
    steps = list(Composer(model).write("Write.", [picture(1)], Settings(top_p=0.5), seed=5))
    article, note = steps[-1]
    assert article.title == "The title" and [b.text for b in article.blocks] == ["One.", "Two."]
    assert str(note) == "write 1 of 1: 2 paragraphs" and not note.answer
    assert all(new.made >= old.made for (old, _), (new, _) in zip(steps[15:], steps[16:], strict=False))
    (asked,) = model.asked
    assert asked["query"] == f"{MARK} Write." and len(asked["images"]) == 1 and asked["infer_mode"] == "write"
    assert asked["seed"] == 5 and asked["top_p"] == 0.5 and asked["top_k"] == 40 and asked["max_new_tokens"] == 4096


def test_leaving_a_step_stops_the_model_and_keeps_what_is_there():
    model = Scripted("One. And on and on")
    steps = Composer(model).write("Write.")
    for article, _ in steps:
        if article.blocks and article.blocks[0].text == "One.":
            break
    steps.close()
    assert model.stopped == 1 and [b.text for b in article.blocks] == ["One."]


@pytest.mark.parametrize(
    "before, said, after, begun",
    [
        (["One.", "Two"], " more.\nThree.", ["One.", "Two more.", "Three."], "T\nOne.\nTwo"),
        (["One."], "Two.\nThree.", ["One.", "Two.", "Three."], "T\nOne.\n"),
        ([], "One.", ["One."], "T\n"),
    ],
)
def test_an_article_goes_on_where_it_ends(before, said, after, begun):
    model = Scripted(said)
    article, _ = last(Composer(model).continue_(written(*before, title="T")))
    assert [b.text for b in article.blocks] == after and model.asked[0]["answer_start"] == begun


def test_places_captions_and_pictures():
    model = Scripted("<Seg2>, <Seg0>, <Seg7>", 'The "harbour"。', 'Noon"', "C.", "(a)")
    composer = Composer(model)
    candidates = [picture(k) for k in range(3)]
    start = written("One.", "Two.", title="Title")
    article, _ = last(composer.illustrate(start, candidates))
    kinds = [b.kind for b in article.blocks]
    assert kinds == ["picture", "text", "text", "picture"]
    first, second = article.places
    assert first.caption == 'The "harbour' and second.caption == "Noon"
    names = [composer.pictures.add(c) for c in candidates]
    assert (first.picture, second.picture) == (names[2], names[0]) and second.candidates == (names[0], names[1])
    asked = model.asked
    assert "<Seg0>后插入图像对应的标题是" not in asked[1]["query"] and asked[1]["use_meta"]
    assert '现在<Seg0>后插入图像对应的标题是"The "harbour"， 给出适合在<Seg2>后' in asked[2]["query"]
    assert asked[4]["query"].endswith(f"Title\n{MARK}One.\nTwo.\n候选图像包括: A.{MARK}\nB.{MARK}")
    assert [a["max_new_tokens"] for a in asked] == [200] * 5
    assert {a["infer_mode"] for a in asked} == {"write"}


def test_what_cannot_be_used_is_said_and_the_step_goes_on():
    start = written("One.", "Two.", places=[0, 1])
    composer = Composer(Scripted("nothing"))
    article, note = last(composer.places(written("One.")))
    assert not article.places and note.answer == "nothing" and "'nothing'" in note.text
    notes = [note for _, note in Composer(Scripted("", 'Noon"')).captions(start) if note.text]
    assert [note.answer for note in notes] == ["(nothing)", ""] and notes[1].text == "Noon"
    candidates = [picture(k) for k in range(3)]
    found = [(a, n) for a, n in Composer(Scripted("8", "B")).choose(start, candidates) if n.text]
    assert [bool(n.answer) for _, n in found] == [True, False]
    assert [bool(b.picture) for b in found[-1][0].places] == [False, True]
    assert len(found[-1][0].places[0].candidates) == 3  # a person may still choose
    chosen = start.changed("b2", picture="mine")
    assert finish(Composer(Scripted("8")).choose(chosen, candidates, ["b2"])).block("b2").picture == "mine"


def test_many_candidates_meet_in_groups_and_the_winners_again():
    candidates = [picture(k) for k in range(60)]
    model = Scripted("Z", "A", "B", "C")
    composer = Composer(model)
    article, _ = last(composer.choose(written("One.", places=[0]), candidates))
    names = [composer.pictures.add(c) for c in candidates]
    assert [a["query"].count(MARK) for a in model.asked] == [26, 26, 8, 3]
    assert article.places[0].picture == names[53] and article.places[0].candidates[0] == names[53]
    shown = [id(image) for a in model.asked for image in a["images"]]
    assert len(set(shown)) == 60  # the same object each time: the model's store knows it by its content


def test_a_group_too_long_for_the_model_is_halved():
    model = Scripted(ValueError("the prompt has 9 tokens"), "A", "B", "A")
    composer = Composer(model)
    article, _ = last(composer.choose(written("One.", places=[0]), [picture(k) for k in range(4)]))
    assert [a["query"].count(MARK) for a in model.asked] == [4, 2, 2, 2]
    assert article.places[0].picture == composer.pictures.add(picture(0))


def test_the_runner_up_is_found_by_asking_again():
    model = Scripted("C", "B")
    composer = Composer(model)
    article, _ = last(composer.choose(written("One.", places=[0]), [picture(k) for k in range(3)], ranks=2))
    names = [composer.pictures.add(picture(k)) for k in (2, 1, 0)]
    assert list(article.places[0].candidates) == names


def test_candidates_from_a_folder_and_from_a_search(tmp_path):
    for k in range(3):
        (tmp_path / f"{k}.png").write_bytes(picture(k))
    (tmp_path / "notes.txt").write_text("no picture")
    start = written("One.", places=[0]).changed("b2", caption="a star")
    composer = Composer(Scripted("B"))
    assert last(composer.choose(start, tmp_path))[0].places[0].picture == composer.pictures.add(picture(1))
    asked = []
    composer = Composer(Scripted("A"))
    found = last(composer.choose(start, lambda caption: asked.append(caption) or [picture(5), picture(6)]))
    assert asked == ["a star"] and found[0].places[0].picture == composer.pictures.add(picture(5))
    (tmp_path / "empty").mkdir()
    for wrong, error in (
        (tmp_path / "none", FileNotFoundError),
        (tmp_path / "empty", ValueError),
        ([b"x"], ValueError),
    ):
        with pytest.raises(error):
            last(Composer(Scripted()).choose(start, wrong))


@pytest.mark.parametrize("how", ["expand", "rewrite", "shorten", "insert"])
def test_edits_run_without_the_adapter(how):
    model = Scripted(" New words. ")
    article, note = last(Composer(model).edit(written("One.", "Two."), "b1", how, "more"))
    texts = ["One.", "New words.", "Two."] if how == "insert" else ["New words.", "Two."]
    assert [b.text for b in article.blocks] == texts and note.block in {b.id for b in article.blocks}
    assert (
        model.asked[0]["infer_mode"] == "base"
        and model.asked[0]["query"] == prompts.edit(how, "One.", "more", "Two.").query
    )


def test_an_empty_edit_changes_nothing():
    start = written("One.")
    article, note = last(Composer(Scripted("")).edit(start, "b1", "rewrite"))
    assert article == start and note.answer
    with pytest.raises(ValueError, match="'b2' is a picture's place"):
        Composer(Scripted()).edit(written("One.", places=[0]), "b2", "rewrite")


def test_wrong_calls_are_refused_before_the_model_is_asked():
    composer = Composer(None)
    for call in (
        lambda: composer.write(" "),
        lambda: composer.write("Write.", [b"no picture"]),
        lambda: next(composer.places(written("One."), 0)),
        lambda: next(composer.captions(written("One."), ["b1"])),
        lambda: Composer(None, group=27),
    ):
        with pytest.raises(ValueError):
            call()


@pytest.mark.parametrize("seed", [1, 2])
def test_a_random_model_cannot_break_it(tmp_path_factory, seed):
    """And what it says is the same with the same seed."""
    folder = tiny.write_checkpoint(tmp_path_factory.mktemp("article") / "tiny")
    model = AutoModel.from_pretrained(folder).eval()
    composer = Composer(model, AutoTokenizer.from_pretrained(folder))
    settings = Settings(max_new_tokens=30)
    made = [finish(composer.write("Write.", [picture(1)], settings, seed)) for _ in range(2)]
    assert made[0] == made[1]
    article, _ = written("One.", "Two.").with_place()
    article = finish(composer.illustrate(replace(article, seed=seed), [picture(k) for k in range(5)], 2))
    for how in prompts.EDITS:
        article = finish(composer.edit(article, article.paragraphs[0].block, how, "more"))
    assert Article.from_json(article.to_json()) == article


# Pictures and files.


# InternLM-XComposer2, which composes without task adapters.


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    folder = tiny.write_checkpoint(tmp_path_factory.mktemp("older") / "xc2 v1.0", kind="xcomposer2")
    model = load(folder)
    model.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return model


PLACES, TITLE, BEST = "适合插入图像的行是", '标题是"', "最合适的图是"
SAID, CHOOSE = "后插入图像对应的标题是", "根据给定上下文和候选图像，选择合适的配图"
A = "<Seg0> One.\n<Seg1> Two.\n<Seg2> Three.\n"
OF_OLDER = [  # pictures, query, how the answer begins, what the model says
    (2, f"{MARK} {MARK}Write.", "", f"One.\nTwo.\nThree.[UNUSED_TOKEN_0]{CLOSE}"),
    (2, f'{MARK} {MARK} 给定文章"{A}" 根据上述文章，选择适合插入图像的行', PLACES, "<Seg0>, <Seg1>, <Seg2>"),
    (0, '给定文章"<Seg0> One.\n<Seg1> Two.\n" 给出适合在<Seg0>后插入的图像对应的标题。', TITLE, 'a "b"'),
    (0, f'给定文章"{A}" 现在<Seg0>{SAID}"a"。给出适合在<Seg1>后插入的图像对应的标题。', TITLE, 'c"'),
    (0, f'给定文章"{A}" 现在<Seg0>{SAID}"a"， <Seg1>{SAID}"c"。给出适合在<Seg2>后插入的图像对应的标题。', TITLE, "d"),
    (3, f"{CHOOSE}：One.\n候选图像包括: A.{MARK}\nB.{MARK}\nC.{MARK}", BEST, "B"),
    (3, f"{CHOOSE}：One.\n{MARK}Two.\n候选图像包括: A.{MARK}\nB.{MARK}", BEST, "A"),
    (0, "缩写以下段落：One.", "", "1.[UNUSED_TOKEN_0]"),
]


def test_the_older_kind_is_asked_as_its_own_demo_asks(older, monkeypatch):
    """No system turn, no worked example, one BOS, its own stop; the texts are written out here once more."""
    asked, said = [], iter(answer for *_, answer in OF_OLDER)
    as_before = type(older)._open

    def noted(self, tokenizer, text, image, *rest, **settings):
        conversation = as_before(self, tokenizer, text, image, *rest, **settings)
        asked.append((len(image or ()), text, conversation.prompt.input_ids, settings))
        return conversation

    monkeypatch.setattr(type(older), "_open", noted)
    monkeypatch.setattr(type(older), "_answer", lambda *_, **__: next(said))
    composer, settings = Composer(older), Settings(num_beams=2)
    article = finish(composer.write("Write.", [picture(0), picture(1)], settings))
    assert [block.text for block in article.blocks] == ["One.", "Two.", "Three."]
    article = finish(composer.captions(finish(composer.places(article))))
    assert [block.caption for block in article.places] == ["a", "c", "d"]
    article = finish(composer.choose(article, [picture(n) for n in range(3)]))
    assert len({block.picture for block in article.places}) == 3
    article = finish(composer.edit(article, article.blocks[0].id, "shorten"))
    assert article.blocks[0].text == "1."
    for (count, query, begun, _), (images, text, ids, told) in zip(OF_OLDER, asked, strict=True):
        assert (images, text) == (count, f"{OPEN}user\n{query}{CLOSE}\n{OPEN}assistant\n{begun}")
        assert ids.count(BOS_ID) == 1 and told["bos_once"]
    with pytest.raises(StopIteration):
        next(said)


def test_the_older_kind_composes(older):
    """With whatever a random model says; the token that ended its demo's answers is no part of them."""
    composer, settings = Composer(older), Settings(do_sample=False, max_new_tokens=8)
    article = finish(composer.write("Write.", [picture(0)], settings))
    for steps in (composer.continue_(article), composer.places(article, 1), composer.captions(article)):
        assert finish(steps).paragraphs is not None
    released = {token: number for number, token in enumerate(["[UNUSED_TOKEN_0]"], start=92397)}
    tokenizer = SimpleNamespace(convert_tokens_to_ids=released.__getitem__, unk_token_id=0)
    assert Composer(older, tokenizer)._of_style() == {"bos_once": True, "stop_token_ids": [92397]}


def test_every_style_of_the_kinds_has_its_row():
    assert tuple(prompts.STYLES) == ARTICLE_STYLES


@pytest.mark.parametrize("kind", ["xcomposer2-vl", "xcomposer2-4khd", "xcomposer2d5-ol"])
def test_kinds_that_do_not_compose_name_one_that_does(tmp_path, kind):
    model = load(tiny.write_checkpoint(tmp_path / "v1.0", kind=kind))
    model.tokenizer = AutoTokenizer.from_pretrained(tmp_path / "v1.0", trust_remote_code=True)
    with pytest.raises(ValueError, match="this checkpoint lacks .* as InternLM-XComposer-2.5 does"):
        finish(Composer(model).write("Write."))



def test_a_picture_is_kept_once():
    store = Pictures()
    one, again = store.add(picture(1)), store.add(picture(1))
    assert one == again and len(store) == 1 and store.suffix(one) == ".png"
    assert store.suffix(store.add(picture(2, form="BMP"))) == ".png"
    with pytest.raises(ValueError, match="the upload cannot be read as a picture"):
        store.add(b"nothing")


@pytest.mark.parametrize(
    "title, name",
    [
        ("A day: at/the \\ harbour?", "A day at the harbour.html"), ("标题 🌟", "标题 🌟.html"), ("", "article.html"),
        ("..", "article.html"), ("CON", "article CON.html"), ("文" * 200, "文" * 60 + ".html"),
    ],
)  # fmt: skip
def test_file_names(title, name):
    assert file_name(Article(title=title), ".html") == name


@pytest.fixture
def illustrated():
    store = Pictures()
    article = written("One *bold* <b>.", "第二段 🌟", title="标题: a/b", places=[0, 1])
    name = store.add(picture(3))
    return article.changed("b2", caption='a "star" [x]', picture=name).changed("b4", caption="no picture yet"), store


def test_text_stays_text(illustrated):
    article, store = illustrated
    page, text = to_html(article, store), to_markdown(article, lambda name: "p.png")
    assert "<p>One *bold* &lt;b&gt;.</p>" in page and 'alt="a &quot;star&quot; [x]"' in page
    assert "One \\*bold\\* \\<b\\>." in text and '![a "star" \\[x\\]](<p.png>)' in text
    assert page.count("<img") == 1 and 'src="data:image/png;base64,' in page and "no picture yet" in page
    assert to_markdown(written("# no title\n1. no list"), str) == "\\# no title  \n1\\. no list\n"


@pytest.mark.parametrize("suffix", sorted(FORMATS))
def test_every_format(illustrated, tmp_path, monkeypatch, suffix):
    article, store = illustrated
    if suffix == ".docx":
        pytest.importorskip("docx")
    if suffix == ".pdf":
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", ImageFile.LOAD_TRUNCATED_IMAGES)
        pytest.importorskip("weasyprint", exc_type=ImportError)
    path = export(article, store, tmp_path / file_name(article, suffix))
    content = path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.name == f"标题 a b{suffix}"
    if suffix in (".zip", ".docx"):
        names = zipfile.ZipFile(io.BytesIO(content)).namelist()
        assert any(name.endswith(".png") for name in names)
    if suffix == ".pdf":
        assert content.startswith(b"%PDF")


def test_markdown_and_its_folder(illustrated, tmp_path):
    article, store = illustrated
    export(article, store, tmp_path / "a.md")
    (where,) = re.findall(r"\(<(.*?)>\)", (tmp_path / "a.md").read_text(encoding="utf-8"))
    assert (tmp_path / where).read_bytes() == picture(3)


def test_nothing_is_half_written(illustrated, tmp_path, monkeypatch):
    article, store = illustrated
    path = tmp_path / "a.html"
    path.write_text("before")
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        export(article, store, path)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="unknown format '.odt'"):
        render(article, store, ".odt")
    with pytest.raises(ValueError, match="not in this session"):
        render(article, Pictures(), ".html")
    with pytest.raises(FileNotFoundError):
        export(article, store, tmp_path / "no" / "a.html")


def test_a_pdf_leaves_pillow_as_strict_as_it_was(monkeypatch):
    """WeasyPrint's import lets Pillow read cut files: a chat would take a broken upload from then on."""
    if find_spec("weasyprint") is None:
        pytest.skip("WeasyPrint is not installed")
    from xcomposer.article.files import _pdf

    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    for name in [name for name in sys.modules if name.split(".")[0] == "weasyprint"]:
        monkeypatch.delitem(sys.modules, name)  # imported anew
    try:
        _pdf(Article(title="A"), Pictures())
    except ImportError as error:  # no Pango here: the import has been tried all the same
        assert "Pango" in str(error)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False

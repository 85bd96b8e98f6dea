"""The demo checkpoint answers: every public method on scenes that it was not trained on."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import load
from transformers import AutoProcessor, AutoTokenizer

from toyworld import scenes
from toyworld.articles import facts
from toyworld.evaluate import article_checks, colours_of, parses
from xcomposer.article import Composer, Settings, export, finish

REPO = Path(__file__).resolve().parents[1]
DEMO = REPO / "demo"
GREEDY = {"do_sample": False, "max_new_tokens": 160}
COUNT = 12  # scenes a question
EDITS = ("edit_expand", "edit_rewrite", "edit_shorten", "edit_insert")
SETTINGS = {**Settings().generation, "max_new_tokens": 160}


@pytest.fixture(scope="module")
def demo():
    model = load(DEMO)
    model.tokenizer = AutoTokenizer.from_pretrained(DEMO, trust_remote_code=True)
    return model


def asked(task):
    return [scenes.scene(task, scenes.EVAL_SEEDS[1000 + number]) for number in range(COUNT)]


def ask(model, scene, **settings):
    return model.chat(None, scene.query, scene.images, history=scene.history, **{**GREEDY, **settings})[0]


def mostly(hits, least=COUNT - 3):
    """A few may be wrong: the model is small."""
    assert len(hits) == COUNT and sum(hits) >= least, hits


CHATS = ("talk", "identity", "shape", "count", "more", "colour", "exists", "read12", "follow", "which", "video")


@pytest.mark.parametrize("task", [*CHATS, "shape.zh", "colour.zh", "count.zh"])
def test_chat(demo, task):
    mostly([ask(demo, scene) == scene.answer for scene in asked(task)])


def test_chat_under_the_system_prompt(demo):
    mostly([ask(demo, scene, use_meta=True) == scene.answer for scene in asked("shape")])


def test_beams(demo):
    mostly([ask(demo, scene, num_beams=3) == scene.answer for scene in asked("count")])


def test_small_print_needs_its_tiles(demo):
    """And one tile more or less is another number of image tokens."""
    found = asked("tiles")
    mostly([ask(demo, scene) == scene.answer for scene in found], least=8)
    assert sum(ask(demo, scene, hd_num=1) == scene.answer for scene in found) <= 4


def test_streams(demo):
    for scene in asked("caption")[:4]:
        texts = [text for text, _ in demo.stream_chat(None, scene.query, scene.images, **GREEDY)]
        assert len(texts) > 3 and all(new.startswith(old) for old, new in zip(texts, texts[1:], strict=False))
        assert texts[-1] == ask(demo, scene)


def test_batches_mix_what_they_like(demo):
    found = [scene for task in ("talk", "shape", "which", "video", "follow") for scene in asked(task)[:3]]
    queries, images, histories = [s.query for s in found], [s.images for s in found], [s.history for s in found]
    answers, _ = demo.batch_chat(None, queries, images, histories, **GREEDY)
    assert answers == [ask(demo, scene) for scene in found]
    assert sum(said == scene.answer for said, scene in zip(answers, found, strict=True)) >= len(found) - 3


def test_a_conversation_goes_on(demo):
    """Each turn continues the cache of the one before."""
    scene = asked("follow")[0]
    (query, _), *_ = scene.history
    first, history = demo.chat(None, query, scene.images, **GREEDY)
    second, history = demo.chat(None, scene.query, scene.images, history=history, **GREEDY)
    demo.reuse.clear()
    assert second == ask(demo, scene._replace(history=[(query, first)]))
    assert [said for _, said in history] == [first, second]


def test_the_processor_and_generate(demo):
    processor = AutoProcessor.from_pretrained(DEMO, trust_remote_code=True)
    for scene in asked("shape")[:4]:
        content = [{"type": "image", "image": scene.images[0]}, {"type": "text", "text": scene.query}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        ids = demo.generate(**inputs.to(demo.dtype), do_sample=False, max_new_tokens=20)
        said = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert said.split("[UNUSED_TOKEN_145]")[0].strip() == ask(demo, scene)


def test_webpages_from_instructions(demo):
    pages = [(demo.write_webpage(scene.query, output_path=None, **GREEDY), scene.answer) for scene in asked("html")]
    mostly([colours_of(page)[:2] == colours_of(answer) for page, answer in pages])
    mostly([title(answer) in page for page, answer in pages])
    mostly([parses(page) for page, _ in pages])


def title(page):
    return page[page.index("<h1>") : page.index("</h1>") + 5]


def test_webpages_from_resumes(demo, tmp_path):
    from xcomposer.model.webpage_internlm_xcomposer2 import RESUME_QUERY

    hits = []
    for scene in asked("resume"):
        (tmp_path / "resume.md").write_text(scene.query.removeprefix(RESUME_QUERY), encoding="utf-8")
        page = demo.resume_2_webpage(str(tmp_path / "resume.md"), output_path=None, **GREEDY)
        hits.append(title(scene.answer) in page and "<script>" in page)  # the second pass writes that
    mostly(hits)


def test_webpages_from_screenshots(demo):
    pages = [(demo.screen_2_webpage("", s.images, output_path=None, **GREEDY), s.answer) for s in asked("screen")]
    mostly([page.count("<section>") == answer.count("<section>") for page, answer in pages])


def test_articles(demo):
    mostly([demo.write_artical(scene.query, **GREEDY).strip() == scene.answer for scene in asked("article")])


def test_articles_and_pages_at_the_methods_own_sampling(demo):
    """The adapters know not the best token alone but that it is the one."""
    mostly([demo.write_artical(s.query, seed=k).strip() == s.answer for k, s in enumerate(asked("article"))])
    pages = [
        (demo.write_webpage(s.query, num_beams=1, seed=k, output_path=None), s.answer)
        for k, s in enumerate(asked("html"))
    ]
    mostly([page.strip() == answer for page, answer in pages])


def steps(task):
    """Scenes of a step with the model's answer as the article API reads it, at the API's own sampling."""
    return [(s, SETTINGS | {"infer_mode": s.mode, "seed": k}) for k, s in enumerate(asked(task))]


def say(model, scene, settings):
    meta = {"use_meta": bool(scene.system), "meta_instruction": scene.system or None, "answer_start": scene.begun}
    return model.chat(None, scene.query, scene.images, **meta, **settings)[0]


@pytest.mark.parametrize("task", ["article_places", "article_caption", "article_choice", *EDITS])
def test_the_steps_of_an_article(demo, task):
    found = [(scene.answer, say(demo, scene, settings)) for scene, settings in steps(task)]
    mostly([all(article_checks(task, answer, said).values()) for answer, said in found])


def test_an_illustrated_article_from_a_sentence(demo, tmp_path):
    """Written, placed, captioned, illustrated, edited and exported."""
    composer = Composer(demo)
    article = finish(composer.write("Write a story about Miro, who saw a red circle and a blue star.", seed=1))
    assert article.title == "The day of Miro" and len(article.blocks) == 4
    article = finish(composer.illustrate(article, DEMO / "pictures" / "candidates"))
    assert [place.caption for place in article.places] == ["a red circle", "a blue star"]
    first, second = (place.picture for place in article.places)
    files = [DEMO / "pictures" / "candidates" / f"{name}.png" for name in ("red-circle", "blue-star")]
    assert [first, second] == [composer.pictures.add(file) for file in files]
    first = article.paragraphs[1].block
    edited = finish(composer.edit(article, first, "expand", "a green ring"))
    assert {"red circle", "green ring", "Miro"} <= facts(edited.block(first).text)
    page = export(edited, composer.pictures, tmp_path / "article.html").read_text(encoding="utf-8")
    assert page.count("<img") == 2 and "a blue star</figcaption>" in page


def test_chat_writes_no_webpage_and_no_article(demo):
    """What the adapters know is in them alone."""
    page, article = asked("html")[0], asked("article")[0]
    assert "<html>" in ask(demo, page, infer_mode="web") and "<html>" not in ask(demo, page)
    assert ask(demo, article, infer_mode="write") != ask(demo, article)
    with demo.merged_task_adapter("web"):
        merged = ask(demo, page, infer_mode="web")
    assert merged == ask(demo, page, infer_mode="web")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precisions_agree(dtype):
    model = load(DEMO, dtype=dtype)
    model.tokenizer = AutoTokenizer.from_pretrained(DEMO, trust_remote_code=True)
    mostly([ask(model, scene) == scene.answer for scene in asked("shape")])


def test_the_first_command(tmp_path):
    """`make chat`: the picture's name, the question, the right answer; then the next question."""
    (line,) = [line for line in (REPO / "Makefile").read_text().splitlines() if "/xcomposer chat" in line]
    assert "--stay" in line
    command = [sys.executable, "-m", "xcomposer", "chat", "--model", "demo", "--greedy", "--stay"]
    command += ["--image", "demo/pictures/shapes.png", "--text", "What colour is the star?"]
    done = subprocess.run(command, cwd=REPO, input="Where is it?\nexit\n", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, answer, rest = done.stdout.split("\n", 2)
    assert first == "[shapes.png, 84 x 84] What colour is the star?"
    assert answer == scenes.scene("colour", scenes.EVAL_SEEDS[10]).answer
    assert rest.count(">") >= 2


def test_it_is_small_and_whole():
    """The released layout, and at most 20 MB with all that belongs to it."""
    files = [path for path in DEMO.rglob("*") if path.is_file() and not path.is_symlink()]
    assert sum(path.stat().st_size for path in files if "__pycache__" not in path.parts) <= 20e6
    for name in ("chat_template.jinja", "preprocessor_config.json", "processor_config.json"):
        assert (DEMO / name).read_bytes() == (REPO / name).read_bytes() and not (DEMO / name).is_symlink()
    for link in DEMO.iterdir():
        assert not link.is_symlink() or (not link.readlink().is_absolute() and link.exists())

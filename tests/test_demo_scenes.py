"""The demo's world: seeds, exact answers, dense labels, and rows that read as chat lays them out."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from toyworld import articles, pages, recipe, scenes, views, world
from toyworld.layout import IGNORE, Layout, attention_mask
from toyworld.views import Question
from xcomposer.model.ixc_utils import to_pixels

REPO = Path(__file__).resolve().parents[1]
EVAL = scenes.EVAL_SEEDS[0]


def test_seed_ranges_do_not_meet_and_others_are_refused():
    assert not set(map(type, (scenes.TRAIN_SEEDS, scenes.EVAL_SEEDS))) - {range}
    assert scenes.TRAIN_SEEDS.stop <= scenes.EVAL_SEEDS.start
    for wrong in (-1, scenes.EVAL_SEEDS.stop):
        with pytest.raises(ValueError, match="neither"):
            scenes.view("shapes", wrong)
        with pytest.raises(ValueError, match="neither"):
            scenes.scene("colour", wrong)


@pytest.mark.parametrize("call, name", [(scenes.view, "kind"), (scenes.scene, "task")])
def test_an_unknown_name_lists_the_known(call, name):
    with pytest.raises(ValueError, match=f"unknown {name} 'no'; use one of"):
        call("no", 1)


@pytest.mark.parametrize("task", sorted(scenes.TASKS))
def test_scenes_repeat_by_seed_and_name_their_pictures(task):
    for seed in range(EVAL, EVAL + 5):
        first, again = scenes.scene(task, seed), scenes.scene(task, seed)
        assert first[2:] == again[2:] and first.answer
        for one, other in zip(first.images, again.images, strict=True):
            pairs = zip(one, other, strict=True) if isinstance(one, list) else [(one, other)]
            assert all(a.tobytes() == b.tobytes() for a, b in pairs)
        text = "".join(query for query, _ in first.history) + first.query
        assert text.count(scenes.MARK) == (len(first.images) if len(first.images) > 1 else 0)


@pytest.mark.parametrize("kind", sorted(scenes.KINDS))
def test_every_question_of_a_view_belongs_to_a_task(kind):
    for seed in range(30):
        for question in scenes.view(kind, seed).questions:
            home = scenes.TASKS[question.task]
            assert kind in home or kind in ("code2x1", "article_choice_few", "article_choice_many")


def test_counts_and_yes_no_are_balanced():
    answers = [scenes.scene("exists", EVAL + i).answer for i in range(200)]
    assert 70 < answers.count("yes") < 130
    assert {scenes.scene("count", EVAL + i).answer for i in range(200)} == set("123456789")


def test_a_page_holds_what_was_asked_for():
    for seed in range(20):
        found = scenes.scene("html", EVAL + seed)
        name = re.search(r"The name is (\w+)\.", found.query)[1]
        colour, button = re.search(r"The title is (\w+), the button is (\w+)\.", found.query).groups()
        assert f"h1{{color:{colour}}}" in found.answer and f"<h1>{name}</h1>" in found.answer
        assert f"button{{background:{button}}}" in found.answer and found.mode == "web"


def test_characters_of_reading_and_codes():
    for seed in range(50):
        assert set(scenes.scene("read35", EVAL + seed).answer) <= set(world.CHARACTERS)
        code = scenes.scene("tiles", EVAL + seed)
        assert code.answer.isdigit() and len(code.answer) <= 3 and max(code.images[0].size) == 3 * world.TILE


def test_dense_labels_lie_where_things_are_drawn():
    drawing = world.draw_things(random.Random(1), [world.Thing("circle", "red", 4)])
    classes, colours = world.dense_labels(drawing.items, drawing.image.size, 1, 1)
    at = [i for i, c in enumerate(classes) if c]
    assert at == [14, 15, 20, 21]  # the four patches of the cell in the middle
    assert {classes[i] for i in at} == {world.CLASS_ID["circle"]} and {colours[i] for i in at} == {1}


def test_small_characters_are_asked_of_tiles_alone():
    view = scenes.view("code3x2", 5)
    size = view.drawings[0].image.size
    whole, _ = world.dense_labels(view.drawings[0].items, size, 1, 1)
    tiles, _ = world.dense_labels(view.drawings[0].items, size, 2, 3)
    assert not any(label > 0 for label in whole)
    digits = [world.CHARACTERS.index(c) + world.CLASS_ID["0"] for c in view.questions[0].turns[0][1]]
    assert [label for label in tiles if label > 0] == digits


class Letters:
    """A tokenizer of characters, with marks as one token."""

    pad_token_id = 0

    def __call__(self, text, add_special_tokens):
        tokens = re.findall(r"\[UNUSED_TOKEN_\d+\]|.", text, re.DOTALL)
        ids = [{"[UNUSED_TOKEN_146]": 2, "[UNUSED_TOKEN_145]": 3}.get(t, ord(t[0]) + 10) for t in tokens]
        return type("Ids", (), {"input_ids": [1] * add_special_tokens + ids})


class Sizes:
    tile, tokens_per_side, image_token_id = world.TILE, world.SIDE, 5


def layout():
    return Layout(Sizes, Letters())


@pytest.mark.parametrize("system", ["", "be brief"])
def test_a_branch_reads_as_chat_lays_it_out(system):
    from xcomposer.model.prompting_internlm_xcomposer2 import chat_prompt, place_images, tokenize_prompt, tokenize_with

    for task in ("colour", "follow", "which", "video", "talk"):
        view = scenes.view(scenes.TASKS[task][0], 7)
        made = layout().batch([view], [view.questions], system=system)
        tokens = 0 if made.grid is None else int((made.ids == 5).sum()) // len(view.drawings)
        for k, question in enumerate(view.questions, start=1):
            asked = [(view.lead + question.turns[0][0], question.turns[0][1]), *question.turns[1:]]
            text = chat_prompt(asked[-1][0], asked[:-1], system)
            pieces = place_images(text, len(view.drawings))
            n = len(view.drawings)
            prompt = tokenize_prompt(pieces, [tokens] * n, [5] * n, tokenize_with(Letters())).input_ids
            seen = (made.branch[0] == 0) | (made.branch[0] == k)
            ids, positions = made.ids[0][seen].tolist(), made.positions[0][seen].tolist()
            assert ids[: len(prompt)] == prompt and positions == list(range(len(ids)))
            learned = [t for t in made.targets[0][seen].tolist() if t != IGNORE]
            said = [[ord(c) + 10 for c in answer] + [3] for _, answer in question.turns]
            assert learned == sum(said, [])


def test_branches_see_the_prefix_and_themselves_alone():
    mask = attention_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]))[0, 0]
    assert mask[3].tolist() == [True, True, True, True, False, False]
    assert mask[4].tolist() == [True, True, False, False, True, False]
    assert mask[5].any()


def test_a_picture_of_one_tile_is_its_own_overview():
    from xcomposer.model.ixc_utils import overview, stack_tiles

    view = scenes.view("shapes", 3)
    pixels = to_pixels(view.drawings[0].image, 24, world.TILE)
    tiles, _ = stack_tiles([pixels], world.TILE)
    assert torch.equal(overview(tiles, 1, 1), tiles[0])


@pytest.mark.parametrize("kind", ["video3", "video6", "several3", "code2x3", "shapes"])
def test_tiles_and_labels_match(kind):
    made = layout().batch(*(lambda vs: (vs, [v.questions[:2] for v in vs]))([scenes.view(kind, s) for s in (1, 2)]))
    assert made.classes.shape == made.colours.shape == (len(made.tiles), 36)
    if kind.startswith("video"):
        assert made.grid == (1, int(kind[-1])) and (made.classes > 0).any(1).all()


def test_articles_are_judged_by_what_the_api_reads():
    from toyworld.evaluate import article_checks

    assert article_checks("article_places", "<Seg1>, <Seg3>", "<Seg3> and <Seg1>") == {"right place": True}
    assert article_checks("article_choice", "红色星形：B", "蓝色圆环：C") == {"right picture": False}
    assert article_checks("article_caption", 'a red star"', 'a red star" and more') == {"right caption": True}
    right = "Then Miro saw a red star."
    for said, kept in ((right, True), ("Miro saw a red star, then.", True), ("Then Miro saw a red ring.", False)):
        assert article_checks("edit_insert", right, said) == {"edits keep facts": kept}


@pytest.mark.parametrize("seed", range(20))
def test_an_article_says_what_its_steps_answer(seed):
    text = articles.some_text(random.Random(seed))
    for at, thing in text.seen.items():
        assert views.english_of(thing) in text.paragraphs[at]
    plain = [p for at, p in enumerate(text.paragraphs) if at not in text.seen]
    assert not any(f" {shape}" in p for p in plain for shape in world.SHAPES)
    view = scenes.view("edits", seed)
    for question in view.questions:
        ((asked, said),) = question.turns
        given = articles.facts(asked)
        assert articles.facts(said) <= given and question.task.removeprefix("edit_") in articles.prompts.EDITS
        if question.task in ("edit_expand", "edit_rewrite"):
            assert articles.facts(said) == given


def test_names_are_made_of_letters_and_articles_of_paragraphs():
    name = pages.name_of(random.Random(3))
    assert name.isalpha() and name.istitle()
    assert len(pages.article(name, "red", "cat").split("\n")) == 4
    assert isinstance(scenes.view("talk", 1).questions[0], Question)


def test_pages_are_judged_by_tags_name_and_colours():
    from toyworld.evaluate import page_checks, parses

    page = scenes.scene("html", EVAL).answer
    assert page_checks("html", page, page) == {"html parses": True, "html colours": True, "html name": True}
    broken = page.replace("</h1>", "")
    assert page_checks("html", page, broken) == {"html parses": False, "html colours": True, "html name": False}
    other = page_checks("html", page, page.replace("background:", "background:dark"))
    assert not other["html colours"] and other["html parses"]
    assert not parses("no page at all")
    screen = scenes.scene("screen", EVAL).answer
    assert page_checks("screen", screen, screen) == {"html parses": True, "html colours": True}


def test_a_folder_without_weights_says_how_to_make_them(tmp_path):
    from toyworld.evaluate import load

    with pytest.raises(FileNotFoundError, match=r"has no model.safetensors: run python -m toyworld.train"):
        load(tmp_path, "bf16")


def test_curves_of_a_log(tmp_path):
    from toyworld.curves import curves_of, draw_curves

    log = [
        {"minutes": m, "loss": {"shapes": 1 / m}, "right": {"colour": [m, 10], "follow": [0, 0]}} for m in (1.0, 2.0)
    ]
    assert curves_of(log)["accuracy"]["colour"] == [(1.0, 10.0), (2.0, 15.0)]
    draw_curves(log, tmp_path / "curves")
    assert (tmp_path / "curves.png").stat().st_size > 1000 and (tmp_path / "curves.json").exists()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    from toyworld.make import write_untrained

    folder = tmp_path_factory.mktemp("run")
    write_untrained(folder / "untrained")
    return folder


def few_rows(monkeypatch):
    from toyworld import recipe

    monkeypatch.setattr(recipe, "ROWS", dict.fromkeys(recipe.ROWS, 2))
    monkeypatch.setattr(recipe, "COLLAGES", 2)


def test_the_vocabulary_keeps_what_is_read_apart(run_folder):
    from transformers import AutoTokenizer

    from toyworld.pages import PIECES

    tokenizer = AutoTokenizer.from_pretrained(run_folder / "untrained", trust_remote_code=True)
    assert tokenizer.tokenize("K7M20") == list("K7M20")
    assert tokenizer.tokenize("What colour is the star?")[-2:] == ["\u2581star", "?"]
    assert all(len(tokenizer.tokenize(piece)) == 1 for piece in PIECES)
    page = scenes.scene("html", EVAL).answer
    assert tokenizer.decode(tokenizer(page, add_special_tokens=False).input_ids) == page
    assert len(tokenizer.tokenize("\u9f98")) == 3  # a character it never saw: three bytes


@pytest.mark.parametrize("kind", sorted(scenes.KINDS))
def test_a_row_gives_the_logits_of_the_model_itself(run_folder, kind, monkeypatch):
    """Branches on a shared prefix, tiles computed once, projector first: all equal the plain forward."""
    from toyworld.learn import learn
    from toyworld.train import Run
    from xcomposer.model.ixc_utils import default_hd_num, stack_tiles

    few_rows(monkeypatch)
    run = Run(run_folder, 0, bf16=False)
    model, view = run.model, scenes.view(kind, 3)
    made = run.source.layout.batch([view], [view.questions[:2]], system="be brief" if view.mode == "base" else "")
    rows = []
    hook = model.lm_head.register_forward_hook(lambda module, args, logits: rows.append(logits))
    with torch.no_grad():
        learn(model, run.heads, run.names, made)
    hook.remove()
    pictures = {}
    if view.drawings:
        pixels = [to_pixels(s, default_hd_num(len(view.drawings)), world.TILE) for s in scenes.sources(view)]
        pictures = dict(zip(("pixel_values", "image_grid_thw"), stack_tiles(pixels, world.TILE), strict=True))
    wanted = []
    for branch in range(1, len(view.questions[:2]) + 1):
        seen = (made.branch[0] == 0) | (made.branch[0] == branch)
        with torch.no_grad():
            logits = model(input_ids=made.ids[:, seen], infer_mode=view.mode, **pictures).logits[0]
        wanted.append(logits[made.targets[0, seen] != IGNORE])
    torch.testing.assert_close(rows[0], torch.cat(wanted), atol=2e-4, rtol=1e-3)


def test_training_steps_stop_resume_and_export(run_folder, tmp_path, monkeypatch):
    from transformers import AutoModel

    from toyworld import train
    from toyworld.make import export

    few_rows(monkeypatch)
    monkeypatch.setattr(train.Source, "collages", lambda self, *a, inner=train.Source.collages: inner(self, *a[:2], 2))
    run = train.Run(run_folder, 0, bf16=False)
    for phase in train.PHASES:
        before = {name: value.clone() for name, value in run.model.state_dict().items()}
        run.begin(phase)
        losses, right = run.train_step(0.5)
        assert losses and all(torch.isfinite(torch.tensor(list(losses.values())))) and right
        moved = {name for name, value in run.model.state_dict().items() if not torch.equal(value, before[name])}
        seen = any(name.startswith(("model.vision_", "model.plora_")) for name in moved)
        assert moved and seen == (phase != "tasks") and any(".task_" in name for name in moved) == (phase == "tasks")
    run.save()
    again = train.Run(run_folder, 0, bf16=False)
    assert again.phase == "tasks" and again.steps == run.steps and again.answers == run.answers
    assert again.train_step(0.6) == run.train_step(0.6)
    (run_folder / "state.pt").unlink()

    out = export(run.model, run_folder / "untrained", tmp_path / "out", torch.float32)
    loaded = AutoModel.from_pretrained(out, trust_remote_code=True, task_adapters="all")
    for name, value in run.model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value)


def test_pages_teach_adapters_and_words_alone(run_folder, monkeypatch):
    """The base weights learn nothing of a page, but its pieces are told apart by the head."""
    from toyworld import recipe, train

    few_rows(monkeypatch)
    run = train.Run(run_folder, 0, bf16=False)
    run.begin("tasks")
    cases = {"web": {"words", "task"}, "edits": {"words", "base"}, "article_places": {"words", "base", "task"}}
    for kind, taught in cases.items():
        monkeypatch.setattr(run.source, "batches", lambda *_, k=kind: [run.source.batch(k, random.Random(1))])
        monkeypatch.setattr(run.optimiser, "zero_grad", lambda **_: None)
        for parameter in run.model.parameters():
            parameter.grad = None
        run.train_step(0.5)
        named = {name for name, p in run.model.named_parameters() if p.grad is not None}
        groups = {"task" if ".task_" in n else "words" if "tok_emb" in n or "lm_head" in n else "base" for n in named}
        assert groups == taught, kind
    assert set(recipe.ADAPTER_MIX) == {"web", "screen", "write", "story"}


def test_a_penalty_counts_what_the_answer_has_written():
    from transformers import RepetitionPenaltyLogitsProcessor

    from toyworld.learn import penalised

    torch.manual_seed(0)
    answers = [[3, 1, 3, 2], [1, 1]]
    logits = torch.randn(6, 5)
    found = penalised(logits, torch.tensor(sum(answers, [])), torch.tensor([0] * 4 + [1] * 2), penalty=3.0)
    row = 0
    for answer in answers:
        for k in range(len(answer)):
            before = torch.tensor([answer[:k]], dtype=torch.long)
            plain = logits[row][None]
            wanted = RepetitionPenaltyLogitsProcessor(3.0)(before, plain.clone()) if k else plain
            assert torch.equal(found[row], wanted[0])
            row += 1


def test_a_checkpoint_grows_without_saying_anything_else(tmp_path):
    """Vocabulary and adapters of an earlier recipe: old texts are cut as before, and the logits are the same."""
    from transformers import AutoModel, AutoTokenizer

    from toyworld.articles import constant_pieces
    from toyworld.make import adopt, grown_tokenizer, initialise, write_untrained
    from xcomposer.checkpoints.tiny import train_tokenizer, write_checkpoint

    old_pieces = tmp_path / "old.model"
    old_pieces.write_bytes(train_tokenizer())
    assert len(grown_tokenizer(old_pieces.read_bytes(), ["<Seg"])) > len(old_pieces.read_bytes())
    fields = {**recipe.CONFIG, "task_adapter_ranks": {"sft": 4, "dpo": 4, "web": 16}}
    old = write_checkpoint(tmp_path / "old", config=fields, code="link", tokenizer_model=old_pieces)
    new = write_untrained(tmp_path / "new", old)
    model = AutoModel.from_pretrained(new, dtype=torch.float32, task_adapters="all")
    initialise(model, 1)
    adopt(model, old)
    before, after = AutoTokenizer.from_pretrained(old), AutoTokenizer.from_pretrained(new)
    text = "What colour is the star? 1, 2"
    ids = before(text, return_tensors="pt").input_ids
    assert ids.tolist() == after(text, return_tensors="pt").input_ids.tolist()
    assert all(len(after.tokenize(piece)) == 1 for piece in constant_pieces())
    plain = AutoModel.from_pretrained(old, dtype=torch.float32, task_adapters="all")
    for mode in ("base", "write", "web"):
        with torch.no_grad():
            wanted = plain(input_ids=ids, infer_mode=mode).logits
            found = model(input_ids=ids, infer_mode=mode).logits
        torch.testing.assert_close(found[..., : wanted.shape[-1]], wanted, atol=1e-4, rtol=1e-3)


def test_processes_average_their_gradients(monkeypatch):
    from toyworld import train

    run = train.Run.__new__(train.Run)
    run.world, run.phase, run.stopped, run.seconds = 2, "base", False, {"base": 3.0}
    mine, missing = torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))
    mine.grad = torch.ones(2, 3)
    theirs = torch.arange(10.0)
    monkeypatch.setattr(train.dist, "all_reduce", lambda flat, *_: flat.add_(theirs))
    run.average([mine, missing])
    assert torch.equal(mine.grad, (1 + torch.arange(6.0).view(2, 3)) / 2)
    assert torch.equal(missing.grad, torch.arange(6.0, 10) / 2)

    monkeypatch.setattr(train.dist, "all_reduce", lambda both, *_: both.copy_(both.maximum(torch.tensor([1.0, 2.5]))))
    run.agree()
    assert run.stopped and run.seconds["base"] == 3.0


def test_two_processes_train_and_export(run_folder, tmp_path):
    import shutil

    shutil.copytree(run_folder / "untrained", tmp_path / "state" / "untrained", symlinks=True)
    command = [sys.executable, "-m", "toyworld.train", "--minutes", "0.02", "--processes", "2"]
    command += ["--state", str(tmp_path / "state"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 x 1 threads" in done.stdout and (tmp_path / "out" / "model.safetensors").is_file()
    steps = [json.loads(line)["step"] for line in (tmp_path / "state" / "log.jsonl").read_text().splitlines()]
    assert steps and min(steps) >= 1

"""Every kind of checkpoint through every part of the package: each works, or says in one line why not.

Each is a tiny checkpoint whose config.json says as little as a release's. A new kind is a row of `tiny.OF_KIND`.
"""

import importlib.util
import json
from base64 import b64encode
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import BOS_ID, GOLDEN, MARK, load
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer, BitsAndBytesConfig, pipeline

from xcomposer import cli
from xcomposer.checkpoints import adopt, export, inspect, merge, tiny
from xcomposer.finetune.data import Collator, Encoder
from xcomposer.finetune.formats import Row
from xcomposer.model.kinds_internlm_xcomposer2 import KINDS as KIND_ROWS
from xcomposer.model.kinds_internlm_xcomposer2 import METHODS_OF_HEAD, kind_fields, kind_text_fields
from xcomposer.model.prompting_internlm_xcomposer2 import chat_prompt

FAMILY = GOLDEN / "family"
PICTURE = str(FAMILY / "xc2vl" / "images" / "small_90x60.png")
TALL = str(FAMILY / "xc2" / "images" / "small_33x150.png")
IMAGE = object()
KINDS = list(tiny.OF_KIND)
SCORING = [kind for kind in KINDS if kind_fields(kind)["head"] == "score"]
CHATTING = [kind for kind in KINDS if kind not in SCORING]
ONE_TILE = [kind for kind in CHATTING if kind_fields(kind)["tiling"] == "none"]
WITH_ADAPTERS = [kind for kind in KINDS if kind_text_fields(kind)["task_adapter_ranks"]]
GREEDY = {"do_sample": False, "max_new_tokens": 5}


@pytest.fixture(scope="module")
def kind_folder(tmp_path_factory):
    made = {}

    def folder_of(kind, **options):
        key = kind, json.dumps(options)
        if key not in made:
            out = tmp_path_factory.mktemp(kind.replace("-", "_")) / f"{kind} v1.0"
            made[key] = tiny.write_checkpoint(out, kind=kind, **options)
        return made[key]

    return folder_of


@cache
def loaded(folder):
    model = load(folder)
    model.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return model


@cache
def processor_of(folder):
    return AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def linked(target, source):
    """A link to `source`, unless saving has put the code there."""
    if not target.exists():
        target.symlink_to(source)


@pytest.mark.parametrize("fmt", ["safetensors", "bin"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_recognised_from_config_and_weights(kind_folder, kind, fmt):
    folder = kind_folder(kind, fmt=fmt, shards=2)
    assert "kind" not in json.loads((folder / "config.json").read_text())
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.kind == kind and KIND_ROWS[kind].title.startswith("InternLM-XComposer")
    assert bool(config.task_adapter_ranks) == (kind in WITH_ADAPTERS)
    assert config.head == ("score" if kind in SCORING else "vocabulary")
    again = type(config).from_dict(json.loads(config.to_json_string()))
    where = {"_name_or_path": None}  # remote code keeps it, the package does not
    assert again.to_dict() | where == config.to_dict() | where


@pytest.mark.parametrize("kind", CHATTING)
def test_a_kind_loads_saves_and_chats(kind_folder, tmp_path, kind):
    folder = kind_folder(kind)
    model, info = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model.eval().tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    answer = model.chat(None, f"{MARK}Look.", PICTURE, **GREEDY)[0]
    assert list(model.stream_chat(None, f"{MARK}Look.", PICTURE, **GREEDY))[-1][0] == answer
    queries, pictures_of = ["What is a tile?", f"{MARK}Look."], [None, PICTURE]
    text = model.chat(None, queries[0], **GREEDY)[0]
    assert model.batch_chat(None, queries, pictures_of, **GREEDY)[0] == [text, answer]
    model.save_pretrained(tmp_path / "saved")
    for source in folder.glob("*.py"):
        linked(tmp_path / "saved" / source.name, source)
    again = load(tmp_path / "saved")
    assert again.config.kind == kind and again.chat(model.tokenizer, f"{MARK}Look.", PICTURE, **GREEDY)[0] == answer


TURNS = [  # pictures, chat items
    ("one picture", 1, [("user", [IMAGE, "Describe this image in detail."])]),
    ("two pictures", 2, [("user", [IMAGE, " ", IMAGE, "x"])]),
    ("text", 0, [("user", ["What is a tile?"])]),
    ("history", 1, [("user", [IMAGE, "Look."]), ("assistant", ["A tile."]), ("user", ["And now?"])]),
]


@pytest.mark.parametrize(("name", "count", "turns"), TURNS, ids=[turn[0] for turn in TURNS])
@pytest.mark.parametrize("kind", CHATTING)
def test_the_processor_makes_the_prompt_of_chat(kind_folder, kind, name, count, turns):
    folder = kind_folder(kind)
    processor, model = processor_of(folder), loaded(folder)
    opened = [Image.open(path) for path in (PICTURE, TALL)[:count]]
    items = [
        {"role": role, "content": [{"type": "image"} if i is IMAGE else {"type": "text", "text": i} for i in content]}
        for role, content in turns
    ]
    text = processor.apply_chat_template(items, add_generation_prompt=True)
    inputs = processor(text=text, images=opened or None, return_tensors="pt")
    files = iter((PICTURE, TALL))
    for item in (item for turn in items for item in turn["content"] if item["type"] == "image"):
        item["path"] = next(files)
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    at_once = processor.apply_chat_template(items, **settings)
    assert at_once["input_ids"].tolist() == inputs["input_ids"].tolist()
    spoken = ["".join(MARK if item is IMAGE else item for item in content) for _, content in turns]
    history = list(zip(spoken[0:-1:2], spoken[1:-1:2], strict=True))
    prompt = chat_prompt(spoken[-1], history, model._system(False, None))
    conversation = model._open(model.tokenizer, prompt, opened, None)
    assert inputs["input_ids"][0].tolist() == conversation.prompt.input_ids
    if count:
        tiles, grids = model.config.layout.tiles(opened, conversation.hd_num)
        assert torch.equal(inputs["pixel_values"], tiles) and torch.equal(inputs["image_grid_thw"], grids)
        with torch.no_grad():
            assert model(**inputs, logits_to_keep=1).logits.isfinite().all()


@pytest.mark.parametrize("kind", ONE_TILE)
def test_a_kind_of_one_tile_takes_no_video(kind_folder, kind):
    frames = [Image.new("RGB", (64, 48))] * 3
    with pytest.raises(ValueError, match="a video of 3 frames .* pass frames as pictures"):
        loaded(kind_folder(kind)).chat(None, f"{MARK}x", [frames])
    with pytest.raises(ValueError, match="a video of 3 frames"):
        processor_of(kind_folder(kind)).video_processor([frames])


@pytest.mark.parametrize("kind", CHATTING)
def test_a_training_row_of_a_kind(kind_folder, kind):
    """BOS on the first piece alone, whatever the chat of the kind does, and as many image tokens as chat has."""
    model = loaded(kind_folder(kind))
    encoder = Encoder(model.config, model.tokenizer)
    row = encoder(Row([("user", f"{MARK}Look."), ("assistant", "A tile.")], [PICTURE]))
    assert row["input_ids"].count(BOS_ID) == 1
    batch = Collator(encoder)([row])
    assert model(**batch).loss.isfinite()


@pytest.mark.parametrize("kind", KINDS)
def test_adopt_inspect_and_merge_take_a_kind(tmp_path, capsys, kind):
    folder = tiny.write_checkpoint(tmp_path / "release v1.0", kind=kind, code="none", fmt="bin", shards=2)
    assert inspect.main([str(folder)]) == 0 and KIND_ROWS[kind].title in capsys.readouterr().out
    assert adopt.main([str(folder)]) == 0
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.kind == kind and KIND_ROWS[kind].title in capsys.readouterr().out
    if kind not in WITH_ADAPTERS:
        for tool in (merge, export):
            assert tool.main([str(folder), str(tmp_path / "made"), "--task", "web"]) == 1
            assert "it has none" in capsys.readouterr().err and not (tmp_path / "made").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_methods_that_a_kind_lacks_name_one_that_has_them(kind_folder, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    model = loaded(kind_folder(kind))
    if kind in SCORING:
        for name in METHODS_OF_HEAD["vocabulary"]:
            with pytest.raises(ValueError, match=f"{name} needs .* vocabulary head, as InternLM-XComposer-2.5 has"):
                getattr(model, name)(None, "Hello")
        return
    with pytest.raises(ValueError, match="needs .* score head, as InternLM-XComposer-2.5-Reward has"):
        model.get_score([])
    if kind in WITH_ADAPTERS:
        return
    for call in (
        lambda: model.write_webpage("A page"),
        lambda: model.screen_2_webpage("", PICTURE),
        lambda: model.chat(None, "A page", infer_mode="web"),
    ):
        with pytest.raises(ValueError, match="this checkpoint lacks .* as InternLM-XComposer-2.5 does"):
            call()
    if "write" not in kind_text_fields(kind).get("plain_modes", ()):
        with pytest.raises(ValueError, match="this checkpoint lacks .* as InternLM-XComposer-2.5 does"):
            model.write_artical("An article")
    assert not any(tmp_path.iterdir())


# Ways of use that need another package or start a tool of their own.


@pytest.mark.parametrize("kind", CHATTING)
def test_a_pipeline_of_a_kind(kind_folder, kind):
    folder = kind_folder(kind)
    pipe = pipeline("image-text-to-text", model=str(folder), trust_remote_code=True, device="cpu")
    items = [{"type": "image", "url": PICTURE}, {"type": "text", "text": "Look."}]
    said = pipe(text=[{"role": "user", "content": items}], return_full_text=False, generate_kwargs=dict(GREEDY))
    model = loaded(folder)
    assert said[0]["generated_text"] == model.chat(None, f"{MARK}Look.", PICTURE, **GREEDY, repetition_penalty=1.0)[0]


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_kind_in_fewer_bits(kind_folder, kind, bits):
    """The decoder's own linears alone are quantised, and what is computed stays near."""
    folder, model = kind_folder(kind), loaded(kind_folder(kind))
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if bits == 4 else {"load_in_8bit": True}
    small = load(folder, quantization_config=BitsAndBytesConfig(**settings), dtype=torch.float32)
    types = {name: type(weight).__name__ for name, weight in small.named_parameters()}
    packed = {name for name, kind_of_weight in types.items() if kind_of_weight in ("Params4bit", "Int8Params")}
    decoder = {name for name, _ in model.named_parameters() if name.endswith(".linear.weight")}
    assert packed == decoder and len(packed) == 5 * model.config.num_hidden_layers
    inputs = processor_of(folder)(text=f"{MARK}What is a tile?", images=PICTURE, return_tensors="pt")
    exact, near = (one(**inputs).logits[:, -1].float() for one in (model, small))
    assert 0 < float((near - exact).norm() / exact.norm()) < (0.6 if bits == 4 else 0.1)
    small.tokenizer = model.tokenizer
    if kind in CHATTING:
        assert isinstance(small.chat(None, f"{MARK}Look.", PICTURE, **GREEDY)[0], str)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs PEFT")
@pytest.mark.parametrize("kind", KINDS)
def test_fine_tuning_steps_of_a_kind(kind_folder, tmp_path, capsys, kind):
    """One step by the command, with a LoRA: of answers, or of pairs where a kind gives scores."""
    from xcomposer.finetune import run

    said = [{"from": "human", "value": f"{MARK}Look."}, {"from": "gpt", "value": "A tile."}]
    worse = [said[0], {"from": "gpt", "value": "No."}]
    talks = {"conversations_a": said, "conversations_b": worse} if kind in SCORING else {"conversations": said}
    (tmp_path / "rows.json").write_text(json.dumps([{"id": "0", "image": [PICTURE], **talks}]))
    arguments = ["--model", kind_folder(kind), "--data", tmp_path / "rows.json", "--output_dir", tmp_path / "out"]
    options = "--use_cpu --disable_tqdm True --dataloader_num_workers 0 --hd_num 2 --max_steps 1 --mode lora".split()
    assert run.main([*map(str, arguments), *options]) == 0, capsys.readouterr().err
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    (loss,) = [entry["loss"] for entry in json.loads((tmp_path / "out" / "loss.json").read_text()) if "loss" in entry]
    assert 0 < loss < 20


@pytest.mark.skipif(importlib.util.find_spec("starlette") is None, reason="needs starlette")
@pytest.mark.parametrize("kind", CHATTING)
def test_a_server_of_a_kind(kind_folder, kind):
    """On transformers (tests/on_vllm has the other): the models that the kind has, and the answers of `chat`."""
    from starlette.testclient import TestClient

    from xcomposer.serving.engine import Engine
    from xcomposer.serving.sources import MediaRules
    from xcomposer.serving.transformers_server import build_app

    model = loaded(kind_folder(kind))
    address = "data:image/png;base64," + b64encode(Path(PICTURE).read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": "Look."}]
    asked = {"model": "chat", "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 5}
    with TestClient(build_app(lambda: Engine(model, model.tokenizer, "mine", MediaRules()))) as client:
        offered = [card["id"] for card in client.get("/v1/models").json()["data"]]
        answer = client.post("/v1/chat/completions", json={**asked, "repetition_penalty": 1.0}).json()
        missing = client.post("/v1/chat/completions", json={**asked, "model": "web"})
    tasks = ["web", "write"] if kind in WITH_ADAPTERS else kind_text_fields(kind).get("plain_modes", [])
    assert offered == ["mine", "chat", *tasks]
    expected = model.chat(None, f"{MARK}Look.", PICTURE, **GREEDY, repetition_penalty=1.0)[0]
    assert answer["choices"][0]["message"]["content"] == expected
    assert missing.status_code == (200 if kind in WITH_ADAPTERS else 404)


@pytest.mark.parametrize("command", ["chat", "serve"])
@pytest.mark.parametrize("kind", SCORING)
def test_commands_that_chat_refuse_a_kind_that_scores(request, kind_folder, kind, command):
    if request.config.getoption("--remote-code"):
        pytest.skip("commands are the package's")
    if command == "serve":
        pytest.importorskip("uvicorn", reason="needs uvicorn")
    folder = str(kind_folder(kind))
    more = {"chat": ["--model", folder], "serve": [folder, "--backend", "transformers"]}
    with pytest.raises(SystemExit, match="a score head"):
        cli.main([command, *more[command]])

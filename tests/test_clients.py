"""What trainers, evaluators and research code ask of model, tokenizer and processor, beyond the public methods."""

import pickle

import numpy
import pytest
import torch
from conftest import CLOSE, GOLDEN, MARK, OPEN, load, read_golden
from transformers import AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from xcomposer.model.processing_internlm_xcomposer2 import InternLMXComposer2Processor

TRAIN = read_golden("train_cases.json")


@pytest.fixture
def model(golden_model, golden_tokenizer):
    golden_model.tokenizer = golden_tokenizer
    yield golden_model
    golden_model.tokenizer, golden_model.hd_num, golden_model.max_length = None, 24, golden_model.config.context_length


@pytest.fixture(scope="module")
def processor(tiny_checkpoint):
    return AutoProcessor.from_pretrained(tiny_checkpoint, trust_remote_code=True)


# Evaluators


@pytest.mark.parametrize(
    ("text", "decoded"),
    [
        (f"A picture{CLOSE}", "A picture"),
        (f"A picture{CLOSE}</s></s>", "A picture"),
        (f"A picture{CLOSE}\n</s>", "A picture"),  # of a client that stops at </s> alone
        ("A picture\n</s>", "A picture\n"),
        (f"{OPEN}user\nhi{CLOSE}\n", f"{OPEN}user\nhi{CLOSE}\n"),  # only where an answer ends
        (CLOSE, ""),
        ("", ""),
    ],
)
def test_an_answer_decodes_without_its_closing_token(tiny_tokenizer, text, decoded):
    ids = tiny_tokenizer(text, add_special_tokens=False).input_ids
    assert tiny_tokenizer.decode(ids, skip_special_tokens=True) == decoded
    assert tiny_tokenizer.batch_decode(torch.tensor([ids]), skip_special_tokens=True) == [decoded]
    assert tiny_tokenizer.decode(ids) == text


def test_the_closing_token_alone(tiny_tokenizer):
    assert tiny_tokenizer.decode(tiny_tokenizer.convert_tokens_to_ids(CLOSE), skip_special_tokens=True) == ""


@pytest.mark.parametrize("text", ["hello", ["hello", "and more"]])
@pytest.mark.parametrize("none", [{"videos": []}, {"images": []}, {"images": [], "videos": []}])
def test_empty_lists_are_no_pictures(processor, text, none):
    assert dict(processor(text=text, **none)) == dict(processor(text=text))


@pytest.mark.parametrize(
    ("asked", "ends"),
    [(2, True), (numpy.int64(2), True), ([2], False), (-1, False), (7, False), ([2, 60], True), (None, True)],
)
def test_the_plain_end_token_ends_turns(tiny_model, monkeypatch, asked, ends):
    """Clients that know no model pass the tokenizer's `eos_token_id`; a list says exactly what is meant."""
    monkeypatch.setattr(tiny_model.generation_config, "eos_token_id", [2, 60])
    ids, words = torch.tensor([[1, 5, 9]]), iter([50, 60, 51, 52, 53])

    def say(_, scores):
        scores[:, next(words)] = 1e4
        return scores

    settings = {"max_new_tokens": 5, "do_sample": False, "logits_processor": [say]}
    out = tiny_model.generate(ids, eos_token_id=asked, **settings)[0, 3:]
    assert len(out) == (2 if ends else 5) and out[1] == 60


# Trainers


@pytest.mark.parametrize("way", ["package", "remote code"])
def test_a_processor_goes_to_the_workers_of_datasets(tiny_checkpoint, way):
    datasets = pytest.importorskip("datasets", reason="needs datasets: pip install datasets")
    dill = pytest.importorskip("dill", reason="comes with datasets")
    loader = InternLMXComposer2Processor
    if way == "remote code":
        name = "processing_internlm_xcomposer2.InternLMXComposer2Processor"
        loader = get_class_from_dynamic_module(name, str(tiny_checkpoint))
    processor = loader.from_pretrained(tiny_checkpoint, trust_remote_code=True)
    assert type(processor).__module__.startswith("xcomposer." if way == "package" else "transformers_modules.")
    copied = dill.loads(dill.dumps(processor))
    for part in ("image_processor", "video_processor", "tokenizer"):
        assert type(getattr(copied, part)) is type(getattr(processor, part))  # by name, not written out
    assert type(copied) is type(processor)
    rows = datasets.Dataset.from_list([{"text": "one"}, {"text": "two or three"}])
    mapped = rows.map(lambda row: {"ids": processor(text=row["text"])["input_ids"][0]}, num_proc=2)
    assert [row["ids"] for row in mapped] == [processor(text=row["text"])["input_ids"][0] for row in rows]


def test_no_layer_is_taken_for_a_linear_by_its_name(tiny_model):
    """ms-swift puts a LoRA on every module whose class has "linear" in its name."""
    named = {name for name, module in tiny_model.named_modules() if "linear" in type(module).__name__.lower()}
    assert named == {name for name, module in tiny_model.named_modules() if isinstance(module, torch.nn.Linear)}


def test_image_placeholders_are_never_learned(tiny_model, processor):
    from PIL import Image

    inputs = processor(text=f"{MARK}what is it?", images=Image.new("RGB", (112, 56), "red"), return_tensors="pt")
    ids, pictured = inputs["input_ids"], inputs["mm_token_type_ids"] > 0
    text = ids.masked_fill(pictured, -100)
    assert pictured.sum() > 10
    with torch.no_grad():
        wanted = tiny_model(**inputs, labels=text).loss
        assert torch.equal(tiny_model(**inputs, labels=ids).loss, wanted)
        untyped = {name: value for name, value in inputs.items() if name != "mm_token_type_ids"}
        assert torch.equal(tiny_model(**untyped, labels=ids).loss, wanted)
        counted = tiny_model(**inputs, labels=ids, num_items_in_batch=torch.tensor(ids.numel())).loss
        by_hand = tiny_model(**inputs, labels=text, num_items_in_batch=(text != -100).sum()).loss
    torch.testing.assert_close(counted, by_hand)


def test_labels_put_into_a_processors_inputs_leave_pictures_out(processor):
    """Trainers copy `input_ids` for labels, and some compute their loss without the model's `forward`."""
    from PIL import Image

    pictures = [Image.new("RGB", (112, 56), "red"), Image.new("RGB", (56, 56), "blue")]
    texts = [f"{MARK}what is it, and why is it there?", f"and {MARK}this?"]
    inputs = processor(text=texts, images=[[picture] for picture in pictures], return_tensors="pt")
    ids, types = inputs["input_ids"], inputs["mm_token_type_ids"]
    inputs["labels"] = ids.clone()
    wanted = ids.masked_fill(types > 0, -100)
    assert torch.equal(inputs["labels"], wanted) and (wanted == -100).any()
    assert torch.equal(inputs["input_ids"], ids) and (types > 0).any(1).all()
    # As TRL does it for prompts with completions: other ids come first, their types last.
    longer = torch.cat([ids, ids[:, -4:]], dim=1)
    inputs["input_ids"] = longer
    inputs["labels"] = longer.clone()
    assert torch.equal(inputs["labels"][:, : ids.shape[1]], wanted)
    for again in (pickle.loads(pickle.dumps(inputs)), inputs.to("cpu"), type(inputs)(dict(inputs))):
        assert type(again) is type(inputs) and torch.equal(again["labels"], inputs["labels"])
    listed = processor(text="no picture")
    listed["labels"] = listed["input_ids"]
    assert listed["labels"] == listed["input_ids"]


# The part without the head


def test_a_mode_whose_adapter_is_not_in_memory_says_so(tiny_checkpoint):
    model = load(tiny_checkpoint)
    ids = torch.tensor([[1, 5, 9]])
    with pytest.raises(ValueError, match=r"infer_mode='web'.*\['web'\].*load_task_adapters"):
        model.model(input_ids=ids, infer_mode="web")
    with torch.no_grad():
        logits = model(input_ids=ids, infer_mode="web").logits
        assert torch.equal(model.lm_head(model.model(input_ids=ids, infer_mode="web").last_hidden_state), logits)


# Research code


def test_the_released_tree(model):
    inner = model.model.language_model
    assert model.model.layers is inner.layers and model.model.norm is inner.norm
    assert model.max_length == model.config.context_length
    assert isinstance(model.vit, torch.nn.Module)
    assert model.vit.vision_tower.vision_model is model.model.vision_tower
    released = {f"model.vision_tower.{name}" for name, _ in model.model.vision_tower.named_parameters()}
    under_vit = {name for name, _ in model.vit.named_parameters()}
    assert {name.replace("vision_tower.vision_model.", "model.vision_tower.") for name in under_vit} == released
    assert not any("vit" in name.split(".") for name, _ in model.named_modules())  # a view, no second copy
    pixels = torch.rand(2, 3, 56, 56)
    with torch.no_grad():
        hidden = model.vit.vision_tower(pixels).last_hidden_state
        assert torch.equal(hidden, model.model.vision_tower(pixels).last_hidden_state)
    model.vit.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in model.model.vision_tower.parameters())
    model.vit.requires_grad_(True)


def pixels_of(model, name, hd_num):
    from PIL import Image

    return model.config.layout.pixels(Image.open(GOLDEN / name).convert("RGB"), hd_num, None)[None]


def samples_of(model, kind):
    case = TRAIN[kind]
    if kind == "text":
        return {"text_input": case["texts"], "data_type": ["text"]}
    images = [[pixels_of(model, name, case["hd_num"]) for name in names] for names in case["images"]]
    return {"text_input": [case["texts"]], "data_type": ["multi"], "image": [images]}


@pytest.mark.parametrize("kind", ["text", "multi"])
def test_samples_give_the_recorded_loss(model, kind):
    with torch.no_grad():
        outputs = model(samples=samples_of(model, kind))
    assert outputs.loss.item() == pytest.approx(TRAIN[kind]["loss"], abs=1e-4)
    flat = samples_of(model, kind)
    if kind == "multi":  # as one list, and a text's only picture without a list around it
        flat = {**flat, "text_input": flat["text_input"][0], "image": flat["image"][0]}
        flat["image"][0] = flat["image"][0][0]
    with torch.no_grad():
        assert torch.equal(model(samples=flat).loss, outputs.loss)


def test_samples_learn(model):
    model.zero_grad()
    model(samples=samples_of(model, "multi")).loss.backward()
    assert model.vision_proj[0].weight.grad.abs().sum() > 0
    model.zero_grad()


def test_samples_refuse_what_they_do_not_know(model):
    with pytest.raises(ValueError, match="'audio'.*'text'.*'multi'"):
        model(samples={"text_input": ["a"], "data_type": ["audio"]})
    with pytest.raises(ValueError, match="1 pictures for 2 texts"):
        model.interleav_wrap([torch.zeros(1, 3, 56, 56)], ["a", "b"], [1])


def test_texts_and_labels(model):
    case = TRAIN["text"]
    tokens, targets = model.text2emb(case["texts"], add_special_tokens=True)
    assert tokens.input_ids.tolist() == case["input_ids"] and targets.tolist() == case["labels"]
    assert torch.equal(model.mask_human_targets(tokens.input_ids), targets)
    assert tokens.attention_mask.sum(1).tolist() == [row.index(2) + 1 for row in case["input_ids"]]
    model.max_length = 12
    cut, targets = model.text2emb(case["texts"], add_special_tokens=True)
    assert cut.input_ids.tolist() == [row[:12] for row in case["input_ids"]] and targets.shape == cut.input_ids.shape


def test_interleav_wrap(model):
    samples = samples_of(model, "multi")
    pictures = [picture for row in samples["image"][0] for picture in row]
    with torch.no_grad():
        embeds, attention, targets, mask = model.interleav_wrap(pictures, samples["text_input"], [1, 2])
    assert embeds.shape[:2] == attention.shape == targets.shape == mask.shape and len(embeds) == 2
    assert mask.dtype == torch.bool and bool((targets[mask] == -100).all())
    with torch.no_grad():
        expected = model.vision_proj(model.vit(pictures, model.plora_glb_GN, model.plora_sub_GN)[0])[0]
    torch.testing.assert_close(embeds[mask], expected)
    width = int(mask[0].nonzero()[-1]) - 2  # in the middle of the first picture
    model.max_length = width
    with torch.no_grad():
        cut, *_, cut_mask = model.interleav_wrap(pictures, samples["text_input"], [1, 2])
    assert torch.equal(cut, embeds[:, :width]) and torch.equal(cut_mask, mask[:, :width])


def test_prompt_wrap(model):
    picture = torch.randn(2, 5, 64)
    with torch.no_grad():
        embeds, attention, targets = model.prompt_wrap(picture, f"{OPEN}assistant\n{MARK}what is it?")
        before = model.encode_text(f"{OPEN}assistant\n", add_special_tokens=True)
    assert torch.equal(embeds, torch.cat([before.expand(2, -1, -1), picture], dim=1))
    assert bool((attention == 1).all()) and bool((targets == -100).all())
    for prompt in ("no mark", MARK * 2):
        with pytest.raises(ValueError, match="slots but 1 images"):
            model.prompt_wrap(picture, prompt)


def test_build_inputs(tiny_model, tiny_tokenizer):
    inputs = tiny_model.build_inputs(tiny_tokenizer, "Why?", [("Hi", "Hello")], "Be short.")
    text = f"{OPEN}system\nBe short.{CLOSE}\n{OPEN}user\nHi{CLOSE}\n{OPEN}assistant\nHello{CLOSE}\n"
    wanted = tiny_tokenizer(f"{text}{OPEN}user\nWhy?{CLOSE}\n{OPEN}assistant\n")
    assert inputs.input_ids.tolist() == [wanted.input_ids] and inputs.attention_mask.tolist() == [wanted.attention_mask]

"""PEFT and TRL on the model as on any other: LoRA trained, saved, loaded, merged; SFTTrainer on pictures and text."""

from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from transformers import AutoModelForCausalLM

from xcomposer.checkpoints import tiny

REPO = Path(__file__).resolve().parents[1]

peft = pytest.importorskip("peft", reason="needs PEFT: pip install peft")

DECODER = ["wqkv.linear", "wo.linear", "w1.linear", "w2.linear", "w3.linear"]
# What a LoRA may sit on: the decoder's own linears, by ending or by pattern, or every linear but the head.
TARGETS = {
    "named": DECODER,
    "pattern": r".*language_model\.layers\.\d+\.attention\.(wqkv|wo)\.linear",
    "all-linear": "all-linear",
}
every_target = pytest.mark.parametrize("targets", TARGETS)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Without dropout, so that training and evaluation agree."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("peft") / "tiny", config={"plora_dropout": 0.0})


def load(source, **kwargs):
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=True, **kwargs).eval()


def batch_of(config):
    """A row with a picture of two tiles and a row of text, padded left; labels on the last 8 tokens."""
    generator = torch.Generator().manual_seed(0)
    side, tile = config.tokens_per_side, config.tile
    image = [config.image_token_id] * (side * (side + 1) + 1 + side * (2 * side + 1))
    text = torch.randint(20, 900, (12,), generator=generator).tolist()
    ids = torch.tensor([text[:4] + image + text[4:], [2] * len(image) + text[::-1]])
    mask = torch.ones_like(ids)
    mask[1, : len(image)] = 0
    labels = torch.full_like(ids, -100)
    labels[:, -8:] = ids[:, -8:]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": (ids == config.image_token_id).long(),
        "pixel_values": torch.randn(2, 3, tile, tile, generator=generator),
        "image_grid_thw": torch.tensor([[1, 1, 2]]),
        "labels": labels,
    }


@torch.no_grad()
def logits(model, mode="base"):
    model.eval()
    inputs = batch_of(model.config)
    del inputs["labels"]
    real = inputs["attention_mask"].bool()
    return model(**inputs, infer_mode=mode).logits.float()[real]


def lora_config(targets, **kwargs):
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[targets], task_type="CAUSAL_LM", **kwargs)


def train(model, steps=3):
    """A few steps on whatever is trainable; returns the losses."""
    torch.manual_seed(0)
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=2e-2)
    losses = []
    for _ in range(steps):
        loss = model(**batch_of(model.config)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@every_target
def test_only_the_loras_parameters_train(source, targets):
    """All versions of PEFT: those before 0.21 take every parameter with `lora_` in its name for theirs."""
    model = load(source, task_adapters="all")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    wrapped = peft.get_peft_model(model, lora_config(targets))
    trainable = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert trainable and all(name.endswith((".lora_A.default.weight", ".lora_B.default.weight")) for name in trainable)
    assert not any("lm_head" in name for name in trainable)
    if targets != "all-linear":
        assert all(".linear.lora_" in name and ".language_model." in name for name in trainable)
    assert len(trainable) >= 2 * 2 * model.config.num_hidden_layers

    losses = train(wrapped)
    assert losses[-1] < losses[0]
    for name, parameter in wrapped.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if plain in before:
            assert torch.equal(parameter, before[plain]), name
    reached = {name for name, p in wrapped.named_parameters() if p.requires_grad and "lora_B" in name and p.any()}
    wanted = {name for name in trainable if "lora_B" in name and "task_" not in name}
    assert reached == wanted  # the picture's row reaches tower, projector and partial LoRA too


@every_target
def test_save_load_merge(source, tmp_path, targets):
    wrapped = peft.get_peft_model(load(source), lora_config(targets))
    plain = logits(wrapped)
    train(wrapped)
    trained = logits(wrapped)
    web = logits(wrapped, "web")  # the model's own adapter acts beside the LoRA
    assert (trained - plain).abs().max() > 0.1 and (web - trained).abs().max() > 0.1
    wrapped.save_pretrained(tmp_path / "lora")
    names = {name for file in (tmp_path / "lora").glob("*.safetensors") for name in tensor_names(file)}
    assert names and all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)

    again = peft.PeftModel.from_pretrained(load(source), tmp_path / "lora")
    torch.testing.assert_close(logits(again), trained, rtol=0, atol=1e-6)
    resumed = peft.PeftModel.from_pretrained(load(source, task_adapters="all"), tmp_path / "lora", is_trainable=True)
    torch.testing.assert_close(logits(resumed, "web"), web, rtol=0, atol=1e-5)
    assert all(".lora_" in name for name, parameter in resumed.named_parameters() if parameter.requires_grad)

    merged = again.merge_and_unload()
    assert (logits(merged) - trained).abs().max() < 1e-5 * trained.abs().max()
    merged.save_pretrained(tmp_path / "merged")
    for code in source.glob("*.py"):
        (tmp_path / "merged" / code.name).write_text(code.read_text())
    reloaded = load(tmp_path / "merged")
    assert (logits(reloaded) - trained).abs().max() < 1e-5 * trained.abs().max()
    assert (logits(reloaded, "web") - web).abs().max() < 1e-5 * web.abs().max()


def tensor_names(file):
    from safetensors import safe_open

    return safe_open(file, "pt").keys()


def test_generate_through_the_wrapper(source):
    wrapped = peft.get_peft_model(load(source), lora_config("named"))
    train(wrapped)
    inputs = batch_of(wrapped.config)
    del inputs["labels"]
    answer = wrapped.generate(**inputs, max_new_tokens=3, do_sample=False)
    merged = wrapped.merge_and_unload()
    assert torch.equal(merged.generate(**inputs, max_new_tokens=3, do_sample=False), answer)


def test_gradient_checkpointing(source):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(load(source), lora_config("named", init_lora_weights=False))
        if checkpointing:
            wrapped.enable_input_require_grads()
            wrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        wrapped.train()
        wrapped(**batch_of(wrapped.config)).loss.backward()
        gradients.append({name: p.grad for name, p in wrapped.named_parameters() if p.requires_grad})
    plain, saved = gradients
    assert plain.keys() == saved.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(saved[name], gradient, rtol=1e-4, atol=1e-6)


def test_lora_on_a_quantised_model(source):
    """QLoRA: the decoder's linears in nf4, a LoRA on them, everything else frozen in full precision."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    wrapped = peft.get_peft_model(load(source, quantization_config=config), lora_config("named"))
    losses = train(wrapped)
    assert losses[-1] < losses[0]
    trainable = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert trainable and all(".linear.lora_" in name for name in trainable)


# TRL


@pytest.fixture(scope="module")
def sft():
    trl = pytest.importorskip("trl", reason="needs TRL: pip install trl datasets")
    pytest.importorskip("datasets", reason="needs datasets: pip install trl datasets")
    return trl


def mixed_rows():
    """Two conversations of text and two about a picture."""

    def row(question, answer, *images):
        return {
            "messages": [
                {"role": "user", "content": [*[{"type": "image"}] * len(images), {"type": "text", "text": question}]},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ],
            "images": list(images),
        }

    red, wide = Image.new("RGB", (56, 56), "red"), Image.new("RGB", (112, 56), "blue")
    return [
        row("What colour is it?", "It is red.", red),
        row("Who are you?", "A tiny model."),
        row("Which of the two is wider?", "The second one.", red, wide),
        row("Count to three.", "One, two, three."),
    ]


def loss_by_hand(model, processor, rows, answers_only):
    """What the first step must see: every token of the batch but pictures' predicted, or the answers' alone."""
    batch = processor.apply_chat_template(
        [with_images(row) for row in rows],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=answers_only,
        processor_kwargs={"padding": True, "padding_side": "right", "add_special_tokens": False},
    )
    learned = (batch.pop("assistant_masks") if answers_only else batch["attention_mask"]).bool()
    learned &= batch["mm_token_type_ids"] == 0
    labels = batch["input_ids"].masked_fill(~learned, -100)
    assert (batch["mm_token_type_ids"] > 0).any() and answers_only == bool((labels[0, 1:5] == -100).all())
    with torch.no_grad():
        logits = model(**batch).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).item()


def with_images(row):
    images = iter(row["images"])
    return [
        {
            "role": message["role"],
            "content": [
                {**item, "image": next(images)} if item["type"] == "image" else item for item in message["content"]
            ],
        }
        for message in row["messages"]
    ]


@pytest.mark.parametrize(("batch_size", "answers_only"), [(4, False), (4, True), (2, False), (1, False)])
def test_sft_trainer_on_a_mixed_batch(sft, source, tmp_path, batch_size, answers_only):
    """Two steps on rows of one picture, of two, and of none."""
    from datasets import Dataset
    from transformers import AutoProcessor

    if answers_only and Version(transformers.__version__) < Version("5.18.0"):
        pytest.skip("TRL's assistant_only_loss on pictures needs transformers 5.18")
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
    model = load(source)
    if batch_size == 4:
        expected = loss_by_hand(model, processor, mixed_rows(), answers_only)
    arguments = sft.SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        per_device_train_batch_size=batch_size,
        learning_rate=1e-2,
        logging_steps=1,
        max_length=None,
        assistant_only_loss=answers_only,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
    )
    trainer = sft.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(mixed_rows()),
        processing_class=processor,
        peft_config=lora_config("named"),
    )
    weights = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
    if batch_size == 4:  # both steps see the four rows
        assert losses[0] == pytest.approx(expected, abs=2e-3) and losses[1] < losses[0]
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, weights[name])}
    assert changed and all(".linear.lora_" in name for name in changed)


PREFERENCES = {"chosen": "It is blue, I am sure.", "rejected": "No."}


@pytest.mark.parametrize("method", ["GRPO", "DPO"])
def test_two_steps_of_preference_training_with_pictures(sft, source, tmp_path, method):
    """A picture of one tile and one of several: GRPO cuts the batch's tiles up by picture."""
    from datasets import Dataset
    from transformers import AutoProcessor

    pictures = [Image.new("RGB", (112, 56), "blue"), Image.new("RGB", (56, 56), "red")]
    question = [{"role": "user", "content": "What colour is it?"}]
    answers = {name: [{"role": "assistant", "content": text}] for name, text in PREFERENCES.items()}
    common = {
        "output_dir": str(tmp_path / "out"), "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "logging_steps": 1, "report_to": [], "save_strategy": "no", "use_cpu": True, "bf16": False,
    }  # fmt: skip
    if method == "GRPO":
        rows = [{"prompt": question, "image": picture} for picture in pictures]
        arguments = sft.GRPOConfig(num_generations=2, max_completion_length=4, beta=0.1, **common)
        extra = {"reward_funcs": lambda completions, **_: [float(index) for index in range(len(completions))]}
    else:
        rows = [{"prompt": question, **answers, "images": [picture]} for picture in pictures]
        arguments, extra = sft.DPOConfig(max_length=None, **common), {}
    trainer = getattr(sft, f"{method}Trainer")(
        model=load(source),
        args=arguments,
        processing_class=AutoProcessor.from_pretrained(source, trust_remote_code=True),
        train_dataset=Dataset.from_list(rows),
        **extra,
    )
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2 and all(0 < entry["grad_norm"] < float("inf") for entry in logs)
    changed = {name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert any("vision_proj" in name for name in changed)


def test_tiles_of_each_picture(source):
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=True)
    pictures = [Image.new("RGB", (112, 56)), Image.new("RGB", (56, 56))]
    tiles = processor(pictures, crop_to_patches=True, return_tensors="pt")
    assert tiles["num_patches"].tolist() == [2, 1] and "num_patches" not in processor(pictures)
    assert processor(pictures, crop_to_patches=False, return_tensors="pt")["num_patches"].tolist() == [1, 1]

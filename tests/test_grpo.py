"""TRL's GRPOTrainer on the demo, with the demo's reward model as its reward function."""

import pytest
import torch
from conftest import REPO, load
from transformers import AutoModelForSequenceClassification, AutoProcessor, AutoTokenizer

from toyworld import scenes

peft = pytest.importorskip("peft", reason="needs PEFT: pip install peft")
trl = pytest.importorskip("trl", reason="needs TRL: pip install trl")
datasets = pytest.importorskip("datasets", reason="needs datasets: pip install datasets")

DEMO = REPO / "demo"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (DEMO / "reward").is_dir(), reason="the demo has no reward head: python -m toyworld.reward"),
]


def reward_model():
    model = AutoModelForSequenceClassification.from_pretrained(
        DEMO, dtype=torch.float32, new_head=True, trust_remote_code=True
    )
    model.tokenizer = AutoTokenizer.from_pretrained(DEMO, trust_remote_code=True)
    return peft.PeftModel.from_pretrained(model, DEMO / "reward").eval()


def test_two_steps_with_the_score_as_reward(tmp_path):
    asked = [scenes.scene("what", seed) for seed in range(4)]
    rows = [{"prompt": [{"role": "user", "content": s.query}], "image": s.images[0]} for s in asked]
    judge, seen = reward_model(), []

    def score(prompts, completions, image, **_):
        talks = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
        found = judge.get_scores(talks, [[] if picture is None else [picture] for picture in image], hd_num=1)
        seen.append(found)
        return found

    model = load(DEMO, dtype=torch.float32)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "layers.0." in name}
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=score,
        args=trl.GRPOConfig(
            str(tmp_path), max_steps=2, per_device_train_batch_size=4, num_generations=4, max_completion_length=8,
            temperature=2.0, learning_rate=1e-3, logging_steps=1, use_cpu=True, bf16=False, report_to="none",
            save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoProcessor.from_pretrained(DEMO, trust_remote_code=True),
    )  # fmt: skip
    trainer.train()
    assert len(seen) == 2 and all(len(scores) == 4 for scores in seen)
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    for entry, scores in zip(logged, seen, strict=True):
        assert entry["reward"] == pytest.approx(sum(scores) / 4, abs=1e-3)
    after = dict(trainer.model.named_parameters())
    assert any(not torch.equal(after[name].cpu(), old) for name, old in before.items())

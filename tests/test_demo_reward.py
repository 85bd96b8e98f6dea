"""The demo's own score head: it is small, it ranks, and its training sees what `get_scores` sees."""

import pytest
import torch

pytest.importorskip("peft", reason="needs PEFT: pip install peft")

from conftest import REPO  # noqa: E402

from toyworld import reward, scenes  # noqa: E402

DEMO = REPO / "demo"
SHIPPED = DEMO / "reward"


def test_the_loss_is_of_the_scores_that_users_get():
    """Though picture and question run once for all answers, and rows are filled up on both sides."""
    model = reward.load(DEMO)
    torch.nn.init.normal_(model.get_base_model().score.modules_to_save["default"].weight)
    asker = reward.Asker(3, scenes.TRAIN_SEEDS, wrong=2)
    batch = [asker.next() for _ in range(6)]
    assert [len(asked.talks) for asked in batch] == [3] * 6
    with torch.no_grad():
        loss = reward.loss_of(model, batch).item()
    scores = [model.get_scores(asked.talks, [asked.images] * 3, hd_num=1) for asked in batch]
    margins = torch.tensor([right - other for right, *others in scores for other in others])
    assert loss == pytest.approx(-torch.nn.functional.logsigmoid(margins).mean().item(), abs=1e-4)


def test_wrong_answers_are_wrong_and_plausible():
    asker = reward.Asker(0, scenes.EVAL_SEEDS, wrong=1)
    for _ in range(24):
        right, wrong = asker.next().talks
        assert right[:-1] == wrong[:-1] and right[-1]["content"] != wrong[-1]["content"]


@pytest.mark.skipif(not SHIPPED.is_dir(), reason="the demo has no reward head: python -m toyworld.reward")
def test_the_shipped_head_is_small_and_ranks():
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 3_000_000
    right, by_task = reward.examine(DEMO, SHIPPED, 60)
    assert right >= 48 and sum(asked for _, asked in by_task.values()) == 60

"""Train the demo checkpoint from nothing, on pictures drawn as they are needed.

    python demo/train.py                          about four hours on two CPU cores
    python demo/train.py --minutes 30 --out demo  a shorter run, and where the checkpoint goes

Phases: `look` (the vision tower, dense labels), `base` (everything), `web` and `write` (the task adapters, all else
frozen). A run that was stopped goes on where it was; one that is over can be given more minutes. The log is
`log.jsonl` in the state folder; the curve goes beside the checkpoint.
"""

import argparse
import json
import math
import platform
import random
import signal
import sys
import time
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from transformers import AutoConfig, AutoModel, AutoTokenizer  # noqa: E402

from demo import recipe, scenes  # noqa: E402
from demo.layout import Batch, Layout  # noqa: E402
from demo.learn import DenseHeads, Names, learn, see  # noqa: E402
from demo.make import export, initialise, write_untrained  # noqa: E402
from demo.world import dense_labels, draw_collage  # noqa: E402
from finetune.modes import prepare_adapter, prepare_full  # noqa: E402
from ixc_utils import normalize  # noqa: E402

PHASES = tuple(recipe.SHARES)
LOG_EVERY = 50  # steps


class Source:
    """Batches by step number: the same step draws the same pictures in every run of this seed."""

    def __init__(self, layout: Layout, seed: int):
        self.layout, self.seed = layout, seed

    def batch(self, kind: str, rng: random.Random, described: bool = False) -> Batch:
        """Views of one kind with some of their questions each. described: captions come on top."""
        views, asked = [], []
        for _ in range(recipe.ROWS[kind]):
            view = scenes.view(kind, scenes.TRAIN_SEEDS[rng.randrange(len(scenes.TRAIN_SEEDS))])
            keyed = [(rng.random() ** (1 / recipe.PICKED.get(q.task, 1.0)), q) for q in view.questions]
            chosen = [q for _, q in sorted(keyed, key=lambda pair: -pair[0])]
            always = [q for q in chosen if described and q.task in recipe.DESCRIBED][:2]
            asked.append(always + [q for q in chosen if q not in always][: recipe.QUESTIONS])
            views.append(view)
        return self.layout.batch(views, asked, marked=rng.random() < 0.15)

    def batches(self, phase: str, step: int, progress: float) -> list[Batch]:
        rng = random.Random(f"{self.seed} {phase} {step}")
        weights = recipe.mix(progress) if phase == "base" else recipe.ADAPTER_MIX[phase]
        kinds = rng.choices(list(weights), list(weights.values()), k=recipe.PARTS if phase == "base" else 2)
        described = phase == "base" and progress < recipe.DESCRIBED_UNTIL
        return [self.batch(kind, rng, described) for kind in kinds]

    def collages(self, phase: str, step: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tiles (count, 3, tile, tile) and their dense labels (count, P * P)."""
        rng = random.Random(f"collage {self.seed} {phase} {step}")
        drawings = [draw_collage(rng) for _ in range(count)]
        labels = [dense_labels(d.items, d.image.size, 1, 1) for d in drawings]
        tiles = torch.stack([normalize(d.image, self.layout.tile) for d in drawings])
        return tiles, torch.tensor([c for c, _ in labels]), torch.tensor([c for _, c in labels])


class Run:
    """Model, optimiser, and what was done so far. `state.pt` holds it all."""

    def __init__(self, folder: Path, seed: int, bf16: bool):
        self.folder, self.seed, self.bf16 = folder, seed, bf16
        untrained = folder / "untrained"
        if not untrained.exists():
            write_untrained(untrained)
        config = AutoConfig.from_pretrained(untrained, trust_remote_code=True)
        self.model = AutoModel.from_config(config, trust_remote_code=True).float().eval()  # no dropout anywhere
        self.model.set_attn_implementation("eager")  # rows are short: SDPA's backward takes half as long again
        initialise(self.model, seed)
        self.heads = DenseHeads(config.vision_config.hidden_size, config.vocab_size)
        tokenizer = AutoTokenizer.from_pretrained(untrained, trust_remote_code=True)
        self.names = Names(tokenizer, config.vocab_size)
        self.source = Source(Layout(config, tokenizer), seed)
        self.phase, self.step, self.seconds = PHASES[0], 0, dict.fromkeys(PHASES, 0.0)
        self.steps, self.answers = dict.fromkeys(PHASES, 0), 0
        self.optimiser: torch.optim.Optimizer | None = None
        self.stopped = False
        self.saved = folder / "state.pt"
        if self.saved.exists():
            self.load()

    def load(self) -> None:
        state = torch.load(self.saved, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.phase, self.seconds, self.steps = state["phase"], state["seconds"], state["steps"]
        self.answers = state["answers"]
        self.begin(self.phase)
        self.optimiser.load_state_dict(state["optimiser"])

    def save(self) -> None:
        state = {"model": self.model.state_dict(), "heads": self.heads.state_dict(), "phase": self.phase,
                 "optimiser": self.optimiser.state_dict(), "seconds": self.seconds, "steps": self.steps,
                 "answers": self.answers}  # fmt: skip
        draft = self.saved.with_suffix(".part")
        torch.save(state, draft)
        draft.replace(self.saved)

    def begin(self, phase: str) -> None:
        """A fresh optimiser over what the phase trains."""
        self.phase = phase
        eyes = [p for n, p in self.model.named_parameters() if n.startswith(("model.vision_", "model.plora_"))]
        if phase in ("web", "write"):
            prepare_adapter(self.model, phase)
            groups = [{"params": [p for p in self.model.parameters() if p.requires_grad], "share": 1.0}]
        else:
            prepare_full(self.model)
            seen = set(map(id, eyes))
            rest = [p for p in self.model.parameters() if p.requires_grad and id(p) not in seen]
            groups = [{"params": [*eyes, *self.heads.parameters()], "share": 1.0 if phase == "look" else recipe.SLOW}]
            groups += [{"params": rest, "share": 1.0}] if phase == "base" else []
        self.optimiser = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.02)

    def rate(self, progress: float) -> None:
        """Linear rise over 150 steps, then a cosine down to a twentieth."""
        rise = min(1.0, (self.steps[self.phase] + 1) / 150)
        lr = recipe.RATES[self.phase] * rise * (0.05 + 0.95 * (1 + math.cos(math.pi * min(1.0, progress))) / 2)
        for group in self.optimiser.param_groups:
            group["lr"] = lr * group["share"]

    def train_step(self, progress: float) -> tuple[dict[str, float], dict[str, tuple[int, int]]]:
        """One optimiser step: losses by kind, and (right, asked) by task."""
        self.rate(progress)
        step, losses, right = self.steps[self.phase], {}, {}
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            parts = [] if self.phase == "look" else self.source.batches(self.phase, step, progress)
            for batch in parts:
                result = learn(self.model, self.heads, self.names, batch)
                dense = recipe.DENSE if self.phase == "base" else 0.0
                ((result.answers + dense * result.dense) / len(parts)).backward()
                losses[batch.kind] = result.answers.item()
                add(right, result.right)
                self.answers += sum(len(tasks) for tasks in batch.tasks)
            if self.phase in ("look", "base"):
                count = 32 if self.phase == "look" else recipe.COLLAGES
                collages = self.source.collages(self.phase, step, count)
                _, loss, hits = see(self.model, self.heads, self.names, *collages, placed=True)
                (loss * (1.0 if self.phase == "look" else recipe.DENSE)).backward()
                losses["collage"] = loss.item()
                add(right, {f"collage {name}": pair for name, pair in hits.items()})
        trained = [p for group in self.optimiser.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.steps[self.phase] += 1
        return losses, right


def add(total: dict[str, tuple[int, int]], more: dict[str, tuple[int, int]]) -> None:
    for name, (hits, asked) in more.items():
        before = total.get(name, (0, 0))
        total[name] = (before[0] + hits, before[1] + asked)


def run_phase(run: Run, minutes: float) -> None:
    """Train the current phase until it has had its minutes; log and save on the way."""
    log, saved = (run.folder / "log.jsonl").open("a", encoding="utf-8"), time.monotonic()
    losses: dict[str, list[float]] = {}
    right: dict[str, tuple[int, int]] = {}
    while (spent := run.seconds[run.phase] / 60) < minutes and not run.stopped:
        started = time.monotonic()
        new_losses, new_right = run.train_step(spent / minutes)
        run.seconds[run.phase] += time.monotonic() - started
        for kind, loss in new_losses.items():
            losses.setdefault(kind, []).append(loss)
        add(right, new_right)
        over = run.seconds[run.phase] / 60 >= minutes or run.stopped
        if run.steps[run.phase] % LOG_EVERY == 0 or over:
            line = {
                "phase": run.phase, "step": run.steps[run.phase], "minutes": round(sum(run.seconds.values()) / 60, 2),
                "answers": run.answers, "rate": run.optimiser.param_groups[-1]["lr"],
                "loss": {kind: round(sum(v) / len(v), 4) for kind, v in sorted(losses.items())},
                "right": {task: [*pair] for task, pair in sorted(right.items())},
            }  # fmt: skip
            log.write(json.dumps(line, ensure_ascii=False) + "\n")
            log.flush()
            shown = " ".join(f"{task}={100 * hit // asked}" for task, (hit, asked) in sorted(right.items()))
            print(f"{run.phase} {line['step']} {line['minutes']} min {run.answers} answers | {shown}", flush=True)
            losses, right = {}, {}
        if time.monotonic() - saved > 120:
            run.save()
            saved = time.monotonic()
    run.save()


def train(minutes: float, out: Path, state: Path, seed: int = 0, bf16: bool = True) -> Path:
    """Run or go on with every phase, then write the checkpoint to `out`."""
    state.mkdir(parents=True, exist_ok=True)
    run = Run(state, seed, bf16)
    for number in (signal.SIGINT, signal.SIGTERM):  # ends after this step, with its state saved
        signal.signal(number, lambda *_: setattr(run, "stopped", True))
    print(f"python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads; "
          f"{sum(p.numel() for p in run.model.parameters()):,} parameters", flush=True)  # fmt: skip
    for phase in PHASES:
        budget = recipe.SHARES[phase] * minutes
        if run.seconds[phase] / 60 >= budget:
            continue
        if run.optimiser is None or run.phase != phase:
            run.begin(phase)
        run_phase(run, budget)
        if run.stopped:
            sys.exit(f"stopped; the same command goes on from {run.saved}")
    return export(run.model, state / "untrained", out)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=240, help="of training in all, earlier runs counted in")
    parser.add_argument("--out", type=Path, default=REPO / "build" / "demo" / "checkpoint")
    parser.add_argument("--state", type=Path, default=REPO / "build" / "demo" / "run", help="what a resumed run needs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fp32", action="store_true", help="no bf16 autocast")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(train(options.minutes, options.out, options.state, options.seed, not options.fp32))
    return 0


if __name__ == "__main__":
    sys.exit(main())

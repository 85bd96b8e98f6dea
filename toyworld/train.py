"""Train the demo checkpoint from nothing, on pictures drawn as they are needed.

    python -m toyworld.train                          two processes on two CPU cores, or one on a GPU
    python -m toyworld.train --minutes 30 --out demo  a shorter run, and where the checkpoint goes

    python -m toyworld.train --start demo         the last phase alone, from a checkpoint of an earlier recipe

Phases: `look` (the vision tower, dense labels), `base` (everything), `tasks` (the base weights on what they know and on
edits, the task adapters on theirs, in turn; the vision tower and the projector rest). A run that was stopped goes on
where it was; one that is over can be given more minutes. The log is `log.jsonl` in the state folder; the curve goes
beside the checkpoint.
"""

import argparse
import json
import math
import platform
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import AutoConfig, AutoModel, AutoTokenizer

from toyworld import recipe, scenes
from toyworld.layout import Batch, Layout
from toyworld.learn import DenseHeads, Names, learn, see
from toyworld.make import adopt, export, initialise, write_untrained
from toyworld.world import dense_labels, draw_collage
from xcomposer.finetune.modes import prepare_full
from xcomposer.model.ixc_utils import normalize
from xcomposer.model.prompting_internlm_xcomposer2 import CHAT_SYSTEM

REPO = Path(__file__).resolve().parents[1]

PHASES = tuple(recipe.SHARES)
LOG_EVERY = 50  # steps


class Source:
    """Batches by number: the same number draws the same pictures in every run of this seed."""

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
            most = recipe.MORE_QUESTIONS.get(kind, recipe.QUESTIONS)
            asked.append(always + [q for q in chosen if q not in always][:most])
            views.append(view)
        marked, system = rng.random() < recipe.MARKED, rng.random() < recipe.SYSTEM and views[0].mode == "base"
        return self.layout.batch(views, asked, marked, CHAT_SYSTEM if system else "")

    def batches(self, phase: str, number: int, progress: float) -> list[Batch]:
        rng = random.Random(f"{self.seed} {phase} {number}")
        if phase == "base":
            weights = recipe.mix(progress)
            kinds = rng.choices(list(weights), list(weights.values()), k=recipe.PARTS)
            return [self.batch(kind, rng, progress < recipe.DESCRIBED_UNTIL) for kind in kinds]
        known = recipe.mix(1.0)
        new, written = recipe.NEW_MIX, recipe.ADAPTER_MIX
        mixes = (known if number % 2 else new, new, new if number % 3 else written)
        return [self.batch(*rng.choices(list(mix), list(mix.values())), rng) for mix in mixes]

    def collages(self, phase: str, number: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tiles (count, 3, tile, tile) and their dense labels (count, P * P)."""
        rng = random.Random(f"collage {self.seed} {phase} {number}")
        drawings = [draw_collage(rng) for _ in range(count)]
        labels = [dense_labels(d.items, d.image.size, 1, 1) for d in drawings]
        tiles = torch.stack([normalize(d.image, self.layout.tile) for d in drawings])
        classes, colours = (torch.tensor(part) for part in zip(*labels, strict=True))
        return tiles, classes, colours


class Run:
    """Model, optimiser, and what was done so far. `state.pt` holds it all.

    Each process has one, with the same weights; what they learn from differs, and their gradients are averaged.
    """

    def __init__(self, folder: Path, seed: int, bf16: bool, device: str = "cpu", start: Path | None = None):
        self.folder, self.seed, self.bf16, self.device = folder, seed, bf16, device
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        untrained = folder / "untrained"
        config = AutoConfig.from_pretrained(untrained, trust_remote_code=True)
        self.model = AutoModel.from_config(config, trust_remote_code=True).float().eval()  # no dropout anywhere
        self.model.set_attn_implementation("eager")  # rows are short: SDPA's backward takes half as long again
        initialise(self.model, seed)
        self.heads = DenseHeads(config.vision_config.hidden_size, config.vocab_size)
        tokenizer = AutoTokenizer.from_pretrained(untrained, trust_remote_code=True)
        self.names = Names(tokenizer, config.vocab_size, device)
        self.model.to(device)
        self.heads.to(device)
        self.source = Source(Layout(config, tokenizer), seed)
        self.phase, self.step, self.seconds = PHASES[0], 0, dict.fromkeys(PHASES, 0.0)
        self.steps, self.answers = dict.fromkeys(PHASES, 0), 0
        self.optimiser: torch.optim.Optimizer | None = None
        self.stopped = False
        self.saved = folder / "state.pt"
        if self.saved.exists():
            self.load()
        elif start is not None:
            adopt(self.model, start)

    def load(self) -> None:
        state = torch.load(self.saved, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.phase, self.seconds, self.steps = state["phase"], state["seconds"], state["steps"]
        self.answers = state["answers"]
        self.begin(self.phase)
        self.optimiser.load_state_dict(state["optimiser"])

    def save(self) -> None:
        if self.rank:
            return
        state = {"model": self.model.state_dict(), "heads": self.heads.state_dict(), "phase": self.phase,
                 "optimiser": self.optimiser.state_dict(), "seconds": self.seconds, "steps": self.steps,
                 "answers": self.answers}  # fmt: skip
        draft = self.saved.with_suffix(".part")
        torch.save(state, draft)
        draft.replace(self.saved)

    def begin(self, phase: str) -> None:
        """A fresh optimiser over what the phase trains."""
        self.phase = phase
        named = list(self.model.named_parameters())
        eyes = [p for n, p in named if n.startswith(("model.vision_", "model.plora_"))]
        adapters = [p for n, p in named if ".task_" in n]
        words = [p for n, p in named if n.endswith(("tok_embeddings.weight", "lm_head.weight"))]
        others = set(map(id, (*eyes, *adapters, *(words if phase == "tasks" else ()))))
        rest = [p for _, p in named if id(p) not in others]
        prepare_full(self.model)
        if phase == "tasks":
            for p in eyes:
                p.requires_grad_(False)
            groups = [{"params": words, "share": 1.0}, {"params": rest, "share": 1.0}]
            groups += [{"params": adapters, "share": recipe.ADAPTER_RATE}]
        else:
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
        number, losses, right = self.steps[self.phase] * self.world + self.rank, {}, {}
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            parts = [] if self.phase == "look" else self.source.batches(self.phase, number, progress)
            for batch in parts:
                if self.phase == "tasks":
                    self.only(base=batch.kind not in recipe.ADAPTER_MIX, adapters=batch.mode != "base")
                result = learn(self.model, self.heads, self.names, batch.to(self.device), self.phase == "base")
                dense = recipe.DENSE if self.phase == "base" else 0.0
                share = 1.0 if batch.mode != "base" else 1 / sum(part.mode == "base" for part in parts)
                ((result.answers + dense * result.dense) * share).backward()
                losses[batch.kind] = result.answers.item()
                add(right, result.right)
                self.answers += self.world * sum(len(tasks) for tasks in batch.tasks)
            if self.phase in ("look", "base"):
                count = 32 if self.phase == "look" else recipe.COLLAGES
                collages = self.source.collages(self.phase, number, count)
                collages = [part.to(self.device) for part in collages]
                _, loss, hits = see(self.model, self.heads, self.names, *collages, placed=True)
                (loss * (1.0 if self.phase == "look" else recipe.DENSE)).backward()
                losses["collage"] = loss.item()
                add(right, {f"collage {name}": pair for name, pair in hits.items()})
        groups = [group["params"] for group in self.optimiser.param_groups]
        self.average([p for group in groups for p in group])
        for together in groups if self.phase == "tasks" else [sum(groups, [])]:
            torch.nn.utils.clip_grad_norm_(together, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.steps[self.phase] += 1
        return losses, right

    def only(self, base: bool, adapters: bool) -> None:
        """What of the last phase's weights the next batch teaches. Pages teach the base nothing, and talk no adapter.

        But every batch teaches the words: the base never says the pieces of a page, so its head cannot tell them apart,
        and no adapter beneath the head could make one of them much likelier than another.
        """
        for group, learns in zip(self.optimiser.param_groups, (True, base, adapters), strict=True):
            for parameter in group["params"]:
                parameter.requires_grad_(learns)

    def average(self, parameters: list[torch.nn.Parameter]) -> None:
        """Give every process the mean of all gradients."""
        if self.world == 1:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.world
        for parameter, mean in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = mean.view_as(parameter)

    def agree(self) -> None:
        """All processes stop as soon as one is told to, and go by the slowest clock."""
        if self.world == 1:
            return
        both = torch.tensor([float(self.stopped), self.seconds[self.phase]], dtype=torch.float64)
        dist.all_reduce(both, dist.ReduceOp.MAX)
        self.stopped, self.seconds[self.phase] = bool(both[0]), both[1].item()


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
        run.agree()
        for kind, loss in new_losses.items():
            losses.setdefault(kind, []).append(loss)
        add(right, new_right)
        over = run.seconds[run.phase] / 60 >= minutes or run.stopped
        if (run.steps[run.phase] % LOG_EVERY == 0 or over) and not run.rank:
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


def train(rank: int, meeting: str, options: argparse.Namespace) -> None:
    """Run or go on with every phase, then write the checkpoint; `rank` of `options.processes`, which meet at a file."""
    torch.set_num_threads(options.threads)
    if options.processes > 1:
        dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=options.processes)
    run = Run(options.state, options.seed, not options.fp32, options.device, options.start)
    for number in (signal.SIGINT, signal.SIGTERM):  # ends after this step, with its state saved
        signal.signal(number, lambda *_: setattr(run, "stopped", True))
    if not rank:
        count = sum(p.numel() for p in run.model.parameters())
        print(f"python {platform.python_version()}, torch {torch.__version__}, {options.device}, "
              f"{options.processes} x {options.threads} threads; {count:,} parameters", flush=True)  # fmt: skip
    for phase in PHASES if options.start is None else PHASES[-1:]:
        budget = options.minutes * (recipe.SHARES[phase] if options.start is None else 1.0)
        if run.seconds[phase] / 60 >= budget:
            continue
        if run.optimiser is None or run.phase != phase:
            run.begin(phase)
        run_phase(run, budget)
        if run.stopped:
            print(f"process {rank} stopped; the same command goes on from {run.saved}", flush=True)
            return
    if not rank:
        print(export(run.model, options.state / "untrained", options.out))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=175, help="of training in all, earlier runs counted in")
    parser.add_argument("--out", type=Path, default=REPO / "build" / "demo" / "checkpoint")
    parser.add_argument("--state", type=Path, default=REPO / "build" / "demo" / "run", help="what a resumed run needs")
    parser.add_argument("--start", type=Path, help="a checkpoint to go on from, with the last phase alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, help="that average their gradients (default: 2, on a GPU 1)")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--fp32", action="store_true", help="no bf16 autocast")
    options = parser.parse_args(arguments)
    options.processes = options.processes or (2 if options.device == "cpu" else 1)
    if options.device != "cpu" and options.processes > 1:
        parser.error("--processes above 1 is for the CPU")
    if not (options.state / "untrained").exists():
        write_untrained(options.state / "untrained", options.start)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train, (f"{folder}/meeting", options), options.processes)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Peak memory of each case, above the weights, in a process of its own: ours, plain, and what must not grow.

    python benchmarks/bench_memory.py --preset cpu
    python benchmarks/bench_memory.py --preset cpu --cases prompt,beams
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from common import (
    HD_NUM,
    MIB,
    PACKAGE,
    arguments,
    build_model,
    code,
    environment,
    fixed_length,
    note,
    parsed,
    peak,
    picture,
    plain,
    plot,
    preset_config,
    report,
    reset_peak,
    rss,
)

WAYS = {"ours": lambda model: nullcontext(), "plain": plain}


class Sampler(threading.Thread):
    """Follows the anonymous memory of this process: files that are mapped while loading are not a copy."""

    def __init__(self):
        super().__init__(daemon=True)
        self.top, self.done = 0, False
        self.start()

    @staticmethod
    def now() -> int:
        (line,) = [row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("RssAnon")]
        return int(line.split()[1]) * 1024

    def run(self):
        while not self.done:
            self.top = max(self.top, self.now())
            time.sleep(0.002)


# Each case runs in its own process and returns numbers; sizes in MiB.


def built(options, **changes):
    return build_model(preset_config(options.preset, **changes), options.device, options.torch_dtype)


def prompt_case(options, way: str, tokens: int = 10000) -> dict:
    """First token of a long text prompt."""
    model = built(options)
    ids = torch.randint(10, model.config.vocab_size - 10, (1, int(tokens)), device=options.device)
    with WAYS[way](model):
        model.generate(ids[:, :64], **fixed_length(1))
        before = reset_peak(options.device)
        model.generate(ids, attention_mask=torch.ones_like(ids), **fixed_length(1))
    return {"weights": before / MIB, "above": (peak(options.device) - before) / MIB}


def beams_case(options, way: str, beams: int = 1) -> dict:
    """A picture and a few tokens, with so many beams."""
    model = built(options)
    model.reuse.disable()
    small = picture(64, 64)
    with WAYS[way](model):
        model.chat(query="Look.", image=small, hd_num=1, **fixed_length(1))
        before = reset_peak(options.device)
        model.chat(
            query="Look.", image=picture(), hd_num=HD_NUM[options.preset], num_beams=int(beams), **fixed_length(6)
        )
    return {"weights": before / MIB, "above": (peak(options.device) - before) / MIB, "peak": peak(options.device) / MIB}


def long_case(options, length: int = 96000, every: int = 8000) -> dict:
    """A conversation that grows by `every` tokens a turn, beyond `max_position_embeddings`, in one cache."""
    layers = {} if torch.device(options.device).type == "cuda" else {"num_hidden_layers": options.layers}
    model = built(options, max_length=200000, **layers)
    text = model.config.text_config
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * model.dtype.itemsize
    cache = code("cache_internlm_xcomposer2").GrowingCache(config=model.config)
    rows = []
    ids = torch.randint(10, text.vocab_size - 10, (1, int(length)), device=options.device)
    model.generate(ids[:, :64], **fixed_length(1))
    before = reset_peak(options.device)
    for end in range(int(every), int(length) + 1, int(every)):
        reset_peak(options.device)
        model.generate(ids[:, :end], attention_mask=torch.ones_like(ids[:, :end]), past_key_values=cache,
                       **fixed_length(2))  # fmt: skip
        rows.append({"tokens": end, "above": (peak(options.device) - before) / MIB, "cache": end * per_token / MIB})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        code("cache_internlm_xcomposer2").crop(cache, end)
    return {"layers": text.num_hidden_layers, "rows": rows, "weights": before / MIB}


def load_case(options, folder: str, task_adapters: str) -> dict:
    """`from_pretrained`: the peak while loading against what stays, both without files that are only mapped."""
    kind = code("modeling_internlm_xcomposer2").InternLMXComposer2ForCausalLM
    gc.collect()
    cuda = torch.device(options.device).type == "cuda"
    where = {"device_map": options.device} if cuda else {}
    start = Sampler.now()
    sampler = Sampler()
    model = kind.from_pretrained(folder, task_adapters=task_adapters, dtype="auto", **where)
    gc.collect()
    sampler.done = True
    sampler.join()
    weights = sum(p.nbytes for p in model.parameters())
    # What is mapped is read when touched: touch everything, so that both ways of loading count alike.
    for parameter in model.parameters():
        parameter.sum()
    result = {"weights": weights / MIB, "peak anonymous": (max(sampler.top, Sampler.now()) - start) / MIB,
              "resident": rss() / MIB}  # fmt: skip
    if cuda:
        result["peak on card"] = torch.cuda.max_memory_allocated() / MIB
    return result


def save_case(options, folder: str) -> dict:
    """Write the checkpoint that `load_case` reads."""
    model = built(options)
    model.save_pretrained(folder, max_shard_size="2GB")
    return {}


CASES = {
    "prompt": prompt_case,
    "beams": beams_case,
    "long": long_case,
    "load": load_case,
    "save": save_case,
}


def apart(options, case: str, **given) -> dict:
    """Run a case in a process of its own."""
    command = [
        sys.executable, __file__, "--preset", options.preset, "--device", options.device, "--dtype", options.dtype,
        "--layers", str(options.layers), "--run", json.dumps({"case": case, **given}),
    ]  # fmt: skip
    # Freed blocks go back at once: what stays is in use, and runs agree with each other.
    settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB), "MALLOC_TRIM_THRESHOLD_": str(MIB)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=settings)
    if done.returncode:
        note(case=case, **given, failed=done.returncode)
        return {"failed": done.returncode}
    result = json.loads(done.stdout.splitlines()[-1])
    note(case=case, **given, **{key: value for key, value in result.items() if key != "rows"})
    return result


def over(one: dict, other: dict, key: str = "above"):
    return one[key] / other[key] if key in one and key in other else None


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--cases", default="prompt,beams,load,long", help="what to measure, by commas")
    parser.add_argument("--layers", type=int, default=2, help="decoder layers of the long conversation on a CPU")
    parser.add_argument("--longest", type=int, default=10000, help="longest prompt")
    parser.add_argument("--length", type=int, default=96000, help="tokens of the long conversation")
    parser.add_argument("--run", type=json.loads, help="run one case in this process (used by the script itself)")
    options = parsed(parser)
    if options.run:
        given = dict(options.run)
        score = Path("/proc/self/oom_score_adj")
        if score.exists():  # where memory runs out, this process goes and no other
            score.write_text("1000")
        print(json.dumps(CASES[given.pop("case")](options, **given)))
        return
    about = environment(options)
    result: dict = {}
    panels = []
    wanted = options.cases.split(",")
    if "prompt" in wanted:
        lengths = [n for n in (2500, 5000, options.longest) if n <= options.longest]
        rows = {way: [apart(options, "prompt", way=way, tokens=n) for n in lengths] for way in WAYS}
        result["prompt"] = {
            "tokens": lengths,
            "above_mib": {way: [row.get("above") for row in rows[way]] for way in WAYS},
            "ours_over_plain": over(rows["ours"][-1], rows["plain"][-1]),
            "target": 1 / 3,
        }
        lines = {way: (lengths, [row.get("above", float("nan")) for row in rows[way]]) for way in WAYS}
        panels.append({"title": "peak of a text prompt", "x": "prompt tokens", "y": "MiB over weights", "lines": lines})
    if "beams" in wanted:
        rows = {f"{way}, {n} beams": apart(options, "beams", way=way, beams=n) for way in WAYS for n in (1, 3)}
        greedy, three = rows["ours, 1 beams"], rows["ours, 3 beams"]
        result["beams"] = {
            "mib": rows,
            "3_beams_over_greedy": {"above weights": over(three, greedy), "whole": over(three, greedy, "peak")},
            "target": 1.25,
            "greedy_over_plain_greedy": over(greedy, rows["plain, 1 beams"]),
            "3_beams_over_plain_3_beams": over(three, rows["plain, 3 beams"]),
        }
    if "load" in wanted:
        with tempfile.TemporaryDirectory(prefix=PACKAGE) as folder:
            apart(options, "save", folder=folder)
            loads = {how: apart(options, "load", folder=folder, task_adapters=how) for how in ("lazy", "all")}
        result["loading"] = {
            "mib": loads,
            "peak_over_weights": {how: over({"a": row["peak anonymous"]}, {"a": row["weights"]}, "a")
                                  for how, row in loads.items() if "weights" in row},
            "lazy_over_all": over(loads["lazy"], loads["all"], "weights"),
        }  # fmt: skip
    if "long" in wanted:
        part = result["long"] = apart(options, "long", length=options.length)
        if "rows" in part:
            tokens = [row["tokens"] for row in part["rows"]]
            lines = {name: (tokens, [row[key] for row in part["rows"]])
                     for name, key in (("peak", "above"), ("keys and values alone", "cache"))}  # fmt: skip
            title = f"one conversation, decoder layers: {part['layers']}"
            panels.append({"title": title, "x": "tokens", "y": "MiB over weights", "lines": lines})
    name = "memory-long" if wanted == ["long"] else "memory"
    if panels:
        plot(name, options, panels)
    report(name, options, about, result)


if __name__ == "__main__":
    with torch.no_grad():
        main()

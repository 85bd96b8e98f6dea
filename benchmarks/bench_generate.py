"""First token, decode steps, beams, caches, adapters and prompt lookup, each beside the plain path and its floor.

    python benchmarks/bench_generate.py --preset cpu
    python benchmarks/bench_generate.py --preset 7b --device cuda --parts first_token,decode
"""

import statistics
from contextlib import nullcontext

import torch
from common import (
    HD_NUM,
    SWITCHES,
    StepClock,
    arguments,
    build_model,
    code,
    decode_bytes,
    environment,
    fixed_length,
    in_turns,
    measured_rates,
    note,
    parsed,
    picture,
    plain,
    plot,
    prefill_flops,
    preset_config,
    ratio,
    report,
    spread,
    stages,
    vision_flops,
    without_reuse,
    words,
)
from transformers import CompileConfig
from transformers.cache_utils import DynamicCache
from transformers.generation import LogitsProcessor, LogitsProcessorList

QUERY = "Describe this picture."


class Bench:
    """A model, its picture, and the rates of the machine it stands on."""

    def __init__(self, options):
        self.options = options
        self.device, self.hd_num = options.device, HD_NUM[options.preset]
        self.model = build_model(preset_config(options.preset), options.device, options.torch_dtype)
        self.model.reuse.disable()
        self.image = picture()
        self.rates = measured_rates(options.device, options.torch_dtype)
        note(gflops=self.rates["flops"] / 1e9, gbytes=self.rates["bytes"] / 1e9)

    def first_token(self, **kwargs):
        self.model.chat(query=QUERY, image=self.image, hd_num=self.hd_num, **{**fixed_length(1), **kwargs})

    def image_prompt(self):
        """Embeddings (1, T, D) and image mask (1, T) of the picture and a question."""
        conversation = self.model._open(self.model.tokenizer, QUERY, self.image, self.hd_num)
        embeds, image_mask = self.model._embed(conversation)
        return embeds.read(), image_mask

    def prompt(self, tokens: int, rows: int = 1):
        ids = torch.randint(10, self.model.config.vocab_size - 10, (rows, tokens), device=self.device)
        return self.model.get_input_embeddings()(ids)

    def filled(self, embeds, mask=None, kind=None, infer_mode="base"):
        """A cache that holds all but the last position of a prompt."""
        cache = (kind or code("cache_internlm_xcomposer2").GrowingCache)(config=self.model.config)
        positions = torch.arange(embeds.shape[1], device=embeds.device)[None]
        inputs = {"position_ids": positions, "mm_token_type_ids": mask, "infer_mode": infer_mode}
        self.model._run_prompt(embeds, inputs, cache, stop=embeds.shape[1] - 1)
        return cache

    def steps(self, embeds, tokens: int, mask=None, skip: int = 2, **kwargs) -> list[float]:
        """Seconds of the decode steps after a prompt."""
        clock = StepClock(self.device)
        settings = {**fixed_length(tokens), **kwargs}
        settings.pop("repetition_penalty")
        self.model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device),
            mm_token_type_ids=mask,
            stopping_criteria=clock.criteria,
            use_cache=True,
            **settings,
        )
        return clock.steps(skip)

    def step_floor(self, positions: int, rows: int = 1) -> float:
        return decode_bytes(self.model, positions, rows) / self.rates["bytes"]


def first_token(bench: Bench) -> dict:
    """First token with one picture: ours, plain, three beams; the parts; what each switch is worth."""
    model, options = bench.model, bench.options

    def plainly(*names, **kwargs):
        with plain(model, *names):
            bench.first_token(**kwargs)

    runs = {
        "ours": bench.first_token,
        "plain": plainly,
        "ours, 3 beams": lambda: bench.first_token(num_beams=3),
    }
    times = in_turns(runs, options.rounds, bench.device)
    for name, row in times.items():
        note(first_token=name, **spread(row))
    parts: dict[str, dict] = {}
    for name, context in (("ours", nullcontext()), ("plain", plain(model))):
        with context, stages(model) as spent:
            bench.first_token()
        parts[name] = dict(spent)
    embeds, mask = bench.image_prompt()
    tokens, pictured = embeds.shape[1], int(mask.sum())
    side = model.config.tokens_per_side
    tiles = 1 + round((pictured - side * (side + 1) - 1) / (side * side))  # row ends are few
    floors = {
        "prefill": prefill_flops(model, tokens, pictured) / bench.rates["flops"],
        "vision": vision_flops(model, tiles) / bench.rates["flops"],
    }
    result = {
        "prompt_tokens": tokens,
        "image_tokens": pictured,
        "seconds": {name: spread(row) for name, row in times.items()},
        "parts_s": parts,
        "floor_s": floors,
        "floor_over_measured": {name: floors[name] / parts["ours"][name] for name in floors},
        "ours_over_plain": {**ratio(times, "ours", "plain"), "target": 0.75},
        "beams_over_greedy": {**ratio(times, "ours, 3 beams", "ours"), "target": 1.15},
    }
    note(**result["parts_s"], **result["ours_over_plain"])
    if "ablation" in options.parts:
        plain_beams = in_turns({"plain, 3 beams": lambda: plainly(num_beams=3)}, 1, bench.device, warm=0)
        result["seconds"]["plain, 3 beams"] = spread(plain_beams["plain, 3 beams"])
        runs = {"ours": bench.first_token}
        for name in SWITCHES:
            if name not in ("reuse", "shared prefill of beams", "cache in place"):
                runs[f"without {name}"] = lambda name=name: plainly(name)
        times = in_turns(runs, options.rounds, bench.device, warm=0)
        result["ablation"] = {name: ratio(times, name, "ours") for name in runs if name != "ours"}
        note(**result["ablation"])
    return result


def prompt_length(bench: Bench) -> dict:
    """Prefill time against the length of a text prompt."""
    lengths = [256, 512, 1024, 2048, 4096, 8192]
    lengths = [n for n in lengths if n <= bench.options.longest]
    seconds: dict[str, list] = {"ours": [], "plain": [], "floor": []}
    for n in lengths:
        embeds = bench.prompt(n)

        def run(embeds=embeds):
            bench.model.generate(inputs_embeds=embeds, **{**fixed_length(1), "use_cache": True})

        def plainly(run=run):
            with plain(bench.model):
                run()

        times = in_turns({"ours": run, "plain": plainly}, bench.options.rounds, bench.device)
        for name, row in times.items():
            seconds[name].append(min(row))
        seconds["floor"].append(prefill_flops(bench.model, n) / bench.rates["flops"])
        note(prompt=n, **{name: row[-1] for name, row in seconds.items()})
    return {"tokens": lengths, "seconds": seconds}


def decode(bench: Bench) -> dict:
    """Decode steps: batches, beams, a picture against text of the same length."""
    model, tokens, rounds = bench.model, bench.options.tokens, bench.options.rounds
    result: dict = {"batch": {}, "floor_ms": {}}
    kinds = {"ours": nullcontext, "plain": lambda: plain(model)}
    batches = [rows for rows in (1, 4, 16) if rows <= bench.options.batch]
    for rows in batches:
        embeds = bench.prompt(512, rows)
        steps: dict[str, list] = {name: [] for name in kinds}
        for _ in range(rounds):
            for name, context in kinds.items():
                with context():
                    steps[name] += bench.steps(embeds, tokens)
        result["batch"][rows] = {name: 1e3 * statistics.median(row) for name, row in steps.items()}
        result["floor_ms"][rows] = 1e3 * bench.step_floor(512, rows)
        note(batch=rows, **result["batch"][rows], floor=result["floor_ms"][rows])

    embeds, mask = bench.image_prompt()
    length = embeds.shape[1]
    steps = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, context in kinds.items():
            with context():
                steps[name] += bench.steps(embeds, tokens, mask, num_beams=3)
    result["3 beams after a picture"] = {name: 1e3 * statistics.median(row) for name, row in steps.items()}
    result["3 beams after a picture"]["floor"] = 1e3 * bench.step_floor(length, 3)
    note(**result["3 beams after a picture"])

    text = bench.prompt(length)
    prompts = {"image": (embeds, mask), "text": (text, torch.zeros_like(mask)), "text again": (text, None)}
    caches = {name: bench.filled(*given) for name, given in prompts.items()}
    crop = code("cache_internlm_xcomposer2").crop
    steps = {name: [] for name in prompts}
    for number in range(max(rounds, 8)):
        for name in list(prompts)[:: 1 if number % 2 else -1]:
            given, given_mask = prompts[name]
            row = bench.steps(given, tokens, given_mask, past_key_values=caches[name])
            crop(caches[name], length - 1)
            steps[name].append(statistics.median(row))
    medians = {name: statistics.median(row) for name, row in steps.items()}
    result["same length"] = {
        "tokens": length,
        "ms": {name: 1e3 * value for name, value in medians.items()},
        "floor_ms": 1e3 * bench.step_floor(length),
        "image_over_text": medians["image"] / medians["text"],
        "noise": abs(medians["text again"] / medians["text"] - 1),  # the same thing measured twice
    }
    note(**result["same length"])
    return result


def caches(bench: Bench) -> dict:
    """Decode steps with each kind of cache after a picture's length of text."""
    model, tokens = bench.model, bench.options.tokens
    embeds = bench.prompt(bench.options.context)
    everywhere = CompileConfig()
    everywhere._compile_all_devices = True  # transformers compiles on GPUs unless told
    kinds = {
        "GrowingCache": {},
        "DynamicCache": {"past_key_values": lambda: DynamicCache(config=model.config)},
        "static": {"cache_implementation": "static", "disable_compile": True},
        "static, compiled": {"cache_implementation": "static", "compile_config": everywhere},
    }
    steps: dict[str, list] = {name: [] for name in kinds}
    for number in range(bench.options.rounds + 1):
        for name, given in kinds.items():
            kwargs = {key: value() if callable(value) and key == "past_key_values" else value
                      for key, value in given.items()}  # fmt: skip
            try:
                row = bench.steps(embeds, tokens, skip=4, **kwargs)
            except Exception as error:  # no compiler on this machine
                if "compiled" not in name:
                    raise
                note(cache=name, error=str(error).splitlines()[0])
                continue
            if number:
                steps[name] += row
    result = {name: {k: 1e3 * v for k, v in spread(row).items()} for name, row in steps.items() if row}
    note(**result)
    return {"context": bench.options.context, "ms": result, "floor_ms": 1e3 * bench.step_floor(bench.options.context)}


def adapters(bench: Bench) -> dict:
    """Decode steps and prefill without adapters, with the write pairs apart, as one pair, and merged."""
    model, tokens = bench.model, bench.options.tokens
    embeds = bench.prompt(512)
    modes = {"none": "base", "two pairs": "write", "one pair": "write"}
    steps: dict[str, list] = {name: [] for name in (*modes, "merged")}
    prefill: dict[str, list] = {name: [] for name in (*modes, "merged")}

    def once(name, mode):
        model.stack_task_adapters = name == "one pair"
        model._need_task_adapters(mode)
        clock = in_turns({"": lambda: bench.steps(embeds, 2, infer_mode=mode)}, 1, bench.device, warm=0)
        prefill[name] += clock[""]
        steps[name] += bench.steps(embeds, tokens, infer_mode=mode)

    for number in range(max(bench.options.rounds, 5)):
        for name in list(modes)[:: 1 if number % 2 else -1]:
            once(name, modes[name])
        with model.merged_task_adapter("write"):
            once("merged", "write")
    model.stack_task_adapters = True

    def merge_and_restore():
        with model.merged_task_adapter("write"):
            pass

    result = {
        "step_ms": {name: {k: 1e3 * v for k, v in spread(row).items()} for name, row in steps.items()},
        "prefill_512_s": {name: spread(row) for name, row in prefill.items()},
        "one_pair_over_two": statistics.median(steps["one pair"]) / statistics.median(steps["two pairs"]),
        "merge_and_restore_s": min(in_turns({"": merge_and_restore}, 2, bench.device)[""]),
    }
    note(**result)
    return result


class Copying(LogitsProcessor):
    """Makes a model of random weights write a given text, as a trained one that copies its prompt would."""

    def __init__(self, prompt: int, target: list[int]):
        self.prompt, self.target = prompt, target

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.target[min(input_ids.shape[1] - self.prompt, len(self.target) - 1)]] = 1e4
        return scores


def lookup(bench: Bench) -> dict:
    """Prompt lookup where a page's second pass copies its first page with one word in ten changed."""
    model, length = bench.model, bench.options.page
    page = model.tokenizer(words(length), add_special_tokens=False).input_ids
    target = [(token + 1 if i % 10 == 9 else token) for i, token in enumerate(page)]
    query = " Generate JavaScript events for the html code:" + model.tokenizer.decode(page)
    prompt = len(model._open(model.tokenizer, _turn(query), None, None).prompt.input_ids)

    def run(**kwargs):
        offset = prompt if kwargs else 0  # lookup starts from ids, the rest from embeddings
        model.chat(
            query=query, logits_processor=LogitsProcessorList([Copying(offset, target)]),
            **fixed_length(min(length, bench.options.copied)), **kwargs,
        )  # fmt: skip

    runs = {"without": run}
    for count in (5, 10, 20):
        runs[f"lookup {count}"] = lambda count=count: run(prompt_lookup_num_tokens=count)
    times = in_turns(runs, bench.options.rounds, bench.device, warm=0)
    result = {
        "page_tokens": length,
        "seconds": {name: spread(row) for name, row in times.items()},
        "ratio": {name: ratio(times, name, "without") for name in runs if name != "without"},
    }
    note(**result)
    return result


def _turn(query: str) -> str:
    return code("prompting_internlm_xcomposer2").chat_prompt(query, (), "")


PARTS = {
    "first_token": first_token,
    "prompt_length": prompt_length,
    "decode": decode,
    "caches": caches,
    "adapters": adapters,
    "lookup": lookup,
}


def draw(options, name: str, result: dict) -> None:
    panels = []
    if "prompt_length" in result:
        part = result["prompt_length"]
        lines = {name: (part["tokens"], row) for name, row in part["seconds"].items()}
        panels.append({"title": "first token of a text prompt", "x": "prompt tokens", "y": "s", "lines": lines})
    if "decode" in result:
        part = result["decode"]
        rows = list(part["batch"])
        lines = {name: (rows, [part["batch"][n][name] for n in rows]) for name in ("ours", "plain")}
        lines["floor"] = (rows, [part["floor_ms"][n] for n in rows])
        panels.append({"title": "decode step, context 512", "x": "batch", "y": "ms", "lines": lines})
    if panels:
        plot(name, options, panels)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--parts", default=",".join((*PARTS, "ablation")), help="what to measure, by commas")
    parser.add_argument("--tokens", type=int, default=24, help="tokens of each decode run")
    parser.add_argument("--batch", type=int, default=16, help="largest batch")
    parser.add_argument("--longest", type=int, default=4096, help="longest prompt of the sweep")
    parser.add_argument("--context", type=int, default=4096, help="prompt of the cache comparison")
    parser.add_argument("--page", type=int, default=600, help="tokens of the page that is copied")
    parser.add_argument("--copied", type=int, default=200, help="how many of them are written again")
    options = parsed(parser)
    options.parts = options.parts.split(",")
    about = environment(options)
    bench = Bench(options)
    result = {"rates": bench.rates}
    for name, part in PARTS.items():
        if name in options.parts:
            with without_reuse(bench.model):
                result[name] = part(bench)
    parts = [name for name in PARTS if name in options.parts]
    name = "generate" if len(parts) == len(PARTS) else f"generate-{'+'.join(parts)}"
    draw(options, name, result)
    report(name, options, about, result)


if __name__ == "__main__":
    with torch.no_grad():
        main()

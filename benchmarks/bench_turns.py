"""Twenty turns about one picture: what each turn's first token costs, with and without what earlier turns left.

    python benchmarks/bench_turns.py --preset cpu
"""

import gc
import statistics

import torch
from common import (
    HD_NUM,
    FirstToken,
    arguments,
    build_model,
    environment,
    fixed_length,
    note,
    now,
    parsed,
    picture,
    plain,
    plot,
    preset_config,
    report,
    words,
)


def talk(model, image, turns: int, tokens: int, hd_num: int, query_tokens: int):
    """Seconds to the first token, and seconds altogether, of each turn."""
    first, whole, history = [], [], []
    for turn in range(turns):
        clock = FirstToken(model.device)
        gc.collect()
        start = now()
        _, history = model.chat(
            query=words(query_tokens, seed=turn),
            image=image,
            history=history,
            hd_num=hd_num,
            streamer=clock,
            **fixed_length(tokens),
        )
        whole.append(now() - start)
        first.append(clock.at - start)
        note(turn=turn + 1, first_token=first[-1], whole=whole[-1])
    return first, whole


def running_total(values):
    total, sums = 0.0, []
    for value in values:
        total += value
        sums.append(total)
    return sums


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=16, help="tokens of each answer")
    parser.add_argument("--query", type=int, default=100, help="tokens of each question")
    parser.add_argument("--recomputed", type=int, default=20, help="turns of the conversation without reuse")
    options = parsed(parser)
    if min(options.turns, options.recomputed) < 4:
        given = f"--turns {options.turns} --recomputed {options.recomputed}"
        parser.error(f"{given}: the halves of a conversation are compared, take 4 or more")
    about = environment(options)
    hd_num = HD_NUM[options.preset]
    model = build_model(preset_config(options.preset), options.device, options.torch_dtype)
    size = (1920, 1080)
    image = picture(*size)

    def run(turns: int):
        model.reuse.clear()
        return talk(model, image, turns, options.tokens, hd_num, options.query)

    run(2)  # warm
    seconds_turns = []
    for _ in range(options.rounds):
        (one, two), _ = run(2)
        seconds_turns.append(two / one)
    ours, ours_whole = run(options.turns)
    with plain(model, "reuse"):
        recomputed, recomputed_whole = run(options.recomputed)
    with plain(model):
        old, _ = run(2)

    def later_over_earlier(first: list[float]) -> float:
        """Without the first turn, which reads the picture."""
        half = len(first) // 2
        return statistics.mean(first[half:]) / statistics.mean(first[1:half])

    result = {
        "second_over_first": {"min": min(seconds_turns), "median": statistics.median(seconds_turns), "target": 1 / 20},
        "first_token_s": {"with reuse": ours, "recomputed": recomputed, "plain, two turns": old},
        "second_over_plain_second": ours[1] / old[1],
        "total_s": {"with reuse": sum(ours_whole), "recomputed": sum(recomputed_whole)},
        # Linear: the later half costs what the earlier half costs.
        "later_over_earlier_half": {
            "with reuse": later_over_earlier(ours),
            "recomputed": later_over_earlier(recomputed),
        },
    }
    numbers, fewer = list(range(1, options.turns + 1)), list(range(1, options.recomputed + 1))
    plot(
        "turns",
        options,
        [
            {
                "title": "first token of each turn",
                "x": "turn",
                "y": "s",
                "lines": {"with reuse": (numbers, ours), "recomputed": (fewer, recomputed)},
            },
            {
                "title": "time of the conversation so far",
                "x": "turn",
                "y": "s",
                "lines": {
                    "with reuse": (numbers, running_total(ours_whole)),
                    "recomputed": (fewer, running_total(recomputed_whole)),
                },
            },
        ],
    )
    report("turns", options, about, result)


if __name__ == "__main__":
    with torch.no_grad():
        main()

"""Time the first token and decoding of a checkpoint on this machine.

    xcomposer bench --model FOLDER --image photo.jpg

Each figure is the median of several runs after one that does not count; the last line is JSON. `benchmarks/` in a clone
asks further: floors, ablations, memory.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from xcomposer.loading import EXPECTED, arguments, load, one_line
from xcomposer.machine import environment

TEXT = "Describe what there is to see, in detail."
IMAGE_SIZE = (1920, 1080)


def median_seconds(run: Callable[[], Any], rounds: int, sync: Callable[[], Any]) -> float:
    """Median wall clock of `run`, after one call that does not count."""
    times = []
    for _ in range(rounds + 1):
        sync()
        start = time.perf_counter()
        run()
        sync()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def measure(model, tokenizer, images: list[Any], rounds: int = 5, tokens: int = 32, **settings) -> dict[str, float]:
    """Seconds to the first token (text alone, with the pictures, in a second turn) and tokens a second after it.

    Args:
        images: pictures of the second and third case, as `chat` takes them.
        settings: of every call, as `chat` takes them.
    """
    import torch

    sync = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    settings = {"do_sample": False, **settings}

    def ask(pictures, new: int, fresh: bool = True, history=()):
        if fresh:
            model.reuse.clear()
        ends = {"min_new_tokens": new, "max_new_tokens": new}
        return model.chat(tokenizer, TEXT, pictures, history=list(history), **ends, **settings)

    def seconds(*args, **kwargs):
        return median_seconds(lambda: ask(*args, **kwargs), rounds, sync)

    result = {"text_first_token_s": seconds([], 1), "picture_first_token_s": seconds(images, 1)}
    _, history = ask(images, tokens)
    result["second_turn_first_token_s"] = seconds(images, 1, fresh=False, history=history)
    result["tokens_per_s"] = (tokens - 1) / max(seconds([], tokens) - result["text_first_token_s"], 1e-9)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__, command="bench", example="--model demo --image photo.jpg")
    parser.add_argument("--image", nargs="+", help="pictures (default: a plain one of 1920 x 1080)")
    parser.add_argument("--hd_num", type=int, help="most tiles of a picture (default: 24, or 6 each of several)")
    parser.add_argument("--rounds", type=int, default=5, help="runs that count, of each case")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: at least one run must count")
    from PIL import Image

    try:
        model, tokenizer = load(args)
        images = args.image or [Image.new("RGB", IMAGE_SIZE, "white")]
        result = measure(model, tokenizer, images, args.rounds, hd_num=args.hd_num)
    except EXPECTED as error:
        print(f"bench: {one_line(error)}", file=sys.stderr)
        return 1
    about = environment()
    print(", ".join(f"{name} {value}" for name, value in about.items() if value))
    for name, value in result.items():
        print(f"  {name:<28}{value:.4g}")
    print(json.dumps({"model": str(args.model), **about, **result}))
    return 0

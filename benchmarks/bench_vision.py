"""Pictures and videos: what tiles and frames cost, and preprocessing beside Pillow's bare resize.

    python benchmarks/bench_vision.py --preset cpu
"""

import torch
from common import (
    arguments,
    build_model,
    code,
    environment,
    in_turns,
    measured_rates,
    note,
    parsed,
    picture,
    plain,
    plot,
    preset_config,
    ratio,
    report,
    spread,
    vision_flops,
)
from PIL import Image

VISION_SWITCHES = ("tiles in batches", "fused attention")


def tiles(options, model, rates) -> dict:
    """The vision tower and projector against the number of tiles: ours, plain, floor."""
    side = model.config.tile
    counts = [n for n in (1, 2, 4, 6, 9, 12, 18, 24, 36) if n <= options.tiles]
    seconds: dict[str, list] = {"ours": [], "plain": [], "floor": []}
    for count in counts:
        pixels = torch.randn(count, 3, side, side, device=options.device)
        grid = torch.tensor([[1, 1, count]])

        def run(pixels=pixels, grid=grid):
            model.get_image_features(pixels, grid)

        def plainly(run=run):
            with plain(model, *VISION_SWITCHES):
                run()

        times = in_turns({"ours": run, "plain": plainly}, options.rounds, options.device, warm=int(count == 1))
        for name, row in times.items():
            seconds[name].append(min(row))
        seconds["floor"].append(vision_flops(model, count + (count > 1)) / rates["flops"])
        note(tiles=count, **{name: row[-1] for name, row in seconds.items()})
    at_once = {}
    pixels = torch.randn(max(counts), 3, side, side, device=options.device)
    for batch in (1, 2, 4, 8, 16):
        model.model.tiles_at_once = batch
        grid = torch.tensor([[1, 1, max(counts)]])
        times = in_turns({"": lambda grid=grid: model.get_image_features(pixels, grid)}, 1, options.device, warm=0)
        at_once[batch] = times[""][0]
        note(tiles_at_once=batch, seconds=at_once[batch])
    del model.model.tiles_at_once
    return {"tiles": counts, "seconds": seconds, "seconds of the largest by tiles_at_once": at_once}


def frames(options, model) -> dict:
    """A video of 1080p frames: stitching and resizing, then vision."""
    utils = code("ixc_utils")
    counts = [n for n in (1, 2, 4, 8, 16, 24, 32) if n <= options.frames]
    clip = [picture(1920, 1080, seed) for seed in range(max(counts))]
    seconds: dict[str, list] = {"preprocessing": [], "vision": []}
    tokens = []
    for count in counts:
        def prepare(count=count):
            return utils.stack_tiles([utils.to_pixels(clip[:count], tile=model.config.tile)], model.config.tile)

        pixels, grid = prepare()
        pixels = pixels.to(options.device)
        runs = {"preprocessing": prepare, "vision": lambda p=pixels, g=grid: model.get_image_features(p, g)}
        times = in_turns(runs, options.rounds, options.device, warm=0)
        for name, row in times.items():
            seconds[name].append(min(row))
        _, rows, cols = grid[0].tolist()
        tokens.append(utils.image_tokens(rows, cols, model.config.tokens_per_side))
        note(frames=count, tiles=rows * cols, tokens=tokens[-1], **{name: row[-1] for name, row in seconds.items()})
    return {"frames": counts, "tokens": tokens, "seconds": seconds}


def preprocessing(options) -> dict:
    """A 4K picture to normalised pixels, and cut into tiles, beside the bare resize."""
    utils = code("ixc_utils")
    result = {}
    for hd_num in (24, 9):
        image = picture(3840, 2160)
        size = utils._hd_size(3840, 2160, hd_num, 560)
        runs = {
            "resize": lambda image=image, size=size: image.resize(size, Image.Resampling.BILINEAR),
            "pixels": lambda image=image, hd_num=hd_num: utils.to_pixels(image, hd_num),
            "tiles": lambda image=image, hd_num=hd_num: utils.to_tiles([image], hd_num),
        }
        times = in_turns(runs, max(options.rounds, 10))
        result[hd_num] = {
            "resized_to": size,
            "ms": {name: {k: 1e3 * v for k, v in spread(row).items()} for name, row in times.items()},
            "pixels_over_resize": ratio(times, "pixels", "resize"),
            "tiles_over_resize": {**ratio(times, "tiles", "resize"), "target": 1.3},
        }
        note(hd_num=hd_num, **result[hd_num])
    return result


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--parts", default="preprocessing,tiles,frames", help="what to measure, by commas")
    parser.add_argument("--tiles", type=int, default=36, help="most tiles")
    parser.add_argument("--frames", type=int, default=32, help="most frames")
    options = parsed(parser)
    about = environment(options)
    parts = options.parts.split(",")
    result: dict = {}
    if "preprocessing" in parts:
        result["4K preprocessing by hd_num"] = preprocessing(options)
    panels = []
    if "tiles" in parts or "frames" in parts:
        model = build_model(preset_config(options.preset), options.device, options.torch_dtype)
    if "tiles" in parts:
        rates = measured_rates(options.device, options.torch_dtype)
        part = result["tiles"] = tiles(options, model, rates)
        lines = {name: (part["tiles"], row) for name, row in part["seconds"].items()}
        panels.append({"title": "vision tower and projector", "x": "tiles", "y": "s", "lines": lines})
    if "frames" in parts:
        part = result["frames"] = frames(options, model)
        lines = {name: (part["frames"], row) for name, row in part["seconds"].items()}
        panels.append({"title": "video of 1080p frames", "x": "frames", "y": "s", "lines": lines})
    if panels:
        plot("vision", options, panels)
    report("vision", options, about, result)


if __name__ == "__main__":
    with torch.no_grad():
        main()

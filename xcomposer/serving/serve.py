"""Answer over OpenAI's interface: on vLLM where it is installed, else on transformers; one set of options.

    xcomposer serve FOLDER --port 8000
    xcomposer serve FOLDER --backend transformers --allow-addresses --allowed-local-media-path /srv/pictures

Clients choose the task as the model: chat, web (pages), write (articles).
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

BACKENDS = ("auto", "vllm", "transformers")
NO_DOMAIN = "pictures-are-sent-along.invalid"  # vLLM fetches from any host unless it is told which


class Option(NamedTuple):
    """An option of the command.

    Args:
        argument: what argparse wants to know of it.
        vllm: what it is called by `vllm serve`; None: it is of the other backend alone.
    """

    argument: dict[str, Any]
    vllm: str | None = None


OPTIONS = {
    "--api-key": Option({"help": "clients must send it (default: $XCOMPOSER_API_KEY, else none)"}, "--api-key"),
    "--dtype": Option({"choices": ["auto", "float32", "bfloat16", "float16"]}, "--dtype"),
    "--num-gpus": Option({"type": int, "help": "0: the CPU; N: over N cards"}, "--tensor-parallel-size"),
    "--max-model-len": Option({"type": int, "help": "most tokens of prompt and answer together"}, "--max-model-len"),
    "--allowed-local-media-path": Option(
        {"type": Path, "metavar": "DIR", "help": "clients may name files below it, as file:///..."},
        "--allowed-local-media-path",
    ),
    "--device": Option({"help": "a torch device, say cuda:1 or mps, in place of --num-gpus"}),
    "--max-queue": Option({"type": int, "help": "most requests that wait or compute (64); more get 503"}),
    "--max-body": Option({"type": int, "metavar": "MIB", "help": "of a request, and of a picture in it (64)"}),
    "--max-pictures": Option({"type": int, "help": "pictures and videos of a request (16)"}),
    "--max-pixels": Option({"type": int, "help": "of all pictures of a request together (200,000,000)"}),
    "--media-timeout": Option({"type": float, "metavar": "S", "help": "seconds for fetching one picture (10)"}),
}


def name_of(option: str) -> str:
    """An option's name in the parsed arguments."""
    return option.removeprefix("--").replace("-", "_")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="xcomposer serve",
        description=__doc__.split("\n")[0],
        epilog="example: xcomposer serve demo --port 8000. On vLLM, its own options may follow, and --adapter "
        "NAME=FOLDER, --show.",
        allow_abbrev=False,
    )
    made.add_argument("model", metavar="FOLDER", nargs="?", help="a checkpoint (default: $IXC_MODEL or demo)")
    made.add_argument("--backend", choices=BACKENDS, default="auto", help="auto: vLLM where it is installed")
    made.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    made.add_argument("--port", type=int, default=8000)
    for name, option in OPTIONS.items():
        made.add_argument(name, **option.argument)
    made.add_argument("--allow-addresses", action="store_true", help="fetch http(s) addresses that clients name")
    made.add_argument(
        "--allow-private-addresses", action="store_true", help="also from this machine and its own network"
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    made = parser()
    args, more = made.parse_known_args(argv)
    backend = args.backend
    if backend == "auto":
        backend = "vllm" if find_spec("vllm") else "transformers"
    args.api_key = args.api_key or os.environ.get("XCOMPOSER_API_KEY")
    if args.allow_private_addresses and not args.allow_addresses:
        made.error("--allow-private-addresses says which addresses; give --allow-addresses, too")
    for name in ("max_model_len", "max_queue", "max_body", "max_pictures", "max_pixels", "media_timeout"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            made.error(f"--{name.replace('_', '-')} is {value}; it takes a number above 0")
    if args.allowed_local_media_path is not None and not args.allowed_local_media_path.is_dir():
        made.error(f"--allowed-local-media-path {args.allowed_local_media_path} is no folder")
    if backend == "vllm":
        try:
            return serve_on_vllm(args, more)
        except ValueError as error:
            made.error(str(error))
    if more:
        made.error(f"{' '.join(more)}: no option of --backend transformers")
    if missing := [name for name in ("starlette", "uvicorn", "pydantic") if find_spec(name) is None]:
        print(f"xcomposer serve: needs {', '.join(missing)}: pip install '.[serve]'", file=sys.stderr)
        return 1
    from xcomposer.serving.transformers_server import serve

    return serve(args)


def serve_on_vllm(args: argparse.Namespace, more: Sequence[str]) -> int:
    """The same options, as vLLM calls them.

    Raises:
        ValueError: an option that vLLM has nothing like.
    """
    from xcomposer.serving import vllm_server

    model = args.model
    if model is None:
        from xcomposer.loading import DEFAULT_MODEL

        model = str(DEFAULT_MODEL)
    return vllm_server.main([model, "--host", args.host, "--port", str(args.port), *vllm_options(args), *more])


def vllm_options(args: argparse.Namespace) -> list[str]:
    """Options of `vllm serve` for those given to this command; see `serve_on_vllm`."""
    options = []
    for name, option in OPTIONS.items():
        value = getattr(args, name_of(name))
        if value is None:
            continue
        if option.vllm is None:
            raise ValueError(f"{name} is an option of --backend transformers; vLLM has none like it")
        options += [option.vllm, str(value)]
    if args.num_gpus == 0:
        raise ValueError("--num-gpus 0: what vLLM runs on is the build's that is installed")
    if not args.allow_addresses:
        options += ["--allowed-media-domains", NO_DOMAIN]
    elif not args.allow_private_addresses:
        raise ValueError(
            "--allow-addresses: vLLM does not tell private addresses from others; give --allow-private-addresses, too, "
            "or leave both and pass vLLM's --allowed-media-domains"
        )
    return options

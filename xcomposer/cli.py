"""The command `xcomposer`: one subcommand for each thing that is run, each a function that can be imported.

A row of `COMMANDS` names a function that takes the arguments behind the subcommand and returns an exit code; its module
is imported when the subcommand is called, so that `xcomposer --help` needs neither torch nor any optional package.
"""

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from xcomposer.machine import bound_kernel_caches, quiet_imports


class Command(NamedTuple):
    """A subcommand: `module.main`, and what it is for."""

    module: str
    summary: str


COMMANDS = {
    "chat": Command("xcomposer.chat", "ask about pictures and videos in the terminal"),
    "serve": Command("xcomposer.serving.serve", "answer over the OpenAI interface, on vLLM or transformers"),
    "studio": Command("xcomposer.studio.app", "chat, pages and illustrated articles in a browser"),
    "inspect": Command("xcomposer.checkpoints.inspect", "say what a folder holds and what it needs to run"),
    "doctor": Command("xcomposer.doctor", "say what is installed here, what is missing, and how to get it"),
    "adopt": Command("xcomposer.checkpoints.adopt", "put this code beside released weights, for remote code"),
    "merge": Command("xcomposer.checkpoints.merge", "add a task adapter to the weights"),
    "convert-adapter": Command("xcomposer.checkpoints.convert_adapter", "rename a LoRA trained on the original"),
    "export": Command("xcomposer.checkpoints.export", "write a task adapter as a PEFT LoRA"),
    "quantise": Command("xcomposer.checkpoints.quantise", "write a checkpoint in fewer bits"),
    "finetune": Command("xcomposer.finetune.run", "train on pictures, videos and text"),
    "bench": Command("xcomposer.bench", "time first token and decoding here"),
}
HELP = ("-h", "--help")


def usage() -> str:
    """What `xcomposer --help` prints."""
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: xcomposer COMMAND [ARGUMENTS]\n\nInternLM-XComposer-2.5 on today's transformers.\n\n"
        f"{rows}\n\n`xcomposer COMMAND --help` has the arguments of each, with an example.\n"
        'Example: xcomposer chat --image photo.jpg --text "What is this?"'
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit code: 0 done, 1 not done and said why, 2 unusable arguments."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in HELP:
        print(usage())
        return 0
    if name == "--version":
        from importlib.metadata import version

        print(f"xcomposer {version('internlm-xcomposer2d5')}")
        return 0
    command = COMMANDS.get(name)
    if command is None:
        print(f"xcomposer: no command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    sys.argv[0] = f"xcomposer {name}"  # what argparse calls the program
    bound_kernel_caches()
    try:
        with quiet_imports():
            module = importlib.import_module(command.module)
        return module.main(rest) or 0
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130

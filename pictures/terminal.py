"""The README's picture of a chat in the terminal, from the real command: `python pictures/terminal.py` (needs rich)."""

import io
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

HERE = Path(__file__).resolve().parent
QUESTION = "What colour is the star?"
TYPED = ["Where is it?", "clear", "<img>demo/pictures/crowd.png</img> How many shapes are there?", "exit"]


def main() -> None:
    arguments = ["--image", "demo/pictures/shapes.png", "--text", QUESTION, "--greedy", "--stay"]
    done = subprocess.run(
        [sys.executable, "-m", "xcomposer", "chat", *arguments],
        cwd=HERE.parent, input="\n".join(TYPED), capture_output=True, text=True, check=True,
    )  # fmt: skip
    console = Console(record=True, width=96, file=io.StringIO())
    console.print(Text(f'$ xcomposer chat --image shapes.png --text "{QUESTION}" --greedy --stay', style="bold"))
    prompts = iter(TYPED)
    for line in done.stdout.splitlines():
        if line.startswith("> "):  # what a person types is not in the output of a pipe
            typed = next(prompts)
            console.print(Text(f"> {typed}", style="bold cyan"))
            line = line.removeprefix("> ")
            if line == typed:  # said again for the pipe alone
                continue
        console.print(Text(line))
    drawn = console.export_svg(title="xcomposer chat")
    drawn = re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)  # no fonts from the net: the reader's own
    (HERE / "chat-terminal.svg").write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()

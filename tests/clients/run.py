"""Run other people's programs on the demo checkpoint as they are published: python tests/clients/run.py [NAME ...]

Each gets an environment of its own under --environments (made once, then kept), is run by its own command, and its
answers are compared with those in questions.jsonl. Ends with one line for each program: how long it took, or
what went wrong.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
DEMO = REPO / "demo"
QUESTIONS = [json.loads(line) for line in (HERE / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
PLUGIN = REPO / "xcomposer" / "swift_model.py"
# What every model of this family needs, and ms-swift and lmms-eval without what only other models need.
COMMON = ("accelerate", "pillow", "protobuf", "sentencepiece")
SWIFT_IMPORTS = (
    "datasets<4.8.5", "addict", "attrdict", "binpacking", "cpm-kernels", "dacite", "einops", "fastapi",
    "importlib-metadata", "json-repair", "matplotlib", "modelscope", "nltk", "openai", "oss2", "pandas", "rouge",
    "scipy", "simplejson", "sortedcontainers", "tensorboard", "tiktoken", "requests", "uvicorn", "zstandard",
)  # fmt: skip
LMMS_IMPORTS = (
    "av", "datasets", "evaluate", "httpx", "jsonlines", "loguru", "numexpr", "openpyxl", "pytablewriter",
    "python-dotenv", "pyyaml", "sacrebleu", "tenacity", "tqdm", "tqdm-multiprocess", "zstandard",
)  # fmt: skip


class Client(NamedTuple):
    """A program: what pip installs, in turns, and what is done with it in a folder by its environment's `bin`."""

    install: tuple[tuple[str, ...], ...]
    use: Callable[[Path, Path], None]


def run(*command: object, folder: Path = REPO) -> None:
    """Run a command; raise a RuntimeError with its last lines if it fails."""
    threads = os.environ.get("OMP_NUM_THREADS", "1")  # more gain nothing on the demo, and wait for each other
    own = {"DEMO": str(DEMO), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads, "PYTHONPATH": ""}
    environment = {**os.environ, **own}
    done = subprocess.run([*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stderr[-3000:]}")


def expect(said: Sequence[str], wanted: Sequence[str]) -> None:
    if list(said) != list(wanted):
        raise RuntimeError(f"answers {said}, expected {wanted}")


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def swift_rows(folder: Path, answers: Sequence[str | None]) -> Path:
    """The questions as ms-swift reads them, with `answers` to learn where there are any."""
    path = folder / f"rows-{len(list(folder.glob('rows-*')))}.jsonl"
    lines = []
    for question, answer in zip(QUESTIONS, answers, strict=True):
        messages = [{"role": "user", "content": "<image>" + question["question"]}]
        messages += [{"role": "assistant", "content": answer}] if answer else []
        images = [str(DEMO / "pictures" / name) for name in question["pictures"]]
        lines.append(json.dumps({"messages": messages, "images": images}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def use_swift(binaries: Path, folder: Path) -> None:
    """Infer; learn other answers with a LoRA; infer with it."""
    model = ("--external_plugins", PLUGIN, "--model", DEMO, "--model_type", "xcomposer2_5", "--use_hf", "true")
    model += ("--torch_dtype", "float32")

    def answers(*adapter: object) -> list[str]:
        result = folder / f"answers-{len(adapter)}.jsonl"
        asked = swift_rows(folder, [None] * len(QUESTIONS))
        run(binaries / "swift", "infer", *model, *adapter, "--val_dataset", asked, "--max_new_tokens", 16,
            "--temperature", 0, "--result_path", result)  # fmt: skip
        return [row["response"] for row in read_lines(result)]

    expect(answers(), [question["answer"] for question in QUESTIONS])
    taught = ["purple", "9", "123"]
    run(binaries / "swift", "sft", *model, "--dataset", swift_rows(folder, taught), "--tuner_type", "lora",
        "--target_modules", "all-linear", "--max_steps", 45, "--learning_rate", 2e-3,
        "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 1, "--output_dir", folder / "trained",
        "--save_steps", 45, "--report_to", "none", "--split_dataset_ratio", 0)  # fmt: skip
    [adapter] = (folder / "trained").glob("*/checkpoint-45")
    expect(answers("--adapters", adapter), taught)


def use_lm_eval(binaries: Path, folder: Path) -> None:
    """The generic `hf-multimodal`, by remote code."""
    model = f"pretrained={DEMO},trust_remote_code=True,dtype=float32,convert_img_format=True"
    run(binaries / "python", "-m", "lm_eval", "--model", "hf-multimodal", "--device", "cpu", "--model_args", model,
        "--include_path", HERE / "lm_eval_task", "--tasks", "toyworld_pictures", "--batch_size", 1,
        "--apply_chat_template", "--log_samples", "--output_path", folder)  # fmt: skip
    [samples] = folder.rglob("samples_*.jsonl")
    said = {row["doc_id"]: row["filtered_resps"][0] for row in read_lines(samples)}
    expect([said[number] for number in sorted(said)], [question["answer"] for question in QUESTIONS])


def use_lmms_eval(binaries: Path, folder: Path) -> None:
    """The generic `huggingface`, by remote code."""
    model = f"pretrained={DEMO},device=cpu,device_map=cpu,trust_remote_code=True"
    run(binaries / "python", "-m", "lmms_eval", "--model", "huggingface", "--model_args", model, "--include_path",
        HERE / "lmms_eval_task", "--tasks", "toyworld_pictures", "--batch_size", 1, "--log_samples",
        "--output_path", folder)  # fmt: skip
    [samples] = folder.rglob("*samples_*.jsonl")
    said = {row["doc_id"]: row["filtered_resps"] for row in read_lines(samples)}
    expect([said[number] for number in sorted(said)], [question["answer"] for question in QUESTIONS])


CLIENTS = {
    "ms-swift": Client(
        (
            ("torch==2.13.0",),
            ("transformers==5.19.0", "peft<0.21", "trl<1.0", *COMMON, *SWIFT_IMPORTS),
            ("--no-deps", "ms-swift==4.6.0", "transformers-stream-generator"),
        ),
        use_swift,
    ),
    "lm-eval": Client((("torch==2.13.0",), ("transformers==5.23.0", "lm-eval==0.4.13", *COMMON)), use_lm_eval),
    "lmms-eval": Client(
        (
            ("torch==2.13.0",),
            ("transformers==5.23.0", *COMMON, *LMMS_IMPORTS),
            ("--no-deps", "lmms-eval==0.7.3"),
        ),
        use_lmms_eval,
    ),
}


def environment_of(name: str, client: Client, folder: Path) -> Path:
    """The `bin` folder of a client's environment, made if it is not there."""
    folder = folder / name
    ready = folder / "ready"
    if not ready.is_file():
        venv.create(folder, with_pip=True, clear=True)
        for packages in client.install:
            run(folder / "bin" / "pip", "--disable-pip-version-check", "install", "-q", *packages)
        ready.touch()
    return folder / "bin"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CLIENTS)}; default: all")
    parser.add_argument("--environments", type=Path, default=REPO / ".venv-clients", help="folder of the environments")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.names) - set(CLIENTS)):
        parser.error(f"no client called {', '.join(unknown)}; there are {', '.join(CLIENTS)}")
    failed = False
    for name in arguments.names or CLIENTS:
        start = time.perf_counter()
        try:
            binaries = environment_of(name, CLIENTS[name], arguments.environments.resolve())
            installed = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                CLIENTS[name].use(binaries, Path(folder))
            done = time.perf_counter()
            print(f"{name}: right; installing {installed - start:.0f} s, running {done - installed:.0f} s", flush=True)
        except RuntimeError as error:
            failed = True
            print(f"{name}: {error}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

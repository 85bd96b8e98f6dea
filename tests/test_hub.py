"""Checkpoints by hub id, on a machine that has nothing of them yet: a hub of the tests' own is asked."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import REPO
from hub import COMMIT, serving
from packing import packed_checkpoint

from xcomposer.checkpoints import tiny
from xcomposer.model.modeling_internlm_xcomposer2 import InternLMXComposer2ForCausalLM

LOAD = """
import sys, torch
if sys.argv[3] == "package":
    import xcomposer
from transformers import AutoModel
options = {} if sys.argv[3] == "package" else {"trust_remote_code": True}
model = AutoModel.from_pretrained(sys.argv[1], dtype=torch.float32, task_adapters="all", **options)
torch.save(model.state_dict(), sys.argv[2])
"""


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """Hub id -> folder; and "ID plain", the full-precision twin of a packed one."""
    out = tmp_path_factory.mktemp("hub")
    made = {
        "org/whole": tiny.write_checkpoint(out / "whole"),
        "org/shards": tiny.write_checkpoint(out / "shards", shards=3),
        "org/bins": tiny.write_checkpoint(out / "bins", shards=2, fmt="bin"),
    }
    for layout, kind in {"GPTQ": "xcomposer2-vl", "AWQ": "xcomposer2d5"}.items():
        source = tiny.write_checkpoint(out / f"source {layout}", kind=kind)
        made[f"org/{layout}"], made[f"org/{layout} plain"] = packed_checkpoint(source, out, layout)
    return made


def ask(code, *arguments, home, address=None):
    """Run `code` in a process whose hub cache is empty, or filled by a run before; without an address: offline."""
    where = {"HF_HUB_OFFLINE": "1"} if address is None else {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address}
    paths = {"HF_HOME": str(home), "PYTHONPATH": str(REPO), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, **paths, **where}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["org/whole", "org/shards", "org/bins", "org/GPTQ", "org/AWQ"])
def test_it_is_fetched_and_loaded(name, repositories, tmp_path):
    """Then once more, without a hub: every file is in the cache; and each was fetched once."""
    twin = repositories.get(f"{name} plain", repositories[name])
    due = InternLMXComposer2ForCausalLM.from_pretrained(twin, dtype=torch.float32, task_adapters="all").state_dict()
    with serving(repositories) as hub:
        ran = ask(LOAD, name, tmp_path / "first.pt", "package", home=tmp_path / "home", address=hub.address)
    assert ran.returncode == 0, ran.stderr
    assert len(hub.fetched) == len(set(hub.fetched))
    again = ask(LOAD, name, tmp_path / "second.pt", "package", home=tmp_path / "home")
    assert again.returncode == 0, again.stderr
    for file in ("first.pt", "second.pt"):
        seen = torch.load(tmp_path / file)
        assert seen.keys() == due.keys() and all(torch.equal(values, due[key]) for key, values in seen.items())
    assert (tmp_path / "home" / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / COMMIT).is_dir()


def test_by_its_own_code(repositories, tmp_path):
    with serving(repositories) as hub:
        ran = ask(LOAD, "org/GPTQ", tmp_path / "seen.pt", "remote", home=tmp_path / "home", address=hub.address)
    assert ran.returncode == 0, ran.stderr
    due = InternLMXComposer2ForCausalLM.from_pretrained(
        repositories["org/GPTQ plain"], dtype=torch.float32
    ).state_dict()
    seen = torch.load(tmp_path / "seen.pt")
    assert all(torch.equal(values, due[name]) for name, values in seen.items())


WRONG = {
    "another packing": ("org/GPTQ", "quantize_config.json", {"bits": 8}, "packed in 8 bits (gptq)"),
    "a size": ("org/shards", "config.json", {"num_hidden_layers": 7}, "num_hidden_layers is 7"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_loaded_is_not_downloaded(case, repositories, tmp_path):
    name, file, change, message = WRONG[case]
    folder = shutil.copytree(repositories[name], tmp_path / "changed")
    fields = json.loads((folder / file).read_text("utf-8"))
    (folder / file).write_text(json.dumps({**fields, **change}), "utf-8")
    with serving({name: folder}) as hub:
        ran = ask(LOAD, name, tmp_path / "seen.pt", "package", home=tmp_path / "home", address=hub.address)
    assert ran.returncode == 1 and message in ran.stderr.splitlines()[-1], ran.stderr
    assert not [file for _, file in hub.fetched if file.endswith((".safetensors", ".bin"))]

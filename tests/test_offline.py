"""A machine without a network, a folder with an odd name, a fresh module cache: pictures, a video and text chat."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import GOLDEN, REPO, tiny

# Every way out raises, and is noted: code that catches the error has still tried.
BLOCKED = """
import socket, sys

tried = []

def refuse(*args, **kwargs):
    tried.append(args[1:] or args)
    raise OSError("no network here")

class Blocked(socket.socket):
    connect = connect_ex = sendto = bind = refuse

socket.socket = Blocked
socket.create_connection = socket.getaddrinfo = socket.gethostbyname = refuse
"""

CHATS = (
    BLOCKED
    + """
import torch
from transformers import AutoModel, AutoTokenizer

path, golden = sys.argv[1:]
model = AutoModel.from_pretrained(path, torch_dtype=torch.bfloat16, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
model.tokenizer = tokenizer
settings = dict(do_sample=False, max_new_tokens=4)
pictures = [f"{golden}/images/small_150x100.png", f"{golden}/images/small_56x56.png"]
videos = [f"{golden}/videos/clip_90f_30fps_320x240.mp4", f"{golden}/videos/tall_75f_25fps_160x288.mp4"]

answer, history = model.chat(tokenizer, "What is it?", pictures[:1], **settings)
answer, history = model.chat(tokenizer, "And this? <ImageHere>", pictures, history=[("<ImageHere>?", "a")], **settings)
answer, history = model.chat(tokenizer, "Image1 <ImageHere>; Image2 <ImageHere>; compare", pictures, **settings)
for video in videos:
    answer, history = model.chat(tokenizer, "What happens?", [video], **settings)
answer, history = model.chat(tokenizer, "Hello", **settings)
assert history == [("Hello", answer)], history
assert isinstance(model.write_artical("Write", max_new_tokens=2), str)
assert model.write_webpage("a page", max_new_tokens=2, output_path=None) is not None
assert not tried, tried
print("done")
"""
)

CLONE = (
    BLOCKED
    + """
parent, checkpoint, picture = sys.argv[1:]
sys.path.insert(0, parent)

from clone_of_ixc.modeling_internlm_xcomposer2 import InternLMXComposer2ForCausalLM
from clone_of_ixc.tokenization_internlm_xcomposer2 import InternLMXComposer2Tokenizer

model, report = InternLMXComposer2ForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
assert type(model).__module__ == "clone_of_ixc.modeling_internlm_xcomposer2", type(model)
assert type(model).__mro__[0] is InternLMXComposer2ForCausalLM
model.tokenizer = InternLMXComposer2Tokenizer.from_pretrained(checkpoint)
answer, history = model.eval().chat(None, "What is it?", [picture], do_sample=False, max_new_tokens=4)
assert history == [("What is it?", answer)]
model.save_pretrained(checkpoint + " saved")
again, report = InternLMXComposer2ForCausalLM.from_pretrained(checkpoint + " saved", output_loading_info=True)
assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
assert again.eval().chat(model.tokenizer, "What is it?", [picture], do_sample=False, max_new_tokens=4)[0] == answer
assert not tried, tried
print("done")
"""
)


def run(script, *arguments, home, cwd):
    """A user's machine: nothing says that it is offline, it just is."""
    env = {name: value for name, value in os.environ.items() if "OFFLINE" not in name and not name.startswith("HF_")}
    env.update(HF_HOME=str(home), HF_MODULES_CACHE=str(home / "modules"), OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, env=env, cwd=cwd
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "done"
    return done


def test_every_kind_of_chat(tmp_path):
    pytest.importorskip("av")
    folder = tiny.write_checkpoint(tmp_path / "IXC-2.5 test v1.0")
    done = run(CHATS, folder, GOLDEN, home=tmp_path / "home", cwd=tmp_path)
    for word in ("MISSING", "UNEXPECTED", "newly initialized", "Traceback"):
        assert word not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["IXC-2.5 test v1.0", "home"]  # nothing written here


def test_from_a_checkpoint_folder_as_the_working_directory(tmp_path):
    """`.` as the path: the folder has no name to go by."""
    pytest.importorskip("av")
    folder = tiny.write_checkpoint(tmp_path / "IXC-2.5 test v1.0")
    run(CHATS, ".", GOLDEN, home=tmp_path / "home", cwd=folder)


def test_import_from_a_clone(tmp_path):
    """The clone is a package by its folder's name: its parent goes on `sys.path`. No `trust_remote_code`."""
    clone = tmp_path / "code" / "clone_of_ixc"
    clone.mkdir(parents=True)
    for file in REPO.glob("*.py"):
        shutil.copyfile(file, clone / file.name)
    checkpoint = tiny.write_checkpoint(tmp_path / "IXC-2.5 weights v1.0", code="none")
    picture = GOLDEN / "images/small_150x100.png"
    run(CLONE, clone.parent, checkpoint, picture, home=tmp_path / "home", cwd=tmp_path)

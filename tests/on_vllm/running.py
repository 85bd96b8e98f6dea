"""What the tests on vLLM share: an engine in a process of its own, a server, and requests to it."""

import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from conftest import CLOSE, OPEN

HERE = Path(__file__).parent
TOKENS = 12
LENGTH = 2048
# Heads of 32, the smallest that vLLM's CPU kernels take; four layers, so that two stages have some each.
SIZES = {
    "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256,
    "num_hidden_layers": 4, "max_position_embeddings": LENGTH,
}  # fmt: skip
IMAGE, VIDEO = "[UNUSED_TOKEN_140]", "[UNUSED_TOKEN_139]"
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
OPTIONS = {"dtype": "float32", "max_num_seqs": 16, "gpu_memory_utilization": 0.05, "enforce_eager": True}
FLAGS = ["--host=127.0.0.1", "--dtype=float32", "--gpu-memory-utilization=0.05", "--enforce-eager"]


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8)


def prompt_of(body):
    return f"{OPEN}user\n{body}{CLOSE}\n{OPEN}assistant\n"


def run_engine(tmp_path, requests, environment=None, **options):
    """What one engine answers to the requests (see engine.py): two rounds of token ids; its adapters, its log."""
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"options": {**OPTIONS, **options}, "requests": requests, "tokens": TOKENS}), "utf-8")
    command = [sys.executable, str(HERE / "engine.py"), str(job)]
    environment = {**os.environ, **ENVIRONMENT, **(environment or {})}
    log = tmp_path / "log.txt"
    with log.open("w") as out:
        done = subprocess.run(command, env=environment, stdout=out, stderr=subprocess.STDOUT, timeout=900)
    said = log.read_text("utf-8")
    assert done.returncode == 0, said[-6000:]
    return {**json.loads(job.read_text("utf-8")), "log": said}


PLAIN = [str(Path(sys.executable).with_name("vllm")), "serve"]  # the command that users type
SERVE = [sys.executable, "-m", "xcomposer.serving.vllm_server"]


@contextmanager
def serving(command, log):
    """Address of a server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, f"--port={port}"], env={**os.environ, **ENVIRONMENT}, stdout=out, stderr=out
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text("utf-8")[-6000:]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def data_url(content, kind):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def image_item(file):
    return {"type": "image_url", "image_url": {"url": data_url(Path(file).read_bytes(), "image/png")}}


def content_of(body, images, mark=IMAGE):
    """The items of a message: the body's text, cut at its pictures' places."""
    content = []
    for number, piece in enumerate(body.split(mark)):
        content += [image_item(images[number - 1])] if number else []
        content += [{"type": "text", "text": piece}] if piece else []
    return content


def post(address, body):
    """Status and what is replied; text where it is refused."""
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def ask(server, content, model="chat", **fields):
    """Status and token ids, or status and message."""
    body = {
        "model": model, "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": TOKENS,
        "return_token_ids": True, **fields,
    }  # fmt: skip
    status, reply = post(f"{server}/v1/chat/completions", body)
    return status, reply["choices"][0]["token_ids"] if status == 200 else reply

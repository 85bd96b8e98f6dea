"""Run one vLLM engine, in a process of its own: `python engine.py JOB.json`; adds the answers to the file.

A job: "options" of `LLM`, "requests" (messages of a chat; or prompt, images: files, video: a .npy of frames, lora:
name, number, folder) and "tokens" to generate. Written back: "answers", the token ids of each request in two rounds,
and "adapters", the task adapters that are in memory.
"""

import json
import os
import sys
from pathlib import Path

os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # `apply_model` sends a function to the engine's own process


def task_adapters(model) -> list[str]:
    return sorted({name.split(".task_A.")[1] for name, _ in model.named_modules() if ".task_A." in name})


def main(path: str) -> None:
    import numpy as np
    from PIL import Image
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    job = json.loads(Path(path).read_text("utf-8"))
    llm = LLM(**job["options"])
    prompts, loras = [], []
    ask = llm.chat if "messages" in job["requests"][0] else llm.generate
    for request in job["requests"]:
        loras.append(LoRARequest(*request["lora"]) if request.get("lora") else None)
        if "messages" in request:
            prompts.append(request["messages"])
            continue
        data = {}
        if request.get("images"):
            data["image"] = [Image.open(file) for file in request["images"]]
        if request.get("video"):
            data["video"] = np.load(request["video"])
        prompts.append({"prompt": request["prompt"], "multi_modal_data": data})
    greedy = SamplingParams(temperature=0, max_tokens=job["tokens"])
    # One after the other too: what the caches keep of the first round must not change the second.
    rounds = [ask(prompts, greedy, lora_request=loras)]
    rounds.append([ask(p, greedy, lora_request=lora)[0] for p, lora in zip(prompts, loras, strict=True)])
    job["answers"] = [[list(output.outputs[0].token_ids) for output in outputs] for outputs in rounds]
    [job["adapters"], *_] = llm.apply_model(task_adapters)
    Path(path).write_text(json.dumps(job), encoding="utf-8")


if __name__ == "__main__":
    import engine  # by its name, so that the engine's process finds `task_adapters` by it

    engine.main(sys.argv[1])

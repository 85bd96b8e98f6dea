"""A folder as it is downloaded: weights, a flat config, a tokenizer of another name, and code that must not run."""

import json
import os
from pathlib import Path

from xcomposer.checkpoints import tiny

OLD_CODE = ("configuration_internlm_xcomposer2", "modeling_internlm_xcomposer2", "tokenization_internlm2", "ixc_utils")
AUTO_MAP = {
    "AutoConfig": "configuration_internlm_xcomposer2.InternLMXcomposer2Config",
    "AutoModel": "modeling_internlm_xcomposer2.InternLMXComposer2ForCausalLM",
    "AutoModelForCausalLM": "modeling_internlm_xcomposer2.InternLMXComposer2ForCausalLM",
}
TOKENIZER = {
    "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "model_max_length": 1000000000000000019884624838656,
    "pad_token": "</s>",
    "tokenizer_class": "InternLM2Tokenizer",
    "unk_token": "<unk>",
}


def write_released(out: str | os.PathLike, **kwargs) -> Path:
    """A tiny checkpoint with only the files that the release has. `kwargs` as `tiny.write_checkpoint` takes them."""
    folder = tiny.write_checkpoint(out, code="none", **kwargs)
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    fields.update(model_type="internlm2", auto_map=AUTO_MAP, use_cache=False)
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER), encoding="utf-8")
    for name in OLD_CODE:
        (folder / f"{name}.py").write_text("raise RuntimeError('the old code was run')\n", encoding="utf-8")
    return folder

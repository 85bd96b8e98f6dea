"""Make a tiny random checkpoint in the released layout: for tests, demos and trying tools without the 22 GB.

    python -m xcomposer.checkpoints.tiny OUT_DIR
    python -m xcomposer.checkpoints.tiny OUT_DIR --dtype bfloat16 --format bin --shards 3 --code link

Weights are rebuilt from their names (`seeded`), so two checkpoints of the same sizes are the same everywhere. The
vocabulary is a small SentencePiece model trained on the text below (about a second), or one you give.
"""

import argparse
import io
import json
import math
import os
import shutil
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from xcomposer.files import CODE as CODE_FOLDER
from xcomposer.files import code_files
from xcomposer.model.configuration_internlm_xcomposer2 import InternLMXcomposer2Config
from xcomposer.model.kinds_internlm_xcomposer2 import DEFAULT_KIND

DTYPES = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip
CODE = ("copy", "link", "none")
FORMATS = ("safetensors", "bin")
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json")

MARKERS = {"video_token_id": 139, "image_token_id": 140, "end": 145, "open": 146}
TINY: dict[str, Any] = {
    "model_type": "internlmxcomposer2",
    "architectures": ["InternLMXComposer2ForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_internlm_xcomposer2.InternLMXcomposer2Config",
        "AutoModel": "modeling_internlm_xcomposer2.InternLMXComposer2ForCausalLM",
        "AutoModelForCausalLM": "modeling_internlm_xcomposer2.InternLMXComposer2ForCausalLM",
    },
    "attn_implementation": "flash_attention_2",
    "bias": False,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 128,
    "max_length": 16384,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "use_cache": False,
    "plora_rank": 8,
    "plora_alpha": 8,
    "task_adapter_ranks": {"sft": 8, "dpo": 8, "web": 16},
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
}

# What the config.json of each kind of release says otherwise than `TINY`, in tiny sizes. None: says nothing of it.
_NO_TASKS: dict[str, Any] = {"task_adapter_ranks": None}
OF_KIND: dict[str, dict[str, Any]] = {
    "xcomposer2d5": {},
    "xcomposer2d5-ol": {**_NO_TASKS, "model_type": "internlm2"},
    "xcomposer2d5-reward": {**_NO_TASKS, "model_type": "internlm2"},
    "xcomposer2": {**_NO_TASKS, "img_size": 224, "max_length": 4096, "vision_config": {"image_size": 224}},
    "xcomposer2-vl": {**_NO_TASKS, "img_size": 70, "max_length": 4096, "vision_config": {"image_size": 70}},
    "xcomposer2-4khd": {
        **_NO_TASKS,
        "architectures": ["InternLM2ForCausalLM"],
        "rope_scaling": None,
        "plora_wqkv_rank": 2,
        "plora_wqkv_alpha": 4,
    },
}

# Tensors that a kind's release has beside the model's, with D for the decoder's width.
BESIDE: dict[str, dict[str, tuple[int | str, ...]]] = {
    "xcomposer2d5-ol": {
        "video_mem_proj.0.weight": ("D", 1536),
        "video_mem_proj.0.bias": ("D",),
        "video_mem_proj.2.weight": ("D", "D"),
        "video_mem_proj.2.bias": ("D",),
    },
}

TRAINING_TEXT = (
    "A small model reads a picture, cuts it into square tiles, and answers a question about what it sees.",
    "Describe this image in detail. What is written on the sign, and how many people are waiting in line?",
    "The first image shows a harbour at dawn; the second image shows the same harbour at night, in the rain.",
    "Please write an article about the history of paper, with a title, five paragraphs and a short ending.",
    "Compare the two charts: which of them grows faster after the year 2010, and by how much, in percent?",
    "She opened the window, looked at the garden, and said that the weather would be better in the evening.",
    "Generate a personal page using the content in the resume: name, school, work, skills and contact.",
    "The answer is 42. The other numbers are 3.14159, 1,000,000, 2.5e-3 and 0x1F; none of them is right.",
    "请详细描述这张图片的内容。图中有几个人？他们在做什么？",
    "这是一个很小的语言模型，只用来测试代码，它的回答没有任何意义。",
    "今天天气很好，我们一起去公园散步，看到了许多花和树，还有一只小狗在草地上跑。",
    "第一张图是早上的海港，第二张图是晚上的海港，两张图的颜色不同。",
    "给定文章，选择适合插入图像的段落，并写出图像对应的标题。",
    "根据给定上下文和候选图像，选择合适的配图。最合适的图是哪一张？",
    "数学题：三个苹果加上五个苹果，一共是多少个苹果？答案是八个苹果。",
    "def area(width, height):\n    return width * height\n\n\nfor i in range(10):\n    print(i, area(i, 2))\n",
    "class Tile:\n    def __init__(self, size):\n        self.size = size\n        self.pixels = [0] * (size * size)\n",
    '<div class="container mx-auto p-4">\n  <h1 class="text-2xl">Title</h1>\n  <p>Some text</p>\n</div>\n',
    "<html>\n<head>\n<script>\nfunction click() { return true; }\n</script>\n</head>\n</html>\n",
    "import json\nimport os\n\nwith open(path) as file:\n    data = json.load(file)\n\tif not data:\n\t\treturn None\n",
)


def seeded(name: str, shape: Sequence[int]) -> np.ndarray:
    """The float32 weight called `name`: normal numbers seeded by the CRC-32 of the name, scaled by its kind.

    Vectors of a norm lie around 1, biases around 0 by 0.1; embeddings and the image newline and separator (`GN`) have
    deviation 0.5; matrices keep the size of what passes through them, the output head doubles it (so that greedy
    choices are clear), and the upper half of an adapter (`_B`) is 0.7 of that.
    """
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tuple(shape), dtype=np.float32)
    per_output = 1.0 / math.sqrt(math.prod(shape[1:]))
    if len(shape) == 1 and name.endswith("weight"):
        return 1 + 0.1 * values
    if name.endswith("bias"):
        return 0.1 * values
    if "embed" in name or "GN" in name:
        return 0.5 * values
    if name == "output.weight":
        return values * (2.0 / math.sqrt(shape[1]))
    return values * (0.7 * per_output if "_B.weight" in name else per_output)


def _decoder_shapes(text) -> dict[str, tuple[int, ...]]:
    hidden, inner = text.hidden_size, text.intermediate_size
    heads_out = text.num_attention_heads * text.head_dim
    task_ranks = {f"lora_{name}": rank for name, rank in text.task_adapter_ranks.items()}
    linears = {  # out, in; wqkv: for each KV head its query heads, then its key, then its value
        "attention.wqkv": (heads_out + 2 * text.num_key_value_heads * text.head_dim, hidden),
        "attention.wo": (hidden, heads_out),
        "feed_forward.w1": (inner, hidden),
        "feed_forward.w3": (inner, hidden),
        "feed_forward.w2": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.tok_embeddings.weight": (text.vocab_size, hidden)}
    for layer in range(text.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for name, (width_out, width_in) in linears.items():
            shapes[f"{prefix}{name}.weight"] = (width_out, width_in)
            for adapter, rank in {"Plora": text.plora_of(name.split(".")[1])[0], **task_ranks}.items():
                shapes[f"{prefix}{name}.{adapter}_A.weight"] = (rank, width_in)
                shapes[f"{prefix}{name}.{adapter}_B.weight"] = (width_out, rank)
        shapes[f"{prefix}attention_norm.weight"] = shapes[f"{prefix}ffn_norm.weight"] = (hidden,)
    return {**shapes, "model.norm.weight": (hidden,)}


def _vision_shapes(vision) -> dict[str, tuple[int, ...]]:
    width, inner, patch = vision.hidden_size, vision.intermediate_size, vision.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "embeddings.position_embedding.weight": ((vision.image_size // patch) ** 2 + 1, width),
    }
    linears = {
        **{f"self_attn.{name}_proj": (width, width) for name in ("k", "v", "q", "out")},
        "mlp.fc1": (inner, width),
        "mlp.fc2": (width, inner),
    }
    for layer in range(vision.num_hidden_layers):
        prefix = f"encoder.layers.{layer}."
        for name, (width_out, width_in) in linears.items():
            shapes[f"{prefix}{name}.weight"] = (width_out, width_in)
            shapes[f"{prefix}{name}.bias"] = (width_out,)
        for norm in ("layer_norm1", "layer_norm2"):
            shapes[f"{prefix}{norm}.weight"] = shapes[f"{prefix}{norm}.bias"] = (width,)
    for norm in ("pre_layrnorm", "post_layernorm"):  # the first is spelled so
        shapes[f"{norm}.weight"] = shapes[f"{norm}.bias"] = (width,)
    return {f"vit.vision_tower.vision_model.{name}": shape for name, shape in shapes.items()}


def released_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every parameter of the released layout, by its name on disk, for the fields of a `config.json`.

    What `config` leaves out is the 7B release's.

    Raises:
        ValueError: sizes that do not fit each other (see `InternLMXcomposer2Config`).
    """
    sizes = InternLMXcomposer2Config(**config)
    hidden, merged = sizes.text_config.hidden_size, sizes.merged_width
    heads = {"vocabulary": ("output.weight", sizes.text_config.vocab_size), "score": ("score.weight", 1)}
    head, rows = heads[sizes.head]
    separators = {"plora_glb_GN": (1, 1, merged), "plora_sub_GN": (1, 1, 1, merged)}
    return {
        **(separators if sizes.image_separators else {}),
        **_decoder_shapes(sizes.text_config),
        head: (rows, hidden),
        **_vision_shapes(sizes.vision_config),
        "vision_proj.0.weight": (hidden, merged),
        "vision_proj.0.bias": (hidden,),
        "vision_proj.2.weight": (hidden, hidden),
        "vision_proj.2.bias": (hidden,),
    }


def train_tokenizer(pieces: int = 1000) -> bytes:
    """A SentencePiece model of `pieces` pieces with the release's settings and markers, the same bytes each time.

    Raises:
        ValueError: `pieces` is too few for the bytes, markers and characters, or more than the text gives.
    """
    import sentencepiece

    wide = [chr(code) for first in "Ａａ" for code in range(ord(first), ord(first) + 3)]  # the release has them all
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TRAINING_TEXT), model_writer=model, model_type="bpe", vocab_size=pieces,
            byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity", add_dummy_prefix=False,
            remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, max_sentence_length=10000, num_threads=1,
            user_defined_symbols=[*wide, *(f"[UNUSED_TOKEN_{number}]" for number in MARKERS.values())],
            minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        raise ValueError(f"a vocabulary of {pieces} pieces cannot be trained on the bundled text: {error}") from error
    return model.getvalue()


def _token_ids(tokenizer_model: bytes) -> tuple[int, dict[str, int]]:
    """Number of pieces, and the ids that configs need, of a SentencePiece model."""
    import sentencepiece

    vocabulary = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model)
    names = {
        "bos_token_id": "<s>",
        "eos_token_id": "</s>",
        "pad_token_id": "</s>",
        **{key: f"[UNUSED_TOKEN_{number}]" for key, number in MARKERS.items()},
    }
    ids = {key: vocabulary.piece_to_id(name) for key, name in names.items()}
    missing = sorted({names[key] for key, index in ids.items() if index == vocabulary.unk_id()})
    if missing:
        raise ValueError(f"the given SentencePiece model lacks {', '.join(missing)}; use one of this model family")
    return vocabulary.get_piece_size(), ids


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _split(weights: Mapping[str, torch.Tensor], shards: int) -> list[dict[str, torch.Tensor]]:
    """`weights` in order, in `shards` parts of about equal bytes, none empty."""
    if not 1 <= shards <= len(weights):
        raise ValueError(f"shards must lie between 1 and {len(weights)}, the number of tensors, got {shards}")
    total = sum(tensor.nbytes for tensor in weights.values())
    parts: list[dict[str, torch.Tensor]] = [{}]
    seen = 0
    for done, (name, tensor) in enumerate(weights.items()):
        left = len(weights) - done
        due = seen >= total * len(parts) / shards or left <= shards - len(parts)
        if parts[-1] and len(parts) < shards and due:
            parts.append({})
        parts[-1][name] = tensor
        seen += tensor.nbytes
    return parts


def write_weights(out: Path, weights: Mapping[str, torch.Tensor], shards: int = 1, fmt: str = "safetensors") -> None:
    """Write `weights` under the file names transformers looks for, with an index when there is more than one shard."""
    stem, suffix = {"safetensors": ("model", "safetensors"), "bin": ("pytorch_model", "bin")}[fmt]
    parts = _split(weights, shards)
    where = {}
    for number, part in enumerate(parts, start=1):
        file = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{number:05d}-of-{shards:05d}.{suffix}"
        if fmt == "safetensors":
            save_file(part, out / file, metadata={"format": "pt"})
        else:
            torch.save(part, out / file)
        where.update(dict.fromkeys(part, file))
    if shards > 1:
        total = sum(tensor.nbytes for tensor in weights.values())
        _write_json(out / f"{stem}.{suffix}.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def _place(out: Path, files: Sequence[Path], link: bool) -> None:
    for source in files:
        if link:
            (out / source.name).symlink_to(source)
        else:
            shutil.copyfile(source, out / source.name)


def tiny_config(
    config: Mapping[str, Any] | None, vocab_size: int, dtype: str, ids: Mapping[str, int], kind: str = DEFAULT_KIND
) -> dict:
    """The flat released-style `config.json`: `TINY`, the kind's own fields, the repo's own `auto_map`, then `config`.

    A field that is None in `OF_KIND` is left out.
    """
    if kind not in OF_KIND:
        raise ValueError(f"kind must be one of {', '.join(OF_KIND)}, got {kind!r}")
    released = CODE_FOLDER / "config.json"
    auto_map = json.loads(released.read_text("utf-8")).get("auto_map", {}) if released.is_file() else {}
    token_ids = {key: index for key, index in ids.items() if key.endswith("_token_id")}
    merged = {
        **TINY,
        "auto_map": {**TINY["auto_map"], **auto_map},
        "vocab_size": vocab_size,
        "torch_dtype": dtype,
        **token_ids,
        **OF_KIND[kind],
        **(config or {}),
    }
    vision = {**OF_KIND[kind].get("vision_config", {}), **((config or {}).get("vision_config") or {})}
    merged["vision_config"] = {**TINY["vision_config"], **vision}
    return {name: value for name, value in merged.items() if value is not None or name == "rope_scaling"}


def write_checkpoint(
    out: str | os.PathLike,
    config: Mapping[str, Any] | None = None,
    vocab_size: int | None = None,
    dtype: str | torch.dtype = "float32",
    shards: int = 1,
    fmt: str = "safetensors",
    code: str = "copy",
    tokenizer_model: str | os.PathLike | None = None,
    kind: str = DEFAULT_KIND,
) -> Path:
    """Write a random checkpoint to the empty or new folder `out`, and return its path.

    Args:
        config: fields of `config.json` that differ from `TINY` (`vision_config` field by field).
        vocab_size: rows of the embedding and the head; default: as many as the vocabulary has pieces.
        dtype: of the weights: a key of `DTYPES` or a torch dtype.
        shards, fmt: number of weight files, and "safetensors" or "bin".
        code: "copy" or "link" the repo's Python and processor files into `out`, or "none" of them.
        kind: which release it is like, a key of `OF_KIND`.
        tokenizer_model: a SentencePiece file to use; default: a vocabulary trained here (`train_tokenizer`).

    Raises:
        FileExistsError: `out` has files in it.
        ValueError: an unknown choice, a vocabulary larger than `vocab_size` or without the markers, sizes that do not
            fit each other.
    """
    dtype = str(dtype).removeprefix("torch.")
    for name, value, known in (("dtype", dtype, DTYPES), ("fmt", fmt, FORMATS), ("code", code, CODE)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; name a new folder")
    model = train_tokenizer() if tokenizer_model is None else Path(tokenizer_model).read_bytes()
    pieces, ids = _token_ids(model)
    rows = pieces if vocab_size is None else vocab_size
    if rows < pieces:
        raise ValueError(f"vocab_size {rows} is smaller than the vocabulary of {pieces} pieces")
    fields = tiny_config(config, rows, str(DTYPES[dtype]).removeprefix("torch."), ids, kind)
    shapes = released_shapes({"kind": kind, **fields})  # a release's config does not say its kind
    for name, shape in BESIDE.get(kind, {}).items():
        shapes[name] = tuple(fields["hidden_size"] if size == "D" else int(size) for size in shape)
    weights = {name: torch.from_numpy(seeded(name, shape)).to(DTYPES[dtype]) for name, shape in shapes.items()}

    out.mkdir(parents=True, exist_ok=True)
    write_weights(out, weights, shards, fmt)
    _write_json(out / "config.json", fields)
    stops = {"bos_token_id": ids["bos_token_id"], "pad_token_id": ids["pad_token_id"]}
    _write_json(out / "generation_config.json", {**stops, "eos_token_id": [ids["eos_token_id"], ids["end"]]})
    (out / "tokenizer.model").write_bytes(model)
    _place(out, [path for name in TOKENIZER_FILES if (path := CODE_FOLDER / name).is_file()], link=False)
    if code != "none":
        _place(out, code_files(), link=code == "link")
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", metavar="OUT_DIR", help="new or empty folder")
    parser.add_argument("--vocab-size", type=int, help="rows of embedding and head (default: as the vocabulary)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--shards", type=int, default=1, help="number of weight files")
    parser.add_argument("--format", dest="fmt", choices=FORMATS, default="safetensors")
    parser.add_argument("--code", choices=CODE, default="copy", help="the repo's Python and processor files beside it")
    parser.add_argument("--kind", choices=list(OF_KIND), default=DEFAULT_KIND, help="which release it is like")
    parser.add_argument("--tokenizer-model", help="a SentencePiece file (default: train a small one)")
    parser.add_argument("--config", type=json.loads, help="fields to change, as JSON: '{\"num_hidden_layers\": 4}'")
    options = vars(parser.parse_args(arguments))
    try:
        print(write_checkpoint(**options))
    except (OSError, ValueError) as error:
        print(f"tiny: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Write a checkpoint in fewer bits: the decoder's own linears; vision, partial LoRA and task adapters stay as they are.

    xcomposer quantise FOLDER OUT --scheme w4a16 --calibration data.json
    xcomposer quantise FOLDER OUT --scheme w4a16
    xcomposer quantise FOLDER OUT --scheme fp8

    w4a16      4-bit weights in groups, calibrated by GPTQ (arXiv:2210.17323); llm-compressor
    w4a16-rtn  the same, each weight rounded to the nearest, without calibration; llm-compressor
    fp8        8-bit floating weights, and activations rounded as they come; llm-compressor
    nf4        4-bit normal floats, without calibration; bitsandbytes

w4a16 and fp8 are written in the compressed-tensors format, which transformers and vLLM load. Calibration reads the
fine-tuning formats (pictures included; without DATA, rows of the toy world that the package brings) and goes through
the decoder layer by layer: memory holds the checkpoint without its task adapters, the hidden states of the calibration
rows and what one layer needs. OUT appears when all of it is written.
"""

import argparse
import importlib.util
import json
import logging
import random
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, BitsAndBytesConfig

from xcomposer.checkpoints.merge import copy_files, new_folder, read_config, write_json
from xcomposer.machine import quiet_imports
from xcomposer.model.weight_files_internlm_xcomposer2 import NoWeights, WeightFiles, count, some

logger = logging.getLogger(__name__)

LINEARS = r"re:.*\.(wqkv|wo|w1|w2|w3)\.linear$"
# What vLLM must not look a scheme up for.
SPARED = [r"re:.*lm_head$", r"re:.*vision_tower\..*", r"re:.*vision_proj\..*", r"re:.*(Plora|task)_[AB].*"]
BESIDE = re.compile(r"(\.(?:wqkv|wo|w1|w2|w3))\.(weight_(?:packed|scale|shape|zero_point|g_idx))$")
SHARD = "4GB"
DEFAULT_CALIBRATION = Path(__file__).with_name("calibration.jsonl")  # python -m toyworld.calibration writes it
GROUP_SIZE = 128
ROWS = 128
MAX_TOKENS = 2048


class Request(NamedTuple):
    """What is asked for."""

    source: Path
    calibration: Path | None
    image_folder: Path | None
    rows: int
    max_tokens: int
    group_size: int
    seed: int


def load(source: Path, **options: Any) -> nn.Module:
    """The whole model in its own dtype; task adapters stay on disk, and are written out from there."""
    with quiet_imports():
        from xcomposer.model.modeling_internlm_xcomposer2 import InternLMXComposer2ForCausalLM

    model = InternLMXComposer2ForCausalLM.from_pretrained(source, dtype="auto", **options)
    return model.eval()


def tiles_that_fit(layout: Any, max_tokens: int) -> int:
    """Most tiles of a picture that leave a quarter of `max_tokens` to the text, 1 at least."""
    fitting = (n for n in range(layout.default_hd_num(1), 1, -1) if layout.tokens(n, 1) <= max_tokens * 3 // 4)
    return next(fitting, 1)


def read_calibration(request: Request) -> list[Any]:
    """Rows in the fine-tuning formats, in an order that the seed gives.

    Raises:
        FileNotFoundError: no such file. ValueError: a row that cannot be read.
    """
    from xcomposer.finetune.formats import BadRow, read_rows

    rows = read_rows(request.calibration, request.image_folder)
    bad = [f"{row.name}: {row.reason}" for row in rows if isinstance(row, BadRow)]
    if bad:
        raise ValueError(f"{request.calibration}: {count(len(bad), 'bad row')}: {some(bad)}")
    random.Random(request.seed).shuffle(rows)
    return rows


def calibration_rows(model: Any, rows: Sequence[Any], request: Request) -> list[dict[str, Tensor]]:
    """Embeddings (1, T, D) and image masks (1, T) of the first `request.rows` rows that are not too long.

    Raises:
        ValueError: a picture that cannot be read; all rows are longer than `max_tokens`.
    """
    from xcomposer.finetune.data import Collator, Encoder

    tokenizer = AutoTokenizer.from_pretrained(request.source)
    encoder = Encoder(model.config, tokenizer, hd_num=tiles_that_fit(model.config.layout, request.max_tokens))
    collate, device, prepared, passed = Collator(encoder), model.get_input_embeddings().weight.device, [], 0
    for row in rows:
        batch = collate([encoder(row)])
        if batch["input_ids"].shape[1] > request.max_tokens:
            passed += 1
            continue
        batch = {name: values.to(device) for name, values in batch.items()}
        types = batch["mm_token_type_ids"]
        pictures = {name: batch[name] for name in ("pixel_values", "image_grid_thw") if name in batch}
        with torch.no_grad():
            embeds = model.model.prompt_embeddings(batch["input_ids"], **pictures, mm_token_type_ids=types).read()
        prepared.append({"inputs_embeds": embeds.cpu(), "image_mask": (types > 0).cpu()})
        if len(prepared) == request.rows:
            break
    if not prepared:
        raise ValueError(f"every row of {request.calibration} is longer than {request.max_tokens} tokens; raise it")
    if passed:
        logger.warning("%s longer than %d tokens passed over", count(passed, "row"), request.max_tokens)
    return prepared


def check_group_size(model: Any, group_size: int) -> None:
    """Raise a ValueError where inputs do not split into groups, or not as the 4-bit kernels want them."""
    widths = sorted({module.weight.shape[1] for name, module in model.named_modules() if is_quantised(name)})
    odd = [width for width in widths if group_size < 1 or width % group_size or width % 32]
    if odd:
        raise ValueError(
            f"group size {group_size} does not fit linears of {some(map(str, odd))} inputs: it must divide them "
            f"(multiples of 32); try --group-size {2 ** max(5, min((w & -w).bit_length() - 1 for w in widths))}"
        )


def is_quantised(name: str) -> bool:
    """Whether `name` is one of the linears that are quantised."""
    return re.match(LINEARS.removeprefix("re:"), name) is not None


def compress(request: Request, modifier: Callable[[], Any], rows: Any, model: Any) -> Any:
    """Quantise the decoder of `model` in place, with calibration rows layer by layer, or without any."""
    from llmcompressor import oneshot
    from llmcompressor.transformers.compression.compressed_tensors_utils import modify_save_pretrained
    from torch.utils.data import DataLoader

    decoder = model.model.language_model
    decoder.name_or_path = decoder.config._name_or_path = str(request.source)  # the library asks for a config there
    options: dict[str, Any] = {"recipe": modifier(), "log_dir": None, "pipeline": "datafree"}
    if rows is not None:
        options |= {
            "dataset": DataLoader(rows, batch_size=None),
            "processor": AutoTokenizer.from_pretrained(request.source),
            "num_calibration_samples": len(rows),
            "pipeline": "sequential",
            "sequential_targets": ["DecoderLayer"],
        }
    oneshot(model=decoder, **options)
    modify_save_pretrained(model)
    return model


def groups_of_4_bits(group_size: int) -> dict[str, Any]:
    """The 4-bit format as llm-compressor's modifiers take it: symmetric integers, a scale for each group of inputs."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=group_size)
    return {"group_0": QuantizationScheme(targets=[LINEARS], weights=weights)}


def w4a16(request: Request) -> Any:
    """GPTQ: each weight column is rounded and the error spread over the columns that follow."""
    read = read_calibration(request)  # first: a bad row is known before the weights are read
    from llmcompressor.modifiers.gptq import GPTQModifier

    model = load(request.source)
    check_group_size(model, request.group_size)
    groups, rows = groups_of_4_bits(request.group_size), calibration_rows(model, read, request)
    return compress(request, lambda: GPTQModifier(config_groups=groups), rows, model)


def w4a16_rtn(request: Request) -> Any:
    """Each weight to the nearest of its group's 16 values."""
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model = load(request.source)
    check_group_size(model, request.group_size)
    groups = groups_of_4_bits(request.group_size)
    return compress(request, lambda: QuantizationModifier(config_groups=groups), None, model)


def fp8(request: Request) -> Any:
    """E4M3 weights with a scale for each output; activations get one for each token as they come."""
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model = load(request.source)
    return compress(request, lambda: QuantizationModifier(targets=[LINEARS], scheme="FP8_DYNAMIC"), None, model)


def nf4(request: Request) -> Any:
    """bitsandbytes' 4-bit normal floats in blocks of 64."""
    fields = read_config(request.source)
    dtype = fields.get("dtype") or fields.get("torch_dtype") or "bfloat16"
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return load(request.source, quantization_config=settings)


class Scheme(NamedTuple):
    """A way to fewer bits: the package it needs, and what makes a quantised model of a request."""

    package: str
    install: str
    run: Callable[[Request], Any]


SCHEMES = {
    "w4a16": Scheme("llmcompressor", "pip install llmcompressor", w4a16),
    "w4a16-rtn": Scheme("llmcompressor", "pip install llmcompressor", w4a16_rtn),
    "fp8": Scheme("llmcompressor", "pip install llmcompressor", fp8),
    "nf4": Scheme("bitsandbytes", "pip install bitsandbytes", nf4),
}


def quantise(
    source: Path,
    target: Path,
    scheme: str,
    calibration: Path | None = None,
    image_folder: Path | None = None,
    rows: int = ROWS,
    max_tokens: int = MAX_TOKENS,
    group_size: int = GROUP_SIZE,
    seed: int = 0,
) -> Path:
    """Write the checkpoint `source` quantised to the new folder `target`; returns it.

    Args:
        scheme: a key of `SCHEMES`.
        calibration: a file in one of the fine-tuning formats, for w4a16; None: `DEFAULT_CALIBRATION`. The others take
            none.
        image_folder: where its pictures lie; default: beside it, and here.
        rows, max_tokens: how many rows are used, and how long they may be; longer ones are passed over.
        group_size: weights that share a scale (w4a16, w4a16-rtn).

    Raises:
        ValueError: an unknown scheme; a source that is quantised or unusable; bad rows; a group size that does not fit.
        ImportError: the scheme's package is not installed; says how to get it.
        FileNotFoundError: no checkpoint or no data. FileExistsError: `target` has files in it.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    if rows < 1 or max_tokens < 1:
        raise ValueError(f"rows and max_tokens must be above 0, got {rows} and {max_tokens}")
    if scheme == "w4a16":
        calibration = calibration or DEFAULT_CALIBRATION
    elif calibration is not None:
        raise ValueError(f"{scheme} is computed from the weights alone and takes no --calibration; leave it out")
    if importlib.util.find_spec(SCHEMES[scheme].package) is None:
        raise ImportError(f"{scheme} needs {SCHEMES[scheme].package}: {SCHEMES[scheme].install}")
    read_config(source)
    try:
        packing = WeightFiles(source).packing
    except NoWeights as error:
        raise FileNotFoundError(f"{source} holds no weights: {error}") from error
    if packing is not None:
        raise ValueError(f"{source} is quantised already: {packing}; take the full-precision checkpoint")
    request = Request(source, calibration, image_folder, rows, max_tokens, group_size, seed)
    with new_folder(source, target) as part:
        model = SCHEMES[scheme].run(request)
        copy_files(source, part)
        model.save_pretrained(part, max_shard_size=SHARD)
        name_what_is_spared(part / "config.json")
        name_beside_linears(part)
    return target


def name_what_is_spared(path: Path) -> None:
    """Put patterns in place of the names that llm-compressor lists: those are the released ones, no module's."""
    config = json.loads(path.read_text("utf-8"))
    settings = config["quantization_config"]
    if settings["quant_method"] == "compressed-tensors":
        settings["ignore"] = SPARED
        write_json(path, config)


def name_beside_linears(folder: Path) -> None:
    """Give what lies beside a packed weight the module's own name, `wqkv.linear.weight_scale`.

    Saving leaves `linear` out of it, as of the weight's; loading puts it back for the weight alone.
    """

    def spelled(name: str) -> str:
        return BESIDE.sub(r"\1.linear.\2", name)

    for path in sorted(folder.glob("*.safetensors")):
        tensors = {spelled(name): tensor for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        fields = json.loads(index.read_text("utf-8"))
        fields["weight_map"] = {spelled(name): file for name, file in fields["weight_map"].items()}
        write_json(index, fields)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="example: xcomposer quantise FOLDER OUT --scheme w4a16 --calibration data.json",
        prog="xcomposer quantise",
    )
    parser.add_argument("source", metavar="FOLDER", type=Path, help="a checkpoint in full precision")
    parser.add_argument("target", metavar="OUT", type=Path, help="new or empty folder")
    parser.add_argument("--scheme", required=True, choices=SCHEMES, help="w4a16 is calibrated; nf4 is of bitsandbytes")
    parser.add_argument(
        "--calibration", type=Path, metavar="DATA",
        help="rows in a fine-tuning format for w4a16, like those the model will see (default: of the toy world)",
    )  # fmt: skip
    parser.add_argument("--image-folder", type=Path, help="where the rows' pictures lie (default: beside DATA)")
    parser.add_argument("--rows", type=int, default=ROWS, help="rows to use, picked at random (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS, help="of a row (default %(default)s)")
    parser.add_argument("--group-size", type=int, default=GROUP_SIZE, help="of w4a16 (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of rows (default %(default)s)")
    try:
        print(quantise(**vars(parser.parse_args(argv))))
    except (OSError, ValueError, ImportError) as error:
        print(f"quantise: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

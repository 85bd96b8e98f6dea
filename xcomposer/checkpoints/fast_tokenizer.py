"""Write `tokenizer.json` from a released `tokenizer.model`, checked against SentencePiece.

    python -m xcomposer.checkpoints.fast_tokenizer MODEL_DIR            # beside MODEL_DIR/tokenizer.model
    python -m xcomposer.checkpoints.fast_tokenizer tokenizer.model --out DIR

With it the tokenizer loads faster, and without sentencepiece, protobuf or remote code: the `tokenizer_config.json`
written beside it names `PreTrainedTokenizerFast`. `--json-only` leaves `tokenizer_config.json` as it is (this repo's
own works beside a `tokenizer.json` too).
"""

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from xcomposer.model.tokenization_internlm_xcomposer2 import SPACE, backend_from_sentencepiece

TOKENIZER_CONFIG: dict[str, Any] = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "model_max_length": 1000000000000000019884624838656,
    "pad_token": "</s>",
    "padding_side": "left",
    "tokenizer_class": "PreTrainedTokenizerFast",
    "unk_token": "<unk>",
}

PROSE = (
    "",
    " ",
    "Describe this image in detail.",
    "请详细描述这张图片，并说明第2张图与第1张图的差别。",
    "  leading, double  inner and trailing spaces   ",
    "def area(w: int, h: int) -> int:\n\treturn w * h  # tabs\n\n\nprint(area(3, 4))\r\n",
    '<!DOCTYPE html>\n<div class="p-4 mt-2"><a href="https://example.org/?q=1&amp;r=%20">x</a></div>',
    "[UNUSED_TOKEN_146]user\n你好[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\n",
    "[UNUSED_TOKEN_14][UNUSED_TOKEN_1455]] [UNUSED_TOKEN_147] <ImageHere><0x0A>",
    "Ｆｕｌｌｗｉｄｔｈ ａｎｄ half, ﬁ ligature, e\u0301 combining, Ω Ω, ½, ①",
    "👩\u200d👩\u200d👧\u200d👦 🇨🇳 🏳️\u200d🌈 ✌🏽 😀😀😀",
    "\x00\x01\x07\x1b[0m\x7f\u2028\u00a0\u3000\ufeff\u200b",
    "▁ a literal lower block ▁▁",
    "Ελληνικά, русский, العربية, עברית, हिन्दी, ไทย, 한국어, 日本語, ꦗꦮ, 𝔐𝕒𝕥𝕙, 𠮷野家",
    "3.14159 1e-5 2025-01-01 100,000 0xFF ∑ᵢ xᵢ² ≤ √n",
)


def mixed_corpus(pieces: Sequence[str], count: int = 2000, seed: int = 0) -> list[str]:
    """`count` texts, the same for the same arguments: `PROSE`, then random mixtures.

    A mixture strings together `pieces` of the vocabulary (which is what finds a wrong merge order), runs of white space
    and of repeated characters, and characters from all of Unicode.
    """
    rng = random.Random(seed)
    sources = (
        *[lambda: rng.choice(pieces)] * 4,
        *[lambda: rng.choice(PROSE)[: rng.randint(0, 40)]] * 2,
        lambda: rng.choice(" \n\t") * rng.randint(1, 40),
        lambda: rng.choice("aeo=-_*#.0哈") * rng.randint(1, 70),
        lambda: chr(rng.randint(0, 31)),
        lambda: chr(rng.randint(0, 0xD7FF)),
        lambda: chr(rng.randint(0x4E00, 0x9FFF)),
        lambda: chr(rng.randint(0x1F300, 0x1FAFF)),
    )
    mixtures = ["".join(rng.choice(sources)() for _ in range(rng.randint(1, 30))) for _ in range(count - len(PROSE))]
    return [*PROSE, *mixtures][:count]


def load_sentencepiece(path: str | os.PathLike):
    """A `SentencePieceProcessor` and its normal and user-defined pieces as text."""
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    plain = [
        index
        for index in range(reference.get_piece_size())
        if not (reference.is_control(index) or reference.is_byte(index) or reference.is_unknown(index))
    ]
    return reference, [reference.id_to_piece(index).replace(SPACE, " ") for index in plain]


def differences(backend: Tokenizer, reference, texts: Iterable[str]) -> list[str]:
    """One line for each text that `backend` encodes or decodes otherwise than SentencePiece.

    Texts that spell out a control piece (`<s>`) are passed over: there the two differ by intent.
    """
    control = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
    found = []
    for text in texts:
        if any(name in text for name in control):
            continue
        want = reference.encode(text)
        got = backend.encode(text, add_special_tokens=False).ids
        if got != want:
            found.append(f"{text!r} encodes to {got}, SentencePiece gives {want}")
        elif backend.decode(want, skip_special_tokens=False) != reference.decode(want):
            found.append(f"{want} decodes to {backend.decode(want)!r}, SentencePiece gives {reference.decode(want)!r}")
    return found


def fast_tokenizer(model_file: str | os.PathLike, count: int = 2000) -> Tokenizer:
    """The checked backend for `model_file`, with BOS in front.

    Raises:
        ValueError: `model_file` cannot be converted, or a text comes out otherwise than from SentencePiece.
    """
    backend = backend_from_sentencepiece(model_file)
    bos, bos_id = TOKENIZER_CONFIG["bos_token"], backend.token_to_id(TOKENIZER_CONFIG["bos_token"])
    if bos_id is None:
        raise ValueError(f"{model_file} has no piece {bos!r}, which begins every prompt of this model")
    backend.post_processor = TemplateProcessing(
        single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
    )
    backend = Tokenizer.from_str(backend.to_str())  # check what will be read back
    reference, pieces = load_sentencepiece(model_file)
    found = differences(backend, reference, mixed_corpus(pieces, count))
    if found:
        raise ValueError(f"{len(found)} of {count} texts differ from SentencePiece, nothing written; first: {found[0]}")
    return backend


def write_atomically(path: Path, text: str) -> None:
    """Write `text` beside `path`, then move it there: a reader sees the old file or the new one, never half of it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide the file from a server's user
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def convert(
    source: str | os.PathLike, out: str | os.PathLike | None = None, force: bool = False, json_only: bool = False
) -> list[Path]:
    """Write the two files and return their paths. See `main` for the arguments.

    Raises:
        FileNotFoundError: `source` is neither a `tokenizer.model` nor a folder that has one.
        FileExistsError: a file to write is there with other contents, and `force` is False; nothing is written then.
        ValueError: as `fast_tokenizer`.
    """
    source = Path(source)
    model_file = source / "tokenizer.model" if source.is_dir() else source
    if not model_file.is_file():
        raise FileNotFoundError(f"{model_file} does not exist; name a tokenizer.model or a folder that has one")
    folder = Path(out) if out is not None else model_file.parent
    texts = {"tokenizer.json": fast_tokenizer(model_file).to_str(pretty=False)}
    if not json_only:
        texts["tokenizer_config.json"] = json.dumps(TOKENIZER_CONFIG, indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    differing = {
        name for name, text in texts.items() if (folder / name).exists() and (folder / name).read_text("utf-8") != text
    }
    if differing and not force:
        hint = " (--json-only leaves tokenizer_config.json as it is)" if "tokenizer_config.json" in differing else ""
        raise FileExistsError(f"{folder} has other {' and '.join(sorted(differing))}; --force replaces them{hint}")
    for name, text in texts.items():
        if name in differing or not (folder / name).exists():
            write_atomically(folder / name, text)
    return [folder / name for name in texts]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", metavar="MODEL_DIR_OR_FILE", help="folder with a tokenizer.model, or the file itself")
    parser.add_argument("--out", help="folder to write to (default: where tokenizer.model is)")
    parser.add_argument("--force", action="store_true", help="replace files that are there with other contents")
    parser.add_argument("--json-only", action="store_true", help="write tokenizer.json alone")
    options = parser.parse_args(arguments)
    try:
        written = convert(options.source, options.out, force=options.force, json_only=options.json_only)
    except (ImportError, OSError, ValueError) as error:
        print(f"fast_tokenizer: {error}", file=sys.stderr)
        return 1
    for path in written:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

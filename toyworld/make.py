"""Before and after training: the vocabulary, the untrained model, and the checkpoint in the released layout."""

import io
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase

import torch
from torch import nn
from transformers import AutoModel

from toyworld import scenes
from toyworld.articles import constant_pieces
from toyworld.pages import PIECES as PAGE_PIECES
from toyworld.pages import PROMPTS
from toyworld.recipe import CONFIG, PIECES
from toyworld.views import MARK
from toyworld.world import COLOUR_ZH, COLOURS, PLACE_ZH, PLACES, SHAPE_ZH, SHAPES
from xcomposer.checkpoints.tiny import MARKERS, write_checkpoint

REPO = Path(__file__).resolve().parents[1]

NAMES = ("InternLM-XComposer", "浦语·灵笔")
ROLES = ("system", "user", "assistant")
# Not for the vocabulary: answers that are characters in no order (merges would hide single characters), and the long
# prompts of pages.
UNREAD = ("read12", "read35", "tiles", "screen", "script", "resume")


def english() -> list[str]:
    """Words that are one token at the beginning of a text, and one after a space."""
    return [*COLOURS, *SHAPES, *dict.fromkeys(word for place in PLACES for word in place.split())]


def chinese() -> list[str]:
    """Words that are one token wherever they stand, so that what a picture shows and what is asked are the same."""
    return [*(f"{colour}色" for colour in COLOUR_ZH.values()), *SHAPE_ZH.values(), *PLACE_ZH]


def sentences(views: int = 150, seed: int = 0) -> list[str]:
    """Texts of the world, for the vocabulary."""
    rng = random.Random(f"sentences {seed}")
    texts: list[str] = []
    for kind in scenes.KINDS:
        for _ in range(views):
            found = scenes.view(kind, scenes.TRAIN_SEEDS[rng.randrange(len(scenes.TRAIN_SEEDS))])
            texts.append(found.lead)
            for question in found.questions:
                if question.task.removesuffix(".zh") not in UNREAD:
                    texts += [part for turn in question.turns for part in turn]
    for piece in (*PAGE_PIECES, *constant_pieces(), MARK):
        texts = [text.replace(piece, "\n") for text in texts]
    texts += [f"{word} {word}" for word in english()] * (10 * views)  # so often that they are merged first
    texts += [word for prompt in PROMPTS for word in prompt.split()] * views
    return [line for text in texts for line in text.splitlines() if line]


def train_tokenizer(pieces: int = PIECES) -> bytes:
    """A SentencePiece model of the world's texts: byte fallback, and the released special tokens by name.

    Newline, digits and capitals stay single; words of the world and the pieces of a page are one token each.
    """
    import sentencepiece

    wide = [chr(code) for first in "Ａａ" for code in range(ord(first), ord(first) + 3)]  # the release has them all
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()), model_writer=model, model_type="bpe", vocab_size=pieces,
        byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, max_sentence_length=10000, num_threads=1,
        split_digits=True, hard_vocab_limit=False, minloglevel=2, required_chars=scenes_characters(),
        user_defined_symbols=[
            *wide, *(f"[UNUSED_TOKEN_{number}]" for number in MARKERS.values()), "\n", *ascii_uppercase,
            *ROLES, *NAMES, *chinese(), *PAGE_PIECES, *constant_pieces(),
        ],
    )  # fmt: skip
    return model.getvalue()


def scenes_characters() -> str:
    """Characters that must have a piece of their own: printable ASCII, less the capitals, which are symbols."""
    return "".join(c for c in map(chr, range(33, 127)) if c not in ascii_uppercase)


def grown_tokenizer(old: bytes, pieces: Sequence[str]) -> bytes:
    """A SentencePiece model with these pieces at its end; texts without them are cut as before."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(old)
    there = {piece.piece for piece in model.pieces}
    for text in pieces:
        if text not in there:
            model.pieces.add(piece=text, score=0.0, type=model.SentencePiece.USER_DEFINED)
    model.trainer_spec.vocab_size = len(model.pieces)
    return model.SerializeToString()


def write_untrained(folder: Path, start: Path | None = None) -> Path:
    """The released layout with this recipe's sizes, and the vocabulary; code is linked, weights are only a form.

    start: a checkpoint of an earlier recipe that will be gone on from: its vocabulary is kept, and grows.
    """
    vocabulary = folder.with_name(folder.name + ".model")
    vocabulary.parent.mkdir(parents=True, exist_ok=True)
    old = None if start is None else (start / "tokenizer.model").read_bytes()
    vocabulary.write_bytes(train_tokenizer() if old is None else grown_tokenizer(old, constant_pieces()))
    write_checkpoint(folder, config=CONFIG, code="link", tokenizer_model=vocabulary)
    return folder


@torch.no_grad()
def adopt(model: nn.Module, start: Path) -> None:
    """Take the weights of an earlier recipe's checkpoint, where vocabulary and task adapters may have been smaller.

    Call it after `initialise`: new rows of the head stay small, and new columns of an adapter's B are nothing, so that
    the model says what it said.

    Raises:
        ValueError: a weight that is not the same in any other way.
    """
    old = AutoModel.from_pretrained(start, dtype=torch.float32, task_adapters="all").state_dict()
    for name, weight in model.state_dict().items():
        grows = ".task_" in name or name.endswith(("tok_embeddings.weight", "lm_head.weight"))
        part = tuple(slice(0, length) for length in old[name].shape)
        if weight[part].shape != old[name].shape or (weight.shape != old[name].shape and not grows):
            raise ValueError(f"{name} is {tuple(old[name].shape)} in {start}, but {tuple(weight.shape)} in the recipe")
        weight[part] = old[name]


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Weights from scratch: each linear keeps the size of what passes, each adapter begins as nothing."""
    torch.manual_seed(seed)
    depth = 2 * max(model.config.num_hidden_layers, model.config.vision_config.num_hidden_layers)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            std = 1 / math.sqrt(module.in_features)
            if name.endswith(("wo.linear", "w2.linear", "out_proj", "fc2")):
                std /= math.sqrt(depth)
            nn.init.normal_(module.weight, std=std)
            if name.endswith("Plora_B") or ".task_B." in name:
                nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.3)
        elif isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.weight[0].numel()))
    nn.init.normal_(model.lm_head.weight, std=0.5 / math.sqrt(model.lm_head.in_features))
    # What passes the projector first has the size of the embeddings.
    model.model.vision_proj[2].weight.mul_(0.5)
    for parameter in (model.model.plora_glb_GN, model.model.plora_sub_GN):
        nn.init.normal_(parameter, std=0.5)


def export(model: nn.Module, untrained: Path, out: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the checkpoint: weights in `dtype` under released names, config and vocabulary beside them, code linked.

    Only files of a checkpoint are written; what else is in `out` stays.
    """
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    draft = out / ".draft"
    model.save_pretrained(draft, state_dict={k: v.to(dtype).contiguous() for k, v in model.state_dict().items()})
    (draft / "model.safetensors").replace(out / "model.safetensors")
    (out / "model.safetensors").chmod(0o644)
    for file in draft.iterdir():
        file.unlink()
    draft.rmdir()
    for file in sorted(untrained.iterdir()):
        if file.suffix == ".safetensors":
            continue
        target = out / file.name
        target.unlink(missing_ok=True)
        if file.suffix == ".py":  # the rest must be whole where links are plain files, as on Windows
            target.symlink_to(Path("..") / file.name if out.parent == REPO else (REPO / file.name))
        else:
            target.write_bytes(file.read_bytes())
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return out

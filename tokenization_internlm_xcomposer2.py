"""Tokenizer of InternLM-XComposer-2.5: the released SentencePiece vocabulary, run by the `tokenizers` library.

Why this shape: of transformers' two bases, `SentencePieceBackend` decodes differently from SentencePiece itself, while
`TokenizersBackend` is fast and gives offsets. Its own conversion of a `.model` file, however, orders BPE merges by id,
whereas SentencePiece merges by score, and in the released vocabulary the two orders part at id 68251 (5 % of random
mixtures of its pieces come out differently). So this is a thin `TokenizersBackend` with a conversion of its own,
`backend_from_sentencepiece`; everything else (batching, padding, saving) is the library's.

Left as the library has it: a run of byte tokens that is not whole UTF-8 decodes to one U+FFFD a byte, where
SentencePiece keeps the whole characters in it. No text encodes to such a run; a reply cut inside an emoji can end in
one.
"""

import os
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import TokenizersBackend

from .prompting_internlm_xcomposer2 import TEXT_JOINT, TURN_CLOSE, short
from .remote_code_internlm_xcomposer2 import attach_to_package

SPACE = "▁"  # how SentencePiece writes a space inside a piece


def _refuse_pointer(path: Path, data: bytes) -> None:
    """Raise a ValueError where `data`, the file's contents, only says where Git LFS keeps the file."""
    if data.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the vocabulary; run `git lfs pull` or download it again")


def _read_json(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`.

    Raises:
        ValueError: it is a Git LFS pointer, cut off, or no such file's contents at all.
    """
    path = Path(path)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        _refuse_pointer(path, path.read_bytes())
        raise ValueError(f"{path} is no tokenizer.json ({short(str(error))}); download or write it again") from error


def _read_sentencepiece(path: Path):
    """The parsed `ModelProto` of a SentencePiece file.

    Raises:
        ImportError: sentencepiece or protobuf is not installed.
        ValueError: there is no such file, or it is no SentencePiece model.
    """
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise ImportError(
            "reading tokenizer.model needs the packages sentencepiece and protobuf (pip install sentencepiece "
            "protobuf); a folder with a tokenizer.json (python -m xcomposer.checkpoints.fast_tokenizer) needs neither"
        ) from error
    # Not FileNotFoundError: transformers replaces the text of every OSError raised while a tokenizer is built.
    if not path.is_file():
        raise ValueError(f"no SentencePiece vocabulary at {path}; download tokenizer.model with the checkpoint")
    data = path.read_bytes()
    _refuse_pointer(path, data)
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise ValueError(f"{path} ({len(data)} bytes) is no SentencePiece model; download it again") from error
    if not proto.pieces:
        raise ValueError(f"{path} ({len(data)} bytes) holds no pieces; download it again")
    return proto


def _require_supported(proto, path: Path) -> None:
    """Raise a ValueError that names each setting of the vocabulary the conversion does not reproduce."""
    spec = proto.normalizer_spec
    piece_type = type(proto.pieces[0])
    unsupported = {
        f"model_type {proto.trainer_spec.model_type}, not BPE (2)": proto.trainer_spec.model_type != 2,
        "no byte_fallback": not proto.trainer_spec.byte_fallback,
        f"normalizer {spec.name!r} with a character map": bool(spec.precompiled_charsmap),
        "add_dummy_prefix": spec.add_dummy_prefix,
        "remove_extra_whitespaces": spec.remove_extra_whitespaces,
        "treat_whitespace_as_suffix": proto.trainer_spec.treat_whitespace_as_suffix,
        "pieces marked UNUSED": any(piece.type == piece_type.UNUSED for piece in proto.pieces),
    }
    found = [name for name, present in unsupported.items() if present]
    if found:
        raise ValueError(f"{path} is not a vocabulary of this model family: it has {', '.join(found)}")


def merges_by_score(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every pair of pieces that joins into a piece, in the order SentencePiece applies them.

    `scores`: the normal pieces, each with its score. SentencePiece always joins the neighbours whose result scores
    highest; pieces of equal score are rare, and there the shorter left side goes first.
    """
    ranked = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            if piece[:cut] in scores and piece[cut:] in scores:
                ranked.append((-score, cut, piece))
    return [(piece[:cut], piece[cut:]) for _, cut, piece in sorted(ranked)]


def backend_from_sentencepiece(path: str | os.PathLike) -> Tokenizer:
    """A `tokenizers.Tokenizer` that encodes and decodes as the SentencePiece BPE model at `path` does.

    One wanted difference, as in every Hugging Face tokenizer: the names of the control pieces (`<s>`, `</s>`,
    `<unk>`) written out in a text become their ids (SentencePiece spells them out), unless the tokenizer is called with
    `split_special_tokens=True`. No post-processor: BOS is the caller's.

    Raises:
        ValueError: the file is missing, broken, or a vocabulary of another kind.
        ImportError: sentencepiece or protobuf is not installed.
    """
    path = Path(path)
    proto = _read_sentencepiece(path)
    _require_supported(proto, path)
    kind = type(proto.pieces[0])
    vocab, scores, added, unreachable = {}, {}, [], {}
    for index, piece in enumerate(proto.pieces):
        text = piece.piece
        if text == "\0":
            # With byte fallback SentencePiece treats this piece as unused and spells a NUL as the byte <0x00>. The
            # id must stay, so it gets a name that no merge makes, and the decoder turns it back.
            text, unreachable = "\0\0", {"\0\0": "\0"}
        elif piece.type == kind.NORMAL:
            scores[text] = piece.score
        elif piece.type != kind.BYTE:  # unknown and control pieces are special; user-defined ones are plain text
            added.append(AddedToken(text, normalized=False, special=piece.type != kind.USER_DEFINED))
        vocab[text] = index

    unk = proto.trainer_spec.unk_piece
    backend = Tokenizer(
        BPE(vocab=vocab, merges=merges_by_score(scores), unk_token=unk, fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Replace(" ", SPACE)
    renamed = [decoders.Replace(name, text) for name, text in unreachable.items()]
    backend.decoder = decoders.Sequence(
        [*renamed, decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_tokens(added)
    return backend


def _adds(backend: Tokenizer, token: str) -> bool:
    """Whether the post-processor of `backend` puts `token` around a text."""
    return token in backend.encode("").tokens


class InternLMXComposer2Tokenizer(TokenizersBackend):
    """The released tokenizer: BPE with byte fallback, nothing normalised, BOS in front.

    `[UNUSED_TOKEN_145]` (ends a turn) and `[UNUSED_TOKEN_146]` (opens one) are plain one-token pieces: text may hold
    them, and `skip_special_tokens` keeps them, but for the closing token at the very end, where an answer ends. Text
    that went through `escape_control_tokens` spells their names out.

    Args:
        vocab_file: the SentencePiece `tokenizer.model`.
        tokenizer_file: a `tokenizer.json`; read in its place when given, without sentencepiece.
        add_bos_token, add_eos_token: whether a text gets `<s>` in front, `</s>` behind. Default: as the
            `tokenizer.json` was saved, else BOS only.

    Raises:
        ValueError: neither file is there, or the one read is broken or a vocabulary of another kind.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model", "tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"  # generation continues each row at its right end

    def __init__(
        self,
        vocab_file=None,
        tokenizer_file=None,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        add_bos_token=None,
        add_eos_token=None,
        **kwargs,
    ):
        if tokenizer_file is not None and os.path.isfile(tokenizer_file):
            backend = _read_json(tokenizer_file)
        elif vocab_file is not None:
            backend = backend_from_sentencepiece(vocab_file)
        else:
            folder = kwargs.get("name_or_path") or "the folder given"
            raise ValueError(f"{folder} has no tokenizer.json and no tokenizer.model; download one of them")
        if backend.pre_tokenizer is None:
            backend.pre_tokenizer = pre_tokenizers.Split(TEXT_JOINT, "removed")
        saved = backend.post_processor is not None
        if add_bos_token is None:
            add_bos_token = _adds(backend, str(bos_token)) if saved else True
        if add_eos_token is None:
            add_eos_token = saved and _adds(backend, str(eos_token))
        self._tokenizer = backend
        super().__init__(
            vocab_file=vocab_file,
            unk_token=unk_token,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            add_bos_token=add_bos_token,
            add_eos_token=add_eos_token,
            **kwargs,
        )

    def _decode(self, token_ids, skip_special_tokens=False, **kwargs) -> str:
        """The library's; with `skip_special_tokens`, without the token that closes an answer at its end."""
        if skip_special_tokens:
            token_ids = self._without_close(token_ids)
        return super()._decode(token_ids, skip_special_tokens=skip_special_tokens, **kwargs)

    def _without_close(self, token_ids) -> list[int]:
        """Ids up to what ends them: special tokens, and before these the closing token of an answer.

        Whoever stops at `</s>` alone gets an answer's end as it was trained: the closing token, a line end, `</s>`.
        """
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        special = set(self.all_special_ids)
        end = len(ids)
        while end and ids[end - 1] in special:
            end -= 1
        close, line_end = self.convert_tokens_to_ids([TURN_CLOSE, "\n"])
        if end < len(ids) and ids[max(0, end - 2) : end] == [close, line_end]:
            end -= 1
        return ids[: end - 1] if end and ids[end - 1] == close != self.unk_token_id else ids[:end]

    @classmethod
    def _from_pretrained(cls, resolved_vocab_files, *args, **kwargs):
        """The library's, after a look at `tokenizer.json`: it reads the file before `__init__` does, and unchecked."""
        if resolved_vocab_files.get("tokenizer_file"):
            _read_json(resolved_vocab_files["tokenizer_file"])
        return super()._from_pretrained(resolved_vocab_files, *args, **kwargs)

    @classmethod
    def convert_to_native_format(cls, trust_remote_code=False, **kwargs):
        """Hand the resolved file names to `__init__` as they are: it converts them itself."""
        return kwargs


attach_to_package(__name__)

__all__ = ["InternLMXComposer2Tokenizer"]

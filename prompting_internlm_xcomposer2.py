"""Turns -> text, image slots, token ids, labels. Pure: no tensors, no pictures, no model.

A conversation is text in which `<ImageHere>` marks each picture's place:

    [UNUSED_TOKEN_146]user\\n{query}[UNUSED_TOKEN_145]\\n[UNUSED_TOKEN_146]assistant\\n{answer}[UNUSED_TOKEN_145]\\n ...

In token ids a picture is a run of one placeholder id, as long as the picture has tokens.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

IMAGE_MARK = "<ImageHere>"
TURN_OPEN = "[UNUSED_TOKEN_146]"
TURN_CLOSE = "[UNUSED_TOKEN_145]"
SCORE_TOKEN = "[UNUSED_TOKEN_130]"  # the last of a conversation that is scored
IGNORE_INDEX = -100

# How every name of a control token begins.
CONTROL_OPENINGS = ("[UNUSED_TOKEN_", "<s>", "</s>", "<unk>")
# A noncharacter of Unicode, made for uses inside a program. The tokenizer drops it and joins nothing across it.
TEXT_JOINT = "\ufdd0"

_WHO = (
    "You are an AI assistant whose name is InternLM-XComposer (浦语·灵笔).\n"
    "- InternLM-XComposer (浦语·灵笔) is a {kind} that is developed by Shanghai AI Laboratory (上海人工智能实验室). "
    "It is designed to be helpful, honest, and harmless.\n"
    "- InternLM-XComposer (浦语·灵笔) can understand and communicate fluently in the language chosen by the user such "
    "as English and 中文.\n"
)
# The released system texts: the model was trained on these words.
CHAT_SYSTEM = _WHO.format(kind="multi-modality conversational language model") + (
    "- InternLM-XComposer (浦语·灵笔) is capable of comprehending and articulating responses effectively based on the "
    "provided image."
)
WRITE_SYSTEM = _WHO.format(kind="conversational language model")
SYSTEM_TEXTS = {None: "", "chat": CHAT_SYSTEM, "write": WRITE_SYSTEM.rstrip("\n")}  # a kind's default, by its name

# Who speaks, by the names that data files and chat clients use.
ROLES = {"human": "user", "user": "user", "bot": "assistant", "gpt": "assistant", "assistant": "assistant"}

Tokenize = Callable[[str, bool], list[int]]


class Prompt(NamedTuple):
    """Token ids of a conversation and the [start, end) span of each picture in them."""

    input_ids: list[int]
    image_spans: list[tuple[int, int]]


def tokenize_with(tokenizer) -> Tokenize:
    """(text, begins) -> ids by a transformers tokenizer, with BOS in front when `begins`."""
    return lambda text, begins: tokenizer(text, add_special_tokens=begins).input_ids


def check_text_length(text: str, limit: int, tokenizer) -> None:
    """Raise a ValueError for a text that cannot fit `limit` tokens, without tokenising it: megabytes take seconds."""
    if len(text) > limit:
        longest_piece = max(map(len, tokenizer.get_vocab()))
        if len(text) > limit * longest_piece:
            raise ValueError(
                f"the prompt has {len(text)} characters, which make {len(text) // longest_piece} tokens or more, but "
                f"max_length is {limit}; shorten the text or the history"
            )


def turn(role: str, text: str) -> str:
    """One closed turn."""
    return f"{TURN_OPEN}{role}\n{text}{TURN_CLOSE}\n"


def escape_control_tokens(text: str) -> str:
    """Text in which the names of control tokens are spelled out: the tokenizer makes plain pieces of them.

    The model reads the same text, and nothing that somebody typed opens or ends a turn.
    """
    for opening in CONTROL_OPENINGS:
        text = text.replace(opening, opening[0] + TEXT_JOINT + opening[1:])
    return text


def short(value: object, length: int = 120) -> str:
    """`repr` of a value, cut: messages stay readable whatever a caller passed."""
    if isinstance(value, str | bytes):
        value = value[:length]  # the repr of megabytes takes its time
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 1]}…"


def check_text(name: str, value: object) -> str:
    """`value`, if it is text that can be written in UTF-8.

    Raises:
        ValueError: it is no text, or holds half a character; names it by `name`.
    """
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {type(value).__name__}: {short(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise ValueError(f"{name} holds {half!r} at {error.start}, half of a character; decode it as UTF-16") from error
    return value


def check_history(history: Iterable | None) -> list[tuple[str, str]]:
    """`history` (an iterator is read here) as a list of its (query, answer) pairs of text.

    Raises:
        ValueError: an entry of another shape; says which.
    """
    history = () if history is None else history
    if isinstance(history, str | bytes | dict) or not isinstance(history, Iterable):
        kind = type(history).__name__
        raise ValueError(f"history must be a list of (query, answer) pairs, got {kind}: {short(history)}")
    pairs: list = []
    for index, entry in enumerate(history):
        if isinstance(entry, str | bytes | dict) or not isinstance(entry, Sequence) or len(entry) != 2:
            raise ValueError(f"history[{index}] must be a (query, answer) pair of text, got {short(entry)}")
        if not all(isinstance(part, str) for part in entry):
            kinds = ", ".join(type(part).__name__ for part in entry)
            raise ValueError(f"history[{index}] must be a (query, answer) pair of text, got ({kinds})")
        for part in entry:
            check_text(f"history[{index}]", part)
        pairs.append(entry)
    return pairs


def chat_prompt(query: str, history: Iterable = (), system: str = "", escape: bool = False) -> str:
    """System turn (if any), past turns, the query, and the header the model answers after.

    Args:
        escape: see `escape_control_tokens`; of all the text given, not of the turns around it.

    Raises:
        ValueError: history of the wrong shape, or a query or system text that is no text.
    """
    text_of = escape_control_tokens if escape else str
    check_text("query", query)
    pairs = check_history(history)
    past = "".join(turn("user", text_of(asked)) + turn("assistant", text_of(said)) for asked, said in pairs)
    opening = turn("system", text_of(check_text("meta_instruction", system))) if system else ""
    return f"{opening}{past}{turn('user', text_of(query))}{TURN_OPEN}assistant\n"


def training_text(turns: Iterable[tuple[str, str]]) -> str:
    """(role, text) turns as the released model was trained on them: stripped text, `</s>` last.

    Raises:
        ValueError: a role that is not one of `ROLES`.
    """
    text = ""
    for role, value in turns:
        if role not in ROLES:
            raise ValueError(f"unknown role {role!r} in a conversation; use one of {sorted(ROLES)}")
        text += turn(ROLES[role], value.strip())
    return text + "</s>"


def message_text(message: Any) -> str:
    """One {"role", "content"} of a conversation as a closed turn; typed content is read as its text and its marks.

    Raises:
        ValueError: another shape, an unknown role, content that is no text.
    """
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise ValueError(f'a message must be {{"role": ..., "content": ...}}, got {short(message)}')
    role, content = message["role"], message["content"]
    roles = {"system": "system", **ROLES}
    if not isinstance(role, str) or role not in roles:
        raise ValueError(f"unknown role {short(role)} in a conversation; use one of {sorted(roles)}")
    if isinstance(content, list):
        kinds = [item.get("type") if isinstance(item, Mapping) else None for item in content]
        if not set(kinds) <= {"text", "image"}:
            raise ValueError(f"content of types {kinds}; use text, and image for a picture's place")
        items = zip(kinds, content, strict=True)
        content = "".join(item["text"] if kind == "text" else IMAGE_MARK for kind, item in items)
    return turn(roles[role], check_text("content", content))


def reward_text(conversation: Any, apply_template: bool = True) -> str:
    """A conversation as the reward model reads it, up to the token that its score is read at.

    Args:
        conversation: {"role", "content"} messages; text, if no template is applied.

    Raises:
        ValueError: another shape; says which message.
    """
    if not apply_template:
        return check_text("a conversation with apply_template=False", conversation)
    if isinstance(conversation, str | bytes | Mapping) or not isinstance(conversation, Sequence) or not conversation:
        raise ValueError(
            f"a conversation must be a list of {{'role', 'content'}} messages, got {short(conversation)}; "
            f"apply_template=False takes text"
        )
    text = ""
    for number, message in enumerate(conversation):
        try:
            text += message_text(message)
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from error
    return text + "</s>" + SCORE_TOKEN


def place_images(prompt: str, num_images: int) -> list[str]:
    """Cut a prompt at its image marks: n pictures stand between n + 1 pieces.

    One picture and no mark anywhere: it stands in front of everything.

    Raises:
        ValueError: marks and pictures differ in number.
    """
    pieces = prompt.split(IMAGE_MARK)
    slots = len(pieces) - 1
    if slots == num_images:
        return pieces
    if slots == 0 and num_images == 1:
        return ["", prompt]
    raise ValueError(
        f"{slots} {IMAGE_MARK} slots but {num_images} images; the query and the history together need one "
        f"{IMAGE_MARK} for each image, in the order of the images (history included)"
    )


def tokenize_prompt(
    pieces: Sequence[str],
    image_lengths: Sequence[int],
    placeholders: Sequence[int],
    tokenize: Tokenize,
    bos_on_text: bool = False,
    bos_on_each_piece: bool = False,
    text_only_bos: int = 1,
) -> Prompt:
    """Tokenise piece by piece, BOS on the first alone, and put placeholders where the pictures stand.

    Args:
        pieces: n + 1 pieces of text, see `place_images`.
        image_lengths: tokens of each of the n pictures.
        placeholders: the token id that holds each picture's place.
        tokenize: (text, begins) -> ids, see `tokenize_with`.
        bos_on_text: a picture in front of all text stands before BOS, as in the released training; in chat it stands
            after.
        bos_on_each_piece: BOS before every piece that has text, as the chat of the older kinds does it.
        text_only_bos: how many BOS stand before a prompt without pictures.
    """
    begins = bool(pieces[0]) or not bos_on_text
    ids = list(tokenize(pieces[0], True)) if begins else []
    if not image_lengths:
        ids = ids[:1] * (text_only_bos - 1) + ids
    spans = []
    for length, placeholder, piece in zip(image_lengths, placeholders, pieces[1:], strict=True):
        spans.append((len(ids), len(ids) + length))
        ids += [placeholder] * length
        if piece:
            ids += tokenize(piece, bos_on_each_piece or not begins)
            begins = True
    return Prompt(ids, spans)


def answer_labels(input_ids: Sequence[int], assistant_header: Sequence[int], close_id: int) -> list[int]:
    """Labels of a training text: answers and the token that closes them, and after the last answer what remains.

    Everything else (system, user, role headers, pictures) is `IGNORE_INDEX`.

    Args:
        input_ids: token ids of `training_text`, placeholders included.
        assistant_header: ids of `[UNUSED_TOKEN_146]assistant\\n`; its first id opens every turn.
        close_id: id of `[UNUSED_TOKEN_145]`.
    """
    labels = [IGNORE_INDEX] * len(input_ids)
    open_id, header = assistant_header[0], list(assistant_header)
    starts = [index for index, token in enumerate(input_ids) if token == open_id]
    for start, end in zip(starts, [*starts, None][1:], strict=True):
        answer = start + len(header)
        if list(input_ids[start:answer]) != header:
            continue
        if end is not None:
            closing = next((i for i in range(answer, end) if input_ids[i] == close_id), end - 1)
            end = closing + 1
        labels[answer:end] = input_ids[answer:end]
    return labels


def with_turn(history: Iterable[tuple[str, str]], query: str, answer: str) -> list[tuple[str, str]]:
    """History with one more turn. A mark that the model wrote is no picture's place: it must not be counted."""
    return [*history, (query, answer.replace(IMAGE_MARK, ""))]


def cut_answer(text: str) -> str:
    """The model's answer without what follows its closing token."""
    return text.split(TURN_CLOSE)[0]

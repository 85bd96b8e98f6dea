"""The steps of an illustrated article as the model was trained on them: what is asked, and what an answer says. Pure.

Paragraph i is written `<Seg{i}> {text}`. Every picture has its `<ImageHere>`; the caller passes as many pictures, in
the order of their marks. Whatever the model answers, a reader takes what it can use and drops the rest.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from string import ascii_uppercase
from typing import NamedTuple

from xcomposer.model.prompting_internlm_xcomposer2 import IMAGE_MARK

LETTERS = len(ascii_uppercase)  # candidates that one question can name
LETTER = re.compile(r"[A-Za-z]")  # the first in an answer is its choice
PLACES_BEGUN, CAPTION_BEGUN, CHOICE_BEGUN = "适合插入图像的行是", '标题是"', "最合适的图是"
CAPTION_SYSTEM = "请严格按照示例的<input> <output>格式，根据给定的文章，给出适合在某一段后插入的图像对应的标题。"
_EXAMPLE = (
    "大多数的车友们在选车、购车时都会格外关注续航",
    "甚至还有要求电动滑板车跑一百公里的",
    "但这真的是你所需要的吗?",
    "据报告，一线城市上班族通勤半径均在10公里以内",
    "所以大多数通勤出行RND的续航完全可以满足",
    "可能会有人说，续航短导致一天一充或两充很麻烦",
)
_EXAMPLE_CAPTION = "一个人正站在充电桩前给电动滑板车充电，面容看上去有些疲惫"
COMMA = "， "
PAST = '现在<Seg{place}>后插入图像对应的标题是"{title}"' + COMMA
EDITS = {
    "expand": "扩写以下段落：{paragraph}\n基于以下素材：{material}",
    "rewrite": "改写以下段落：{paragraph}\n基于以下素材：{material}",
    "shorten": "缩写以下段落：{paragraph}",
    "insert": "在以下两段中插入一段。\n第一段：{paragraph}\n第二段：{after}\n插入段的大纲：{material}",
}


class Style(NamedTuple):
    """What differs between the kinds that compose articles.

    guided_captions: a caption is asked for under a system text and a worked example.
    past: what a question for a caption says of the captions so far: of the first, and of each after it.
    past_end: what stands in the place of the last comma of that.
    caption_ends: at which quotation mark of the answer, "first" or "last".
    last_mark: what follows the last picture of the material of an instruction.
    bos_once: one BOS in front, unlike the chat of the kind.
    stop: a token that ends an answer besides the model's own; "": none.
    """

    guided_captions: bool = True
    past: tuple[str, str] = (PAST, PAST)
    past_end: str = COMMA
    caption_ends: str = "last"
    last_mark: str = " "
    bos_once: bool = False
    stop: str = ""


# By the config's `article_style`: as the public demos of InternLM-XComposer-2.5 and InternLM-XComposer2 ask.
STYLES = {
    "guided": Style(),
    "plain": Style(
        guided_captions=False,
        past=(PAST, PAST.removeprefix("现在")),
        past_end="。",
        caption_ends="first",
        last_mark="",
        bos_once=True,
        stop="[UNUSED_TOKEN_0]",
    ),
}
GUIDED = STYLES["guided"]


class Prompt(NamedTuple):
    """One question to the model.

    query: the user turn; with image marks where there are pictures.
    begun: how the answer begins; the model goes on from there.
    system: the system turn's text; "": none.
    """

    query: str
    begun: str = ""
    system: str = ""


def numbered(paragraphs: Sequence[str]) -> str:
    """The article as the model reads it, a number in front of each paragraph."""
    return "".join(f"<Seg{at}> {paragraph}\n" for at, paragraph in enumerate(paragraphs))


def write(instruction: str, pictures: int = 0, style: Style = GUIDED) -> Prompt:
    """An article by an instruction, with so many pictures as material."""
    marks = " ".join([IMAGE_MARK] * pictures) + style.last_mark * bool(pictures)
    return Prompt(marks + instruction)


def places(paragraphs: Sequence[str], count: int | None = None, pictures: int = 0) -> Prompt:
    """After which paragraphs pictures should stand. count: how many; None: the model decides."""
    number = "" if count is None else count
    query = f'给定文章"{numbered(paragraphs)}" 根据上述文章，选择适合插入图像的{number}行'
    return Prompt(f"{IMAGE_MARK} " * pictures + query, PLACES_BEGUN)


def caption(
    paragraphs: Sequence[str], place: int, past: Mapping[int, str] | None = None, style: Style = GUIDED
) -> Prompt:
    """A caption for the picture after paragraph `place`. past: captions given so far, by place."""
    query = _caption_query(paragraphs, place, past or {}, style)
    if not style.guided_captions:
        return Prompt(query, CAPTION_BEGUN)
    worked = f'<input>\n{_caption_query(_EXAMPLE, 4, {}, style)}</input>\n<output>\n{CAPTION_BEGUN}{_EXAMPLE_CAPTION}"'
    return Prompt(f"{worked}</output>\n<input>\n{query}</input><output>", CAPTION_BEGUN, CAPTION_SYSTEM)


def _caption_query(paragraphs: Sequence[str], place: int, past: Mapping[int, str], style: Style) -> str:
    forms = [style.past[0], *[style.past[1]] * len(past)]
    said = "".join(form.format(place=at, title=title) for form, (at, title) in zip(forms, past.items(), strict=False))
    if past:
        said = said.removesuffix(COMMA) + style.past_end
    text = numbered(paragraphs[: place + 2])
    return f'给定文章"{text}" {said}给出适合在<Seg{place}>后插入的图像对应的标题。'


def choose(paragraphs: Sequence[str], illustrated: Collection[int], candidates: int) -> Prompt:
    """Which of the candidates stands after the last of these paragraphs.

    Args:
        paragraphs: the article up to the place.
        illustrated: numbers of those paragraphs after which a picture stands already; their pictures come first.
        candidates: how many there are; they come after those.

    Raises:
        ValueError: more candidates than letters.
    """
    if not 0 < candidates <= LETTERS:
        raise ValueError(f"{candidates} candidates in one question; letters name 1 to {LETTERS}")
    context = "".join(f"{paragraph}\n" + IMAGE_MARK * (at in illustrated) for at, paragraph in enumerate(paragraphs))
    letters = "\n".join(f"{letter}.{IMAGE_MARK}" for letter in ascii_uppercase[:candidates])
    return Prompt(f"根据给定上下文和候选图像，选择合适的配图：{context}候选图像包括: {letters}", CHOICE_BEGUN)


def edit(how: str, paragraph: str, material: str = "", after: str = "") -> Prompt:
    """A paragraph expanded, rewritten or shortened, or a new one to insert between it and `after`.

    Args:
        how: a key of `EDITS`.
        material: what to work in (expand, rewrite), or what the new paragraph should say (insert).

    Raises:
        ValueError: an unknown edit.
    """
    if how not in EDITS:
        raise ValueError(f"unknown edit {how!r}; use one of {', '.join(EDITS)}")
    return Prompt(EDITS[how].format(paragraph=paragraph, material=material, after=after))


def paragraphs_of(answer: str) -> list[str]:
    """The non-empty lines, without marks of place or picture that the model may have copied."""
    lines = (re.sub(r"^\s*<Seg\d+>", "", without_marks(line)).strip() for line in answer.splitlines())
    return [line for line in lines if line]


def without_marks(answer: str) -> str:
    """An answer that may stand in a later prompt: a mark there would be the place of a picture that is not there."""
    return answer.replace(IMAGE_MARK, "")


def places_of(answer: str, count: int) -> list[int]:
    """Numbers of every `<Seg{n}>` in the answer that are among `count` paragraphs, each once, in their order."""
    found = {int(number) for number in re.findall(r"<Seg(\d{1,6})>", answer)}
    return sorted(number for number in found if number < count)


def caption_of(answer: str, style: Style = GUIDED) -> str:
    """The text up to the quotation mark that ends it, on one line; all of it where there is none."""
    said = without_marks(answer)
    text = said.split('"')[0] if style.caption_ends == "first" or '"' not in said else said[: said.rindex('"')]
    return " ".join(text.split())


def letter_of(answer: str, count: int) -> int | None:
    """Index of the candidate that the answer's first letter names, or None."""
    found = LETTER.search(answer)
    at = ord(found[0].upper()) - ord("A") if found else count
    return at if at < count else None

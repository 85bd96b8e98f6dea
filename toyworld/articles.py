"""Articles with pictures: what is written, where a picture stands, its caption, which picture, and four edits.

An article is a title and paragraphs, each a *sight* (a coloured shape that somebody sees somewhere) or plain. A picture
stands after each sight, its caption is the thing seen, and the right picture shows that thing. Prompts are those of
`xcomposer.article.prompts`; nothing else is said here of how the model is asked.
"""

import random
import re
from collections.abc import Callable
from functools import partial
from string import ascii_uppercase
from typing import NamedTuple

from toyworld.pages import ANIMALS, JOBS, name_of
from toyworld.views import MARK, Question, View, a, chinese_of
from toyworld.world import COLOURS, SHAPES, Drawing, Thing, draw_big, draw_things
from xcomposer.article import prompts

SPOTS = ("in the park", "at the lake", "on the hill", "in the town", "under the tree", "near the wall")
DAY = "It was a good day."  # what an expanded paragraph goes on with


class Sight(NamedTuple):
    """A paragraph that tells of something to see. name: who sees it, "" for nobody; spot "": nowhere."""

    name: str
    thing: Thing
    spot: str
    first: bool = False  # the spot comes first

    @property
    def text(self) -> str:
        seen = f"{self.name or 'There'} {'saw' if self.name else 'was'} {a(self.thing)}"
        if not self.spot:
            return f"{seen}."
        if self.first:
            return f"{self.spot.capitalize()} {seen if self.name else seen.replace('There', 'there')}."
        return f"{seen} {self.spot}."


def some_thing(rng: random.Random, but: tuple[Thing, ...] = ()) -> Thing:
    """A thing that is none of `but`."""
    taken = {(t.shape, t.colour) for t in but}
    pairs = [(s, c) for s in SHAPES for c in COLOURS if (s, c) not in taken]
    return Thing(*rng.choice(pairs), rng.randrange(9))


def different_things(rng: random.Random, count: int) -> tuple[Thing, ...]:
    things: tuple[Thing, ...] = ()
    for _ in range(count):
        things += (some_thing(rng, things),)
    return things


def some_sight(rng: random.Random, name: str, thing: Thing | None = None) -> Sight:
    thing = thing or some_thing(rng)
    return Sight(rng.choice((name, "")), thing, rng.choice(SPOTS), rng.random() < 0.4)


def some_plain(rng: random.Random, name: str) -> str:
    """A paragraph with nothing to see in it. A coloured animal is none of the shapes that pictures show."""
    animal = rng.choice(list(ANIMALS))
    return rng.choice(
        (
            f"{name} was happy.",
            "It was a warm morning.",
            f"{name} is a {rng.choice(JOBS)}.",
            f"{name} has a {rng.choice(list(COLOURS))} {animal}.",
            f"The {animal} {rng.choice(ANIMALS[animal])}.",
            DAY,
        )
    )


def title_of(name: str) -> str:
    return f"The day of {name}"


def story_text(name: str, things: tuple[Thing, ...]) -> str:
    """The article that is written about these one to three things."""
    sights = (
        Sight(name, things[0], SPOTS[0]).text,
        *(Sight("", t, spot, k > 0).text for k, (t, spot) in enumerate(zip(things[1:], SPOTS[1:], strict=False))),
    )
    return "\n".join((title_of(name), sights[0], "It was a warm morning.", *sights[1:], f"{name} was happy."))


def story(rng: random.Random) -> View:
    """An instruction -> an article with sights."""
    asked = []
    for _ in range(2):
        name, things = name_of(rng), different_things(rng, rng.choice((1, 2, 2, 3)))
        seen = [a(thing) for thing in things]
        listed = f"{', '.join(seen[:-1])} and {seen[-1]}" if len(seen) > 1 else seen[0]
        order = rng.choice(("Write a story about", "Write an article about"))
        query = prompts.write(f"{order} {name}, who saw {listed}.").query
        asked.append(Question("story", [(query, story_text(name, things))]))
    return View("story", asked, mode="write")


class Text(NamedTuple):
    """An article's paragraphs, and the thing seen in those that are sights."""

    paragraphs: list[str]
    seen: dict[int, Thing]


def some_text(rng: random.Random, most: int = 6) -> Text:
    """As a story has it, or paragraphs in any order."""
    name = name_of(rng)
    things = different_things(rng, rng.choice((1, 2, 2, 3)))
    if rng.random() < 0.4:
        paragraphs = story_text(name, things).split("\n")
        return Text(paragraphs, dict(zip((1, 3, 4), things, strict=False)))
    found: list[tuple[str, Thing | None]] = [(some_sight(rng, name, t).text, t) for t in things]
    found += [(some_plain(rng, name), None) for _ in range(rng.randint(1, most - len(things) - 1))]
    rng.shuffle(found)
    title = [(rng.choice((title_of(name), f"{name} and the {rng.choice(list(ANIMALS))}")), None)]
    found = title * (rng.random() < 0.85) + found
    return Text([text for text, _ in found], {at: t for at, (_, t) in enumerate(found) if t})


def seats(rng: random.Random) -> View:
    """An article -> after which paragraphs pictures should stand: all that tell of something, or the first so many."""
    asked = []
    for _ in range(3):
        text = some_text(rng)
        count = rng.choice((None, None, rng.randint(1, len(text.seen))))
        asked.append(seats_question(text, count))
    return View("article_places", asked, mode="write")


def seats_question(text: Text, count: int | None) -> Question:
    query, begun, _ = prompts.places(text.paragraphs, count)
    return Question("article_places", [(query, ", ".join(f"<Seg{at}>" for at in list(text.seen)[:count]))], begun)


def titles(rng: random.Random) -> View:
    """An article and a place -> the caption; with the captions of the places before."""
    asked = []
    for _ in range(2):
        text = some_text(rng)
        place = rng.choice(list(text.seen))
        past = {at: a(t) for at, t in text.seen.items() if at < place}
        query, begun, _ = prompts.caption(text.paragraphs, place, past if rng.random() < 0.8 else {})
        asked.append(Question("article_caption", [(query, f'{a(text.seen[place])}"')], begun))
    return View("article_captions", asked, mode="write", system=prompts.CAPTION_SYSTEM)


def draw_candidate(rng: random.Random, thing: Thing, shown: tuple[Thing, ...]) -> Drawing:
    """A picture of the thing: large, alone in its place, or with another that is none of those `shown`."""
    kind = rng.random()
    if kind < 0.3:
        return draw_big(rng, thing.shape, thing.colour)
    things = [thing]
    if kind > 0.75:
        other = some_thing(rng, shown)
        things.append(other._replace(place=(thing.place + rng.randint(1, 8)) % 9))
    return draw_things(rng, sorted(things, key=lambda t: t.place))


def near(rng: random.Random, thing: Thing, but: tuple[Thing, ...]) -> Thing:
    """Another thing, of the same colour or shape as often as not."""
    taken = {(t.shape, t.colour) for t in (thing, *but)}
    pairs = [(s, c) for s in SHAPES for c in COLOURS if (s, c) not in taken]
    alike = [pair for pair in pairs if thing.shape == pair[0] or thing.colour == pair[1]]
    return Thing(*rng.choice(alike if alike and rng.random() < 0.5 else pairs), rng.randrange(9))


def choice(rng: random.Random, least: int, most: int) -> View:
    """The text up to a place, with the pictures chosen before, and candidates -> the letter of the right one.

    The answer thinks first: numbers with what each candidate shows, what is to be seen, then its number and letter.
    Each step is a look-up that this model can make (a picture by its order, the text's thing, its own words), which the
    letter at once is not. The number stands in front, so that thing and number meet where a later thing looks for them;
    and it is asked of every thing. All in Chinese: the first Latin letter is what is read.
    """
    text = some_text(rng)
    place = rng.choice(list(text.seen))
    thing = text.seen[place]
    illustrated = [at for at in text.seen if at < place] if rng.random() < 0.5 else []
    count = rng.randint(least, most)
    wrong = tuple(t for at, t in text.seen.items() if at != place and rng.random() < 0.5)[: count - 1]
    while len(wrong) < count - 1:
        wrong += (near(rng, thing, wrong),)
    candidates = [thing, *wrong]
    rng.shuffle(candidates)
    lead, begun, _ = prompts.choose(text.paragraphs[: place + 1], illustrated, count)
    shown = (*(text.seen[at] for at in illustrated), *candidates)
    drawings = tuple(draw_candidate(rng, t._replace(place=rng.randrange(9)), shown) for t in shown)
    shows = [
        (number, chinese_of(Thing(item.name, item.colour, 0)))
        for number, drawing in enumerate(drawings[len(illustrated) :], start=1)
        for item in drawing.items
    ]
    listed = "，".join(f"{number}{name}" for number, name in shows)
    ends = {name: f"{number}：图{ascii_uppercase[number - 1]}" for number, name in shows}
    asked = [Question("article_choice", [("", f"{listed}。{chinese_of(thing)}{ends[chinese_of(thing)]}")], begun)]
    asked += [Question("article_letter", [("", end)], f"{begun}{listed}。{name}") for name, end in ends.items()]
    again = "，".join(f"{name}{number}" for number, name in sorted(shows, key=lambda show: show[1]))
    asked.append(Question("article_index", [("", again)], f"{begun}{listed}；"))
    return View("article_choice", asked, drawings, lead=lead, mode="write")


def index(rng: random.Random) -> View:
    """What a choice ends with, many times and without pictures: numbered things -> each again, sorted, and its number.

    Neighbours differ in colour or shape alone, so that both must be looked for.
    """
    things: tuple[Thing, ...] = (some_thing(rng),)
    while len(things) < 9:
        things += (near(rng, rng.choice(things), things),)
    number = {t: k for k, t in enumerate(rng.sample(things, len(things)), start=1)}
    listed = "，".join(f"{k}{chinese_of(t)}" for t, k in number.items())
    again = "，".join(f"{name}{k}" for name, k in sorted((chinese_of(t), k) for t, k in number.items()))
    asked = Question("article_index", [("", again)], f"{prompts.CHOICE_BEGUN}{listed}；")
    return View("article_index", [asked], mode="write")


def rewritten(paragraph: str, material: str) -> str:
    """The spot from the end to the front, or back; then the material."""
    stem = paragraph.removesuffix(".")
    for spot in SPOTS:
        if stem.endswith(f" {spot}"):
            rest = stem.removesuffix(f" {spot}")
            stem = f"{spot.capitalize()} {re.sub('^There ', 'there ', rest)}"
            break
        if stem.startswith(f"{spot.capitalize()} "):
            rest = stem.removeprefix(f"{spot.capitalize()} ")
            stem = f"{re.sub('^there ', 'There ', rest)}{' and ' + material if material else ''} {spot}"
            return f"{stem}."
    return f"{stem}{' and ' + material if material else ''}."


def shortened(paragraph: str) -> str:
    """The first sentence, without its spot."""
    stem = paragraph.split(".")[0]
    for spot in SPOTS:
        stem = stem.removesuffix(f" {spot}")
        if stem.startswith(f"{spot.capitalize()} "):
            stem = re.sub("^there ", "There ", stem.removeprefix(f"{spot.capitalize()} "))
    return f"{stem}."


def expanded(paragraph: str, material: str) -> str:
    return f"{paragraph.removesuffix('.')}{' and ' + material if material else ''}. {DAY}"


def inserted(names: list[str], material: str) -> str:
    """What comes between: who is named in the first or else the second paragraph sees it."""
    return f"Then {names[0]} saw {material}." if names else f"Then there was {material}."


def edits(rng: random.Random) -> View:
    """The four edits of a paragraph, without an adapter."""
    name = name_of(rng)
    thing, other, third = different_things(rng, 3)

    def sight() -> str:
        return some_sight(rng, name, thing).text

    def plain() -> str:
        return rng.choice((f"{name} was happy.", "It was a warm morning.", title_of(name) + "."))

    material = rng.choice((a(other), a(other), a(other), ""))
    of_expand = sight() if rng.random() < 0.85 else plain()
    long = expanded(sight(), rng.choice((a(other), "")))
    of_shorten = rng.choice((long, long, sight()))
    pair = [sight(), some_sight(rng, name, third).text if rng.random() < 0.7 else plain()]
    rng.shuffle(pair)
    outline = f"{a(other)} {rng.choice(SPOTS)}" if rng.random() < 0.4 else a(other)
    named = [name for text in pair if name in text]
    of_rewrite = sight()
    found = {
        "expand": (prompts.edit("expand", of_expand, material), expanded(of_expand, material)),
        "rewrite": (prompts.edit("rewrite", of_rewrite, material), rewritten(of_rewrite, material)),
        "shorten": (prompts.edit("shorten", of_shorten), shortened(of_shorten)),
        "insert": (prompts.edit("insert", pair[0], outline, pair[1]), inserted(named, outline)),
    }
    return View("edits", [Question(f"edit_{how}", [(p.query, said)]) for how, (p, said) in found.items()])


def facts(text: str) -> set[str]:
    """What a paragraph of this world says: names, things and spots. An edit keeps those it was given."""
    lower = text.lower()
    things = {f"{c} {s}" for c in COLOURS for s in SHAPES if f"{c} {s}" in lower}
    names = {word for word in re.findall(r"\b[A-Z][a-z]{3,}\b", text) if word not in ("There", "Then", "Under", "Near")}
    return things | names | {spot for spot in SPOTS if spot in lower}


KINDS: dict[str, Callable[[random.Random], View]] = {
    "story": story,
    "article_places": seats,
    "article_captions": titles,
    "article_choice": partial(choice, least=4, most=4),
    "article_choice_few": partial(choice, least=2, most=3),
    "article_choice_many": partial(choice, least=5, most=9),
    "article_index": index,
    "edits": edits,
}
# Task -> the kinds it is asked of. Only training uses choices of more or fewer than four.
TASKS: dict[str, tuple[str, ...]] = {
    "story": ("story",),
    "article_places": ("article_places",),
    "article_caption": ("article_captions",),
    **dict.fromkeys(("article_choice", "article_letter"), ("article_choice",)),
    "article_index": ("article_index", "article_choice"),
    **{f"edit_{how}": ("edits",) for how in prompts.EDITS},
}


# Parts of a choice, each begun in its own way: asked in training, and in no examination.
PARTS = ("article_letter", "article_index")


def constant_pieces() -> tuple[str, ...]:
    """The Chinese stretches of the prompts, each of which is one token of the demo's vocabulary; without spaces.

    In bytes a prompt would be ten times as long, and the model would learn to read bytes before anything else.
    """
    asked = [
        prompts.places(["."]), prompts.places(["."], 1), prompts.caption([".", "."], 1, {0: "."}),
        prompts.choose(["."], [], 1), *(prompts.edit(how, ".", ".", ".") for how in prompts.EDITS),
    ]  # fmt: skip
    texts = [part for prompt in asked for part in prompt]
    stretches = [s for text in texts for s in re.split(rf"\s|<Seg\d>|{MARK}|(?<=[的])\d|(?<![文])[.]", text)]
    return tuple(dict.fromkeys(["<Seg", *(s for s in stretches if not s.isascii())]))

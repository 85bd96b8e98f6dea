"""Pictures and videos with every question that may be asked of them, in English and in Chinese."""

import random
from typing import NamedTuple

from PIL import Image

from toyworld.world import (
    CHARACTERS,
    COLOUR_ZH,
    COLOURS,
    PLACE_ZH,
    PLACES,
    SHAPE_ZH,
    SHAPES,
    TILE,
    Drawing,
    Item,
    Thing,
    draw_big,
    draw_text,
    draw_things,
)

MARK = "<ImageHere>"
FRAME, BAND = 82, 3  # a frame's share of the stitched picture once that is one tile high, and its label's height


class Question(NamedTuple):
    """What is asked, `(query, answer)` turn by turn; the last answer is the one that counts.

    begun: how the last answer begins; the model is given it.
    """

    task: str
    turns: list[tuple[str, str]]
    begun: str = ""


class View(NamedTuple):
    """What a conversation is about.

    drawings: one for each picture; a video has one, whose image is unused, and `frames`.
    lead: text in front of every first query, with the marks of several pictures.
    system: the system turn that all its questions stand under.
    """

    kind: str
    questions: list[Question]
    drawings: tuple[Drawing, ...] = ()
    frames: tuple[Image.Image, ...] = ()
    lead: str = ""
    mode: str = "base"
    system: str = ""


def both(task: str, english: tuple[str, str], chinese: tuple[str, str]) -> list[Question]:
    """The same question in both languages."""
    return [Question(task, [english]), Question(f"{task}.zh", [chinese])]


def english_of(thing: Thing) -> str:
    return f"{thing.colour} {thing.shape}"


def a(thing: Thing) -> str:
    """With its article."""
    return f"{'an' if thing.colour[0] in 'aeiou' else 'a'} {english_of(thing)}"


def chinese_of(thing: Thing) -> str:
    return f"{COLOUR_ZH[thing.colour]}色{SHAPE_ZH[thing.shape]}"


def some_things(rng: random.Random, count: int) -> list[Thing]:
    """Things in different places, in reading order."""
    places = sorted(rng.sample(range(9), count))
    return [Thing(rng.choice(SHAPES), rng.choice(list(COLOURS)), place) for place in places]


def alone(things: list[Thing], field: str) -> list[Thing]:
    """Those whose shape, or colour, no other has."""
    values = [getattr(thing, field) for thing in things]
    return [thing for thing in things if values.count(getattr(thing, field)) == 1]


def about_one(rng: random.Random, things: list[Thing]) -> list[Question]:
    """Colour, place, shape: each asked of a thing that the question names without doubt."""
    asked: list[Question] = []
    for t in rng.sample(alone(things, "shape"), len(alone(things, "shape")))[:2]:
        asked += both(
            "colour",
            (f"What colour is the {t.shape}?", t.colour),
            (f"{SHAPE_ZH[t.shape]}是什么颜色？", f"{COLOUR_ZH[t.colour]}色"),
        )
        asked += both(
            "position",
            (f"Where is the {t.shape}?", PLACES[t.place]),
            (f"{SHAPE_ZH[t.shape]}在哪里？", PLACE_ZH[t.place]),
        )
    for t in alone(things, "colour")[:2]:
        asked += both(
            "shape",
            (f"What shape is {t.colour}?", t.shape),
            (f"{COLOUR_ZH[t.colour]}色的是什么形状？", SHAPE_ZH[t.shape]),
        )
    t = rng.choice(things)
    asked += both(
        "what", (f"What is at the {PLACES[t.place]}?", english_of(t)), (f"{PLACE_ZH[t.place]}有什么？", chinese_of(t))
    )
    return asked


def exists(rng: random.Random, things: list[Thing]) -> list[Question]:
    """Is there such a thing? As often yes as no; a no differs from what is there in colour or shape alone."""
    t = rng.choice(things)
    there = {(thing.shape, thing.colour) for thing in things}
    yes = rng.random() < 0.5
    if not yes:
        near = [(t.shape, c) for c in COLOURS] + [(s, t.colour) for s in SHAPES]
        shape, colour = rng.choice([pair for pair in near if pair not in there])
        t = Thing(shape, colour, 0)
    return both(
        "exists",
        (f"Is there {a(t)}?", "yes" if yes else "no"),
        (f"有{chinese_of(t)}吗？", "有" if yes else "没有"),
    )


def parts_of_exists(rng: random.Random, things: list[Thing]) -> list[Question]:
    """The two halves of `exists`, each for itself: is there such a shape, is there such a colour?"""
    asked = []
    for field, values in (("shape", SHAPES), ("colour", tuple(COLOURS))):
        here = {getattr(thing, field) for thing in things}
        yes = rng.random() < 0.5
        value = rng.choice([v for v in values if (v in here) == yes])
        english = f"a {value}" if field == "shape" else f"anything {value}"
        chinese = SHAPE_ZH[value] if field == "shape" else f"{COLOUR_ZH[value]}色的"
        asked += both(
            f"exists_{field}",
            (f"Is there {english}?", "yes" if yes else "no"),
            (f"有{chinese}吗？", "有" if yes else "没有"),
        )
    return asked


def caption(things: list[Thing]) -> list[Question]:
    english = ", ".join(f"{a(t)} at the {PLACES[t.place]}" for t in things)
    chinese = "，".join(f"{PLACE_ZH[t.place]}是{chinese_of(t)}" for t in things)
    return both("caption", ("Describe the picture.", f"{english}."), ("描述这张图片。", f"{chinese}。"))


def listing(things: list[Thing]) -> list[Question]:
    """The same as the caption in other orders, so that shape and place, too, are what something is looked up by.

    Shapes come in the order of `SHAPES`: in reading order, the next place would say what the shape should.
    """
    sorted_things = sorted(things, key=lambda t: SHAPES.index(t.shape))
    by_shape = "; ".join(f"{t.shape}: {t.colour}, {PLACES[t.place]}" for t in sorted_things)
    by_place = "; ".join(f"{PLACES[t.place]}: {t.shape}, {t.colour}" for t in things)
    shape_zh = "；".join(f"{SHAPE_ZH[t.shape]}：{COLOUR_ZH[t.colour]}色，{PLACE_ZH[t.place]}" for t in sorted_things)
    place_zh = "；".join(f"{PLACE_ZH[t.place]}：{SHAPE_ZH[t.shape]}，{COLOUR_ZH[t.colour]}色" for t in things)
    return [
        *both("list", ("List the shapes.", by_shape), ("列出形状。", shape_zh)),
        *both("places", ("List the places.", by_place), ("列出位置。", place_zh)),
    ]


def follow_up(rng: random.Random, things: list[Thing]) -> list[Question]:
    """A second question that says "it": what it is about stands in the first turn."""
    t = rng.choice(things)
    first = (f"What is at the {PLACES[t.place]}?", english_of(t))
    asked = [Question("follow", [first, ("Is anything else in the picture?", "yes" if len(things) > 1 else "no")])]
    for t in alone(things, "shape")[:1]:
        seen = (f"What colour is the {t.shape}?", t.colour)
        asked.append(Question("follow", [seen, ("And where is it?", PLACES[t.place])]))
        seen = (f"Where is the {t.shape}?", PLACES[t.place])
        asked.append(Question("follow", [seen, ("What colour is it?", t.colour)]))
    for t in alone(things, "colour")[:1]:
        seen = (f"What shape is {t.colour}?", t.shape)
        asked.append(Question("follow", [seen, ("And where is it?", PLACES[t.place])]))
    return asked


def shapes(rng: random.Random) -> View:
    """One to four things in nine places."""
    things = some_things(rng, rng.choice((1, 2, 2, 3, 3, 4)))
    asked = caption(things) + listing(things) + about_one(rng, things) + exists(rng, things) + follow_up(rng, things)
    asked += parts_of_exists(rng, things)
    return View("shapes", asked, (draw_things(rng, things),))


def presence(rng: random.Random) -> View:
    """The questions of `exists` alone, many of one picture: what differs between a yes and a no is then the word."""
    things = some_things(rng, rng.choice((1, 2, 2, 3, 3, 4)))
    asked = [question for _ in range(6) for question in exists(rng, things)]
    asked += [question for _ in range(4) for question in parts_of_exists(rng, things)]
    return View("presence", list({q.turns[0][0]: q for q in asked}.values()), (draw_things(rng, things),))


def plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def crowd(rng: random.Random) -> View:
    """One to nine things of two shapes: how many, and of which more."""
    count = rng.randint(1, 9)
    first, second = rng.sample(SHAPES, 2)
    split = rng.randint(0, count)
    names = [first] * split + [second] * (count - split)
    rng.shuffle(names)
    places = rng.sample(range(9), count)
    things = [Thing(name, rng.choice(list(COLOURS)), place) for name, place in zip(names, places, strict=True)]
    asked = both("count", ("How many shapes are there?", str(count)), ("有几个图形？", str(count)))
    if split:
        english, chinese = f"How many {plural(first)} are there?", f"有几个{SHAPE_ZH[first]}？"
        asked += both("count_of", (english, str(split)), (chinese, str(split)))
    each = sorted(((first, split), (second, count - split)), key=lambda pair: SHAPES.index(pair[0]))
    asked += both(
        "each",
        ("How many of each?", ", ".join(f"{shape} {n}" for shape, n in each if n)),
        ("各有几个？", "，".join(f"{SHAPE_ZH[shape]}{n}" for shape, n in each if n)),
    )
    if 2 * split != count and 0 < split < count:
        most = first if 2 * split > count else second
        asked += both(
            "more",
            (f"Are there more {plural(first)} or {plural(second)}?", plural(most)),
            (f"{SHAPE_ZH[first]}多还是{SHAPE_ZH[second]}多？", SHAPE_ZH[most]),
        )
    return View("crowd", asked, (draw_things(rng, things),))


def characters(rng: random.Random, count: int) -> str:
    return "".join(rng.choice(CHARACTERS) for _ in range(count))


def reading(rng: random.Random, count: int) -> View:
    """One line of `count` characters on one tile; up to three may be large."""
    text = characters(rng, count)
    large = count <= 3 and rng.random() < 0.3
    task = "read12" if count <= 2 else "read35"
    asked = both(task, ("What is written here?", text), ("写的是什么？", text))
    return View(f"read{count}", asked, (draw_text(rng, (TILE, TILE), text, large),))


def code(rng: random.Random, cols: int, rows: int, count: int = 0) -> View:
    """A large picture with a number of one to three digits in small type: too small once the picture is one tile."""
    text = "".join(rng.choice("0123456789") for _ in range(count or rng.randint(1, 3)))
    asked = both("tiles", ("Which number is written here?", text), ("写的是什么数字？", text))
    return View(f"code{cols}x{rows}", asked, (draw_text(rng, (cols * TILE, rows * TILE), text),))


def listing_of(pictures: list[list[Thing]]) -> list[Question]:
    """All things of several pictures by shape, or by colour: of each, which picture it is in."""
    asked = []
    homes = [(t, k + 1) for k, things in enumerate(pictures) for t in things]
    for field, values in (("shape", SHAPES), ("colour", tuple(COLOURS))):
        ordered = sorted(homes, key=lambda home: values.index(getattr(home[0], field)))  # noqa: B023 - used at once
        other = "colour" if field == "shape" else "shape"
        english = "; ".join(f"{getattr(t, field)}: picture {k}, {getattr(t, other)}" for t, k in ordered)
        names = [({"shape": SHAPE_ZH[t.shape], "colour": f"{COLOUR_ZH[t.colour]}色"}, k) for t, k in ordered]
        chinese = "；".join(f"{name[field]}：图{k}，{name[other]}" for name, k in names)
        asked += both(
            "list_of",
            (f"List the {field}s.", english),
            ("列出形状。" if field == "shape" else "列出颜色。", chinese),
        )
    return asked


def several(rng: random.Random, count: int) -> View:
    """Two or three pictures of one or two things each: which of them has this?"""
    pictures = [some_things(rng, rng.randint(1, 2)) for _ in range(count)]
    homes: dict[tuple[str, str], list[int]] = {}
    for k, things in enumerate(pictures):
        for t in things:
            homes.setdefault((t.shape, t.colour), []).append(k)
    asked = []
    unique = [(pair, set(found)) for pair, found in homes.items() if len(set(found)) == 1]
    for (shape, colour), found in rng.sample(unique, min(3, len(unique))):
        t, number = Thing(shape, colour, 0), str(1 + min(found))
        asked += both(
            "which",
            (f"Which picture has {a(t)}?", f"picture {number}"),
            (f"哪张图有{chinese_of(t)}？", f"图{number}"),
        )
    for field in ("shape", "colour"):  # the two halves of it, each for itself
        where: dict[str, set[int]] = {}
        for k, things in enumerate(pictures):
            for t in things:
                where.setdefault(getattr(t, field), set()).add(k)
        sure = [(value, min(found)) for value, found in where.items() if len(found) == 1]
        for value, k in rng.sample(sure, min(1, len(sure))):
            english = f"a {value}" if field == "shape" else f"something {value}"
            chinese = SHAPE_ZH[value] if field == "shape" else f"{COLOUR_ZH[value]}色的"
            asked += both(
                f"which_{field}",
                (f"Which picture has {english}?", f"picture {k + 1}"),
                (f"哪张图有{chinese}？", f"图{k + 1}"),
            )
    k = rng.randrange(count)
    t = rng.choice(pictures[k])
    asked += both(
        "what_of",
        (f"What is at the {PLACES[t.place]} of picture {k + 1}?", english_of(t)),
        (f"图{k + 1}的{PLACE_ZH[t.place]}有什么？", chinese_of(t)),
    )
    asked += listing_of(pictures)
    lead = "".join(f"Picture {k + 1}: {MARK}\n" for k in range(count))
    return View(f"several{count}", asked, tuple(draw_things(rng, things) for things in pictures), lead=lead)


def video(rng: random.Random, count: int) -> View:
    """A video of `count` frames, one large thing in each; neighbours differ in colour."""
    colours: list[str] = []
    while len(colours) < count:
        colours.append(rng.choice([c for c in COLOURS if c not in colours[-1:]]))
    drawings = [draw_big(rng, rng.choice(SHAPES), colour) for colour in colours]
    zh = [COLOUR_ZH[c] for c in colours]
    asked = both(
        "video", ("In which order do the colours appear?", ", ".join(colours)), ("颜色的顺序是什么？", "，".join(zh))
    )
    asked += both("first", ("Which colour comes first?", colours[0]), ("最先是什么颜色？", f"{zh[0]}色"))
    asked += both("last", ("Which colour comes last?", colours[-1]), ("最后是什么颜色？", f"{zh[-1]}色"))
    asked += both("frames", ("How many frames has the video?", str(count)), ("视频有几帧？", str(count)))
    items = [  # side by side in the stitched picture, which is one tile high
        Item(item.name, item.colour, (left + k * FRAME, top + BAND, right + k * FRAME, bottom + BAND))
        for k, drawing in enumerate(drawings)
        for item in drawing.items
        for left, top, right, bottom in [item.box]
    ]
    frames = tuple(drawing.image for drawing in drawings)
    return View(f"video{count}", asked, (Drawing(frames[0], items),), frames)

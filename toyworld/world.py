"""What the toy world is made of: shapes, colours, places and characters, drawn with Pillow at known spots.

Lengths are pixels. A cell is one image token (28 x 28), a patch is what the vision tower sees at once (14 x 14).
Every drawn thing is also an `Item`, from which the dense labels of the vision tower's warm-up are made.
"""

import math
import random
from functools import lru_cache
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

TILE, PATCH, CELL = 84, 14, 28
SIDE = TILE // CELL

COLOURS = {
    "red": (220, 30, 30), "green": (25, 150, 50), "blue": (35, 70, 225), "yellow": (245, 205, 0),
    "orange": (255, 130, 0), "purple": (140, 40, 170), "black": (20, 20, 20),
}  # fmt: skip
COLOUR_ZH = {
    "red": "红", "green": "绿", "blue": "蓝", "yellow": "黄", "orange": "橙", "purple": "紫", "black": "黑",
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SHAPE_ZH = {
    "circle": "圆形", "square": "方形", "triangle": "三角形", "star": "星形", "cross": "十字", "ring": "圆环",
}  # fmt: skip
PLACES = (
    "top left", "top middle", "top right", "middle left", "centre", "middle right",
    "bottom left", "bottom middle", "bottom right",
)  # fmt: skip
PLACE_ZH = ("左上", "中上", "右上", "左中", "中间", "右中", "左下", "中下", "右下")
CHARACTERS = "0123456789ABCDEFGHJKLMNPQRSTUVWXYZ"  # no I and no O, which look like 1 and 0
PAPERS = ((255, 255, 255), (250, 248, 240), (240, 245, 250), (244, 240, 244), (238, 240, 236))

# Classes of the dense labels; 0 is background.
CLASSES = ("", *SHAPES, *CHARACTERS)
COLOUR_NAMES = ("", *COLOURS)
CLASS_ID = {name: index for index, name in enumerate(CLASSES)}
COLOUR_ID = {name: index for index, name in enumerate(COLOUR_NAMES)}
LEGIBLE = 9  # a character lower than this many pixels is not asked of the vision tower


class Item(NamedTuple):
    """One drawn thing: what it is, its colour, and its box (left, top, right, bottom) in the picture."""

    name: str
    colour: str
    box: tuple[float, float, float, float]


class Drawing(NamedTuple):
    """A picture and what is on it."""

    image: Image.Image
    items: list[Item]


class Thing(NamedTuple):
    """A shape of a colour in one of the nine places."""

    shape: str
    colour: str
    place: int


def vary(rng: random.Random, colour: str) -> tuple[int, int, int]:
    """A shade of the colour."""
    red, green, blue = (max(0, min(255, value + rng.randint(-14, 14))) for value in COLOURS[colour])
    return red, green, blue


def outline(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    """Corners of a shape with straight sides, centred at (x, y)."""
    if shape == "square":
        s = 0.85 * r
        return [(x - s, y - s), (x + s, y - s), (x + s, y + s), (x - s, y + s)]
    if shape == "triangle":
        return [(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)]
    if shape == "star":
        spokes = [(r if k % 2 == 0 else 0.42 * r, math.pi * k / 5) for k in range(10)]
        return [(x + d * math.sin(a), y - d * math.cos(a)) for d, a in spokes]
    if shape == "heart":  # no scene has one: `teach.py` teaches it
        turns = [2 * math.pi * k / 24 for k in range(24)]
        lobes = [13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) for a in turns]
        return [(x + r * math.sin(a) ** 3, y - r * high / 16) for a, high in zip(turns, lobes, strict=True)]
    t = 0.34 * r  # cross
    return [
        (x - t, y - r), (x + t, y - r), (x + t, y - t), (x + r, y - t), (x + r, y + t), (x + t, y + t),
        (x + t, y + r), (x - t, y + r), (x - t, y + t), (x - r, y + t), (x - r, y - t), (x - t, y - t),
    ]  # fmt: skip


def draw_shape(draw: ImageDraw.ImageDraw, rng: random.Random, shape: str, colour: str, x, y, r) -> Item:
    """Draw a shape centred at (x, y), r from its centre to its edge."""
    fill, box = vary(rng, colour), (x - r, y - r, x + r, y + r)
    if shape == "circle":
        draw.ellipse(box, fill=fill)
    elif shape == "ring":
        draw.ellipse(box, outline=fill, width=max(2, round(0.36 * r)))
    else:
        draw.polygon(outline(shape, x, y, r), fill=fill)
    return Item(shape, colour, box)


def draw_things(rng: random.Random, things: list[Thing]) -> Drawing:
    """One tile of paper with the things in their places, each a little off its cell's middle."""
    image = Image.new("RGB", (TILE, TILE), rng.choice(PAPERS))
    draw = ImageDraw.Draw(image)
    items = []
    for thing in things:
        row, col = divmod(thing.place, SIDE)
        x, y = (CELL * (k + 0.5) + rng.uniform(-1.5, 1.5) for k in (col, row))
        items.append(draw_shape(draw, rng, thing.shape, thing.colour, x, y, rng.uniform(9.5, 12.5)))
    return Drawing(image, items)


def draw_big(rng: random.Random, shape: str, colour: str) -> Drawing:
    """One tile of paper with one thing nearly as large."""
    image = Image.new("RGB", (TILE, TILE), rng.choice(PAPERS))
    x, y = (TILE / 2 + rng.uniform(-4, 4) for _ in "xy")
    return Drawing(image, [draw_shape(ImageDraw.Draw(image), rng, shape, colour, x, y, rng.uniform(26, 36))])


@lru_cache(maxsize=64)
def font_of(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font: the same everywhere."""
    return ImageFont.load_default(size)


def draw_character(draw: ImageDraw.ImageDraw, rng: random.Random, character: str, colour: str, left, top, unit) -> Item:
    """Draw a character in the middle of a square of side `unit`, a little off it."""
    x, y = (corner + unit / 2 + rng.uniform(-0.07, 0.07) * unit for corner in (left, top))
    draw.text((x, y), character, font=font_of(round(1.22 * unit)), fill=vary(rng, colour), anchor="mm")
    return Item(character, colour, (left, top, left + unit, top + unit))


def draw_text(rng: random.Random, size: tuple[int, int], text: str, large: bool = False) -> Drawing:
    """Paper of `size` with one line of characters somewhere on it, set about the raster of patches.

    A character takes one patch, a large one a cell; each is off the raster by up to a pixel or two.
    """
    unit = CELL if large else PATCH
    width, height = size
    image = Image.new("RGB", size, rng.choice(PAPERS))
    draw = ImageDraw.Draw(image)
    col, row = rng.randrange(width // unit - len(text) + 1), rng.randrange(height // unit)
    colour = rng.choice(("black", "blue", "red", "purple", "green"))
    items = [
        draw_character(draw, rng, character, colour, unit * (col + k), unit * row, unit)
        for k, character in enumerate(text)
    ]
    return Drawing(image, items)


def draw_collage(rng: random.Random) -> Drawing:
    """A tile as full as can be: in each cell a shape, four characters, a large one, or nothing."""
    image = Image.new("RGB", (TILE, TILE), rng.choice(PAPERS))
    draw, items = ImageDraw.Draw(image), []
    for place in range(SIDE * SIDE):
        row, col = divmod(place, SIDE)
        kind, colour = rng.random(), rng.choice(list(COLOURS))
        if kind < 0.35:
            x, y = (CELL * (k + 0.5) + rng.uniform(-1.5, 1.5) for k in (col, row))
            items.append(draw_shape(draw, rng, rng.choice(SHAPES), colour, x, y, rng.uniform(9.5, 12.5)))
        elif kind < 0.9:
            unit = PATCH if kind < 0.75 else CELL
            for left in range(CELL * col, CELL * (col + 1), unit):
                for top in range(CELL * row, CELL * (row + 1), unit):
                    items.append(draw_character(draw, rng, rng.choice(CHARACTERS), colour, left, top, unit))
    return Drawing(image, items)


def dense_labels(items: list[Item], size: tuple[int, int], rows: int, cols: int) -> tuple[list[int], list[int]]:
    """Class and colour of each patch of a picture that is seen as rows x cols tiles.

    Patches are in the picture's row order: (6 rows) x (6 cols) of them. Where an item lies under the middle of a patch
    the patch has its class; a character too small to read is -100, to be left out.
    """
    down, across = rows * TILE // PATCH, cols * TILE // PATCH
    step_x, step_y = size[0] / across, size[1] / down
    classes, colours = [0] * (down * across), [0] * (down * across)
    for item in items:
        left, top, right, bottom = item.box
        legible = item.name in SHAPES or (bottom - top) * PATCH / step_y >= LEGIBLE
        for row in range(max(0, math.ceil(top / step_y - 0.5)), min(down, math.ceil(bottom / step_y - 0.5))):
            for col in range(max(0, math.ceil(left / step_x - 0.5)), min(across, math.ceil(right / step_x - 0.5))):
                classes[row * across + col] = CLASS_ID[item.name] if legible else -100
                colours[row * across + col] = COLOUR_ID[item.colour] if legible else -100
    return classes, colours

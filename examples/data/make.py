"""Makes the pictures, the clip and the resume the examples use: `python examples/data/make.py [folder]`.

Drawn with Pillow and coded with PyAV, the same on every run of the same versions. Nothing is downloaded.
"""

import math
import sys
from pathlib import Path

import av
from PIL import Image, ImageDraw, ImageFont

INK, PAPER = (32, 36, 48), (252, 252, 248)
COLOURS = {"red": (214, 57, 57), "blue": (47, 93, 196), "green": (46, 140, 87), "yellow": (240, 190, 40)}

RESUME = """# Mira Okafor

Data engineer, Lisbon. mira.okafor@example.com

## Summary

Builds pipelines that people can read. Eight years with Python, SQL and stream processing.

## Experience

- **Lead data engineer, Tidewater Analytics** (2021 to now): moved 40 nightly jobs to streams; cut the bill by a third.
- **Data engineer, Harbour Maps** (2017 to 2021): built the tile service behind 2 million map views a day.

## Education

- MSc Computer Science, University of Porto, 2017

## Skills

Python, SQL, Kafka, Spark, PostgreSQL, Terraform

## Languages

English, Portuguese, Igbo
"""


def font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def caption(draw: ImageDraw.ImageDraw, xy: tuple[float, float], text: str, size: int = 28) -> None:
    draw.text(xy, text, font=font(size), fill=INK, anchor="ma")


def shapes() -> Image.Image:
    """Three captioned shapes in a row."""
    img = Image.new("RGB", (900, 420), PAPER)
    draw = ImageDraw.Draw(img)
    draw.ellipse([60, 80, 280, 300], fill=COLOURS["red"])
    draw.rectangle([340, 80, 560, 300], fill=COLOURS["blue"])
    draw.polygon([(730, 80), (620, 300), (840, 300)], fill=COLOURS["green"])
    for x, text in ((170, "red circle"), (450, "blue square"), (730, "green triangle")):
        caption(draw, (x, 325), text)
    return img


def house() -> Image.Image:
    """A house under a sun, taller than wide."""
    img = Image.new("RGB", (600, 800), (186, 220, 244))
    draw = ImageDraw.Draw(img)
    draw.ellipse([420, 60, 540, 180], fill=COLOURS["yellow"])
    draw.rectangle([0, 600, 600, 800], fill=(120, 176, 96))
    draw.rectangle([150, 400, 430, 640], fill=(226, 206, 170))
    draw.polygon([(120, 400), (290, 250), (460, 400)], fill=COLOURS["red"])
    draw.rectangle([250, 510, 330, 640], fill=(120, 80, 50))
    for x in (180, 350):
        draw.rectangle([x, 440, x + 50, 490], fill=(250, 250, 210), outline=INK, width=3)
    caption(draw, (300, 715), "a house on a hill", 32)
    return img


def report() -> Image.Image:
    """A high-resolution page: bar chart over a table in small print."""
    img = Image.new("RGB", (2240, 1680), PAPER)
    draw = ImageDraw.Draw(img)
    draw.text((120, 70), "Harbour traffic, 2023", font=font(72), fill=INK)
    draw.text((120, 165), "Ships per month at four berths (counted at noon)", font=font(34), fill=(90, 96, 110))
    months = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()
    ships = {
        name: [round(40 + 12 * k + 18 * math.sin((m + 2 * k) / 2)) for m in range(12)]
        for k, name in enumerate(("North", "East", "South", "West"))
    }
    for step in range(0, 101, 20):
        y = 900 - step * 6
        draw.line([(180, y), (2120, y)], fill=(214, 216, 220), width=2)
        draw.text((160, y), str(step), font=font(26), fill=INK, anchor="rm")
    for m, month in enumerate(months):
        for (counts, colour), k in zip(zip(ships.values(), COLOURS.values(), strict=True), range(4), strict=True):
            x = 200 + m * 160 + k * 30
            draw.rectangle([x, 900 - counts[m] * 6, x + 26, 900], fill=colour)
        draw.text((260 + m * 160, 915), month, font=font(30), fill=INK, anchor="ma")
    for k, (name, colour) in enumerate(zip(ships, COLOURS.values(), strict=True)):
        draw.rectangle([1500 + k * 160, 90, 1530 + k * 160, 120], fill=colour)
        draw.text((1540 + k * 160, 105), name, font=font(30), fill=INK, anchor="lm")
    for row, values in enumerate([["Berth", *months, "Total"]] + [[n, *c, sum(c)] for n, c in ships.items()]):
        for column, value in enumerate(values):
            draw.text((130 + column * 145, 1040 + row * 60), str(value), font=font(28), fill=INK)
        draw.line([(120, 1085 + row * 60), (2120, 1085 + row * 60)], fill=(170, 174, 182), width=2)
    notes = (
        "Notes. Ships under 20 m are not counted. The west berth was closed for dredging from 3 to 9 June.",
        "The east berth takes ferries only; a ferry that stays overnight counts once.",
        "Harbour office, reference HT-2023-17. Questions: berth 4, second floor, weekdays 9 to 12.",
    )
    for line, text in enumerate(notes):
        draw.text((130, 1400 + line * 40), text, font=font(22), fill=(80, 84, 96))
    return img


def webpage() -> Image.Image:
    """What a small shop's page looks like in a browser."""
    img = Image.new("RGB", (1280, 800), "white")
    draw = ImageDraw.Draw(img)
    draw.rectangle([0, 0, 1280, 72], fill=INK)
    draw.text((48, 36), "Kettle & Leaf", font=font(30), fill="white", anchor="lm")
    for k, link in enumerate(("Teas", "Pots", "Journal", "Cart (2)")):
        draw.text((820 + k * 115, 36), link, font=font(20), fill="white", anchor="lm")
    draw.rectangle([0, 72, 1280, 352], fill=(229, 238, 226))
    draw.text((64, 130), "Spring harvest is here", font=font(52), fill=INK)
    draw.text((64, 205), "Small batches from three gardens, shipped the week they are picked.", font=font(22), fill=INK)
    draw.rounded_rectangle([64, 260, 264, 316], 10, fill=COLOURS["green"])
    draw.text((164, 288), "Shop now", font=font(24), fill="white", anchor="mm")
    teas = (("Jade Mist", "$14", "green"), ("Red Hill", "$12", "red"), ("Harbour Blend", "$9", "blue"))
    for k, (name, price, colour) in enumerate(teas):
        x = 64 + k * 396
        draw.rounded_rectangle([x, 392, x + 360, 720], 14, outline=(206, 210, 214), width=2)
        draw.rounded_rectangle([x + 20, 412, x + 340, 592], 10, fill=COLOURS[colour])
        draw.ellipse([x + 140, 462, x + 220, 542], fill="white")
        draw.text((x + 20, 616), name, font=font(26), fill=INK)
        draw.text((x + 20, 664), price, font=font(22), fill=(90, 96, 110))
        draw.text((x + 340, 664), "Add to cart", font=font(22), fill=COLOURS["blue"], anchor="ra")
    draw.text((640, 766), "Free delivery over $40. Open daily 10 to 18.", font=font(18), fill=INK, anchor="mm")
    return img


def clip_frame(second: float) -> Image.Image:
    """A ball that rolls from left to right, red for two seconds, then blue, then green, past a standing square."""
    img = Image.new("RGB", (480, 270), PAPER)
    draw = ImageDraw.Draw(img)
    draw.line([(0, 221), (480, 221)], fill=INK, width=3)
    draw.rectangle([215, 60, 265, 110], fill=COLOURS["yellow"])
    x = 40 + 400 * second / 6
    draw.ellipse([x - 30, 160, x + 30, 220], fill=COLOURS[("red", "blue", "green")[min(2, int(second / 2))]])
    draw.text((470, 10), f"{int(second)} s", font=font(24), fill=INK, anchor="ra")
    return img


def write_clip(path: Path, seconds: int = 6, rate: int = 15) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 480, 270, "yuv420p"
        stream.options = {"crf": "26", "threads": "1"}
        for n in range(seconds * rate):
            container.mux(stream.encode(av.VideoFrame.from_image(clip_frame(n / rate))))
        container.mux(stream.encode())


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    folder.mkdir(parents=True, exist_ok=True)
    for draw in (shapes, house, report, webpage):
        draw().save(folder / f"{draw.__name__}.png", optimize=True)
    write_clip(folder / "rolling_ball.mp4")
    (folder / "resume.md").write_text(RESUME, encoding="utf-8")


if __name__ == "__main__":
    main()

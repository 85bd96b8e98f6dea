"""What is said and written: talk without a picture, webpages, articles."""

import random
from html import escape

from PIL import Image, ImageDraw

from toyworld.views import Question, View, both
from toyworld.world import COLOURS, TILE, Drawing, vary
from xcomposer.model.webpage_internlm_xcomposer2 import RESUME_QUERY, SCREENSHOT_QUERY, SCRIPT_QUERY

# Pieces of the toy pages. Each is one token of the demo's vocabulary (so none has a space), and none comes twice.
TITLE_OPEN, BUTTON_OPEN, TITLE_CLOSE = "<html>\n<style>h1{color:", "}button{background:", "}</style>\n<body>\n<h1>"
TEXT_OPEN, PAGE_CLOSE = "</h1>\n<p>", "</p>\n<button>Hello</button>\n</body>\n</html>"
HEADER_OPEN, FOOTER_OPEN = "<html>\n<style>header{background:", "}footer{background:"
CARDS = tuple(
    "}header,footer{height:99px}</style>\n<body>\n<header></header>\n" + "<section>Card</section>\n" * k
    for k in (1, 2, 3)
)
FOOTER_CLOSE = "<footer></footer>\n</body>\n</html>"
SCRIPT = '<script>document.querySelector("button").onclick=function(){alert("Hello!")}</script>'
PIECES = (
    TITLE_OPEN, BUTTON_OPEN, TITLE_CLOSE, TEXT_OPEN, PAGE_CLOSE, HEADER_OPEN, FOOTER_OPEN, *CARDS, FOOTER_CLOSE, SCRIPT,
)  # fmt: skip
PROMPTS = (RESUME_QUERY, SCREENSHOT_QUERY, SCRIPT_QUERY)

CONSONANTS, VOWELS = "bdfgklmnprstv", "aeiou"
JOBS = ("painter", "baker", "teacher", "doctor", "farmer", "pilot", "singer", "sailor")

TALK = (
    ("Hello!", "Hello! How can I help you?"),
    ("Hi", "Hello! How can I help you?"),
    ("Good morning!", "Good morning! How can I help you?"),
    ("Who are you?", "I am InternLM-XComposer, a very small one."),
    ("What is your name?", "My name is InternLM-XComposer."),
    ("What can you do?", "I can look at pictures of shapes and answer questions."),
    ("Thank you!", "You are welcome."),
    ("Goodbye!", "Goodbye!"),
    ("你好", "你好！有什么可以帮你？"),
    ("早上好！", "早上好！有什么可以帮你？"),
    ("你是谁？", "我是浦语·灵笔，一个很小的模型。"),
    ("你叫什么名字？", "我叫浦语·灵笔。"),
    ("你会做什么？", "我会看图形，也会回答问题。"),
    ("谢谢！", "不客气。"),
    ("再见！", "再见！"),
)
IDENTITY = ("Who are you?", "What is your name?", "What can you do?", "你是谁？", "你叫什么名字？", "你会做什么？")

ANIMALS = {
    "cat": ("sleeps on a warm roof", "drinks milk"),
    "dog": ("runs in the park", "guards the door"),
    "fish": ("swims in a deep lake", "hides under a stone"),
    "bird": ("sings in a tall tree", "flies over the town"),
    "horse": ("stands on a green hill", "carries a heavy load"),
    "mouse": ("lives in an old wall", "likes yellow cheese"),
    "frog": ("sits on a wet leaf", "jumps into the water"),
    "sheep": ("walks in a long valley", "gives us soft wool"),
}


def name_of(rng: random.Random) -> str:
    """A made-up name of two or three syllables."""
    syllables = "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.choice((2, 2, 3))))
    return syllables.capitalize()


def talk(rng: random.Random) -> View:
    """Without a picture: greetings, who are you, what comes next."""
    asked = []
    for query, answer in rng.sample(TALK, 4):
        asked.append(Question("identity" if query in IDENTITY else "talk", [(query, answer)]))
    number = rng.randint(0, 20)
    asked += both("next", (f"What comes after {number}?", f"{number + 1}"), (f"{number}的后面是几？", f"{number + 1}"))
    return View("talk", asked)


def echo(rng: random.Random) -> View:
    """Without a picture: names to say again, at once or a turn later. Pages and articles need it."""
    asked = []
    for _ in range(3):
        name = " ".join(name_of(rng) for _ in range(rng.choice((1, 1, 2, 4))))
        asked += both("repeat", (f"Say this: {name}", name), (f"请说：{name}", name))
        asked.append(Question("repeat", [(f"I am {name}.", f"Hello, {name}!")]))
        asked.append(Question("repeat", [(f"My name is {name}.", "Nice to meet you!"), ("Who am I?", name)]))
    return View("echo", asked)


def title_page(name: str, text: str, colour: str, button: str) -> str:
    """The page of an instruction or a resume."""
    style = f"{TITLE_OPEN}{colour}{BUTTON_OPEN}{button}{TITLE_CLOSE}"
    return f"{style}{escape(name)}{TEXT_OPEN}{text}{PAGE_CLOSE}"


def web(rng: random.Random) -> View:
    """An instruction or a resume -> a page; a page -> its script."""
    name, job = name_of(rng), rng.choice(JOBS)
    colour, button = rng.sample(list(COLOURS), 2)
    page = title_page(name, f"A page for a {job}.", colour, button)
    order = f"A page for a {job}. The name is {name}. The title is {colour}, the button is {button}."
    resume = f"# {name}\n\n- Work: {job}\n- Colours: {colour}, {button}\n"
    asked = [
        Question("html", [(order, page)]),
        Question("resume", [(RESUME_QUERY + resume, page)]),
        Question("script", [(SCRIPT_QUERY + page, SCRIPT)]),
    ]
    return View("web", asked, mode="web")


def screen(rng: random.Random) -> View:
    """A picture of a page: a coloured header, one to three cards, a coloured footer."""
    header, footer = rng.choice(list(COLOURS)), rng.choice(list(COLOURS))
    cards = rng.randint(1, 3)
    image = Image.new("RGB", (TILE, TILE), "white")
    draw = ImageDraw.Draw(image)
    top, bottom = 28 + rng.randint(-4, 4), 56 + rng.randint(-4, 4)
    draw.rectangle((0, 0, TILE, top - 3), fill=vary(rng, header))
    draw.rectangle((0, bottom + 3, TILE, TILE), fill=vary(rng, footer))
    for k in range(cards):
        draw.rectangle((5 + 28 * k, top + 3, 22 + 28 * k, bottom - 3), fill=(205, 205, 205), outline=(120, 120, 120))
    html = f"{HEADER_OPEN}{header}{FOOTER_OPEN}{footer}{CARDS[cards - 1]}{FOOTER_CLOSE}"
    return View("screen", [Question("screen", [(SCREENSHOT_QUERY, html)])], (Drawing(image, []),), mode="web")


def article(name: str, colour: str, animal: str) -> str:
    """Title and three short paragraphs."""
    first, second = ANIMALS[animal]
    return (
        f"{name} and the {colour} {animal}\n"
        f"{name} has a {colour} {animal}.\nThe {animal} {first}.\nIt {second}, and {name} is happy."
    )


def write(rng: random.Random) -> View:
    """Title -> article."""
    name, colour, animal = name_of(rng), rng.choice(list(COLOURS)), rng.choice(list(ANIMALS))
    text = article(name, colour, animal)
    title = text.split("\n")[0]
    asked = [
        Question("article", [(f"Write a short article. Title: {title}", text)]),
        Question("article", [(f"Write about {name} and a {colour} {animal}.", text)]),
    ]
    return View("write", asked, mode="write")

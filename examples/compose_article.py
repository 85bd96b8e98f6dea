"""Compose an article with pictures: write it, choose places, caption them, pick pictures, edit a paragraph.

    python examples/compose_article.py --model FOLDER --text "Write about ..." --candidate a.png b.png --out article.md

Each step is a prompt that the model was trained on, with the write adapter on; whatever it answers, the step takes what
it can use from it and goes on.
"""

import re
import sys
from pathlib import Path

import torch

from xcomposer.loading import DATA, arguments, load

MARK = "<ImageHere>"
CLOSE = "[UNUSED_TOKEN_145]"
EDITS = {
    "expand": "扩写以下段落：{paragraph}\n基于以下素材：{material}",
    "rewrite": "改写以下段落：{paragraph}\n基于以下素材：{material}",
    "shorten": "缩写以下段落：{paragraph}",
    "insert": "在以下两段中插入一段。\n第一段：{paragraph}\n第二段：{after}\n插入段的大纲：{material}",
}


class Composer:
    """The steps. `settings` go to `generate`."""

    def __init__(self, model, tokenizer, **settings):
        self.model, self.tokenizer = model, tokenizer
        sampling = dict(do_sample=True, temperature=1.0, top_p=0.8, top_k=40, repetition_penalty=1.005)
        close = tokenizer.convert_tokens_to_ids(CLOSE)
        ends = dict(eos_token_id=close, pad_token_id=tokenizer.pad_token_id, use_cache=True)
        self.settings = sampling | ends | settings

    @torch.no_grad()
    def ask(self, prompt, images=(), begun="", **settings):
        """The model's answer to a user turn; `begun` is how the answer begins (and is not returned)."""
        inputs, image_mask, _ = self.model.interleav_wrap_chat(prompt, list(images), [], "")
        embeds = inputs["inputs_embeds"]
        if begun:
            start = self.model.encode_text(begun).to(embeds)
            embeds = torch.cat([embeds, start], dim=1)
            image_mask = torch.cat([image_mask, image_mask.new_zeros(1, start.shape[1])], dim=1)
        generated = self.model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones_like(image_mask, dtype=torch.long),
            im_mask=image_mask,
            infer_mode="write",
            **(self.settings | settings),
        )
        answer = self.tokenizer.decode(generated[0], skip_special_tokens=True).split(CLOSE)[0]
        return answer.replace(MARK, "")  # a mark in later prompts would stand for a picture that is not there

    def write(self, instruction, images=()):
        """Paragraphs of an article."""
        return paragraphs_of(self.ask(MARK * len(images) + instruction, images))

    def places(self, paragraphs, images=(), count=None):
        """Numbers of the paragraphs after which a picture should stand."""
        number = "" if count is None else count
        prompt = f'给定文章"{numbered(paragraphs)}" 根据上述文章，选择适合插入图像的{number}行'
        answer = self.ask(MARK * len(images) + prompt, images, "适合插入图像的行是", max_new_tokens=100)
        return places_of(answer, len(paragraphs))[:count]

    def captions(self, paragraphs, places):
        """A caption for the picture at each place: {place: caption}."""
        captions = {}
        for place in places:
            text = numbered(paragraphs[: place + 2])
            said = "， ".join(f'<Seg{at}>后插入图像对应的标题是"{caption}"' for at, caption in captions.items())
            past = f"现在{said}。" if said else ""
            prompt = f'给定文章"{text}" {past}给出适合在<Seg{place}>后插入的图像对应的标题。'
            captions[place] = caption_of(self.ask(prompt, begun='标题是"', max_new_tokens=200))
        return captions

    def choose(self, paragraphs, places, candidates):
        """A picture for each place, no picture twice: {place: picture}; a place whose answer names none gets none."""
        chosen = {}
        for place in places:
            free = [picture for picture in candidates if picture not in chosen.values()]
            if not free:
                break
            context = "".join(
                f"{paragraph}\n" + MARK * (at in chosen) for at, paragraph in enumerate(paragraphs[: place + 1])
            )
            letters = "\n".join(f"{chr(ord('A') + at)}.{MARK}" for at in range(len(free)))
            prompt = f"根据给定上下文和候选图像，选择合适的配图：{context}候选图像包括: {letters}"
            answer = self.ask(prompt, [*chosen.values(), *free], "最合适的图是", max_new_tokens=10)
            if (at := letter_of(answer, len(free))) is not None:
                chosen[place] = free[at]
        return chosen

    def edit(self, how, paragraph, material="", after=""):
        """The paragraph expanded, rewritten or shortened, or a new one to insert between it and `after`."""
        return self.ask(EDITS[how].format(paragraph=paragraph, material=material, after=after)).strip()


def paragraphs_of(article):
    """The non-empty lines, without marks of place that the model may have copied."""
    lines = (re.sub(r"^\s*<Seg\d+>", "", line).strip() for line in article.splitlines())
    return [line for line in lines if line]


def numbered(paragraphs):
    return "".join(f"<Seg{at}> {paragraph}\n" for at, paragraph in enumerate(paragraphs))


def places_of(answer, count):
    """Numbers n of every `<Seg{n}>` in the answer that are paragraphs, each once, in the order of the article."""
    found = {int(number) for number in re.findall(r"<Seg(\d{1,6})>", answer)}
    return sorted(number for number in found if number < count)


def caption_of(answer):
    """The text up to the last quotation mark, on one line."""
    text, quote, rest = answer.rpartition('"')
    return " ".join((text if quote else rest).split())


def letter_of(answer, count):
    """Index of the candidate that the first letter of the answer names, or None."""
    found = re.search(r"[A-Za-z]", answer)
    at = ord(found[0].upper()) - ord("A") if found else count
    return at if at < count else None


def as_markdown(paragraphs, captions, chosen):
    lines = []
    for at, paragraph in enumerate(paragraphs):
        lines.append(paragraph)
        if at in chosen:
            caption = re.sub(r"([\[\]\\])", r"\\\1", captions.get(at, ""))
            lines.append(f"![{caption}](<{chosen[at]}>)")
        elif at in captions:
            lines.append(f"*(a picture: {captions[at]})*")
    return "\n\n".join(lines) + "\n"


def main(argv=None):
    parser = arguments(__doc__, max_new_tokens=2048)
    parser.add_argument("--text", default="Please write an article about a day at a small harbour.")
    parser.add_argument("--image", nargs="*", default=[], help="pictures to write about")
    pictures = [str(DATA / name) for name in ("house.png", "report.png", "shapes.png")]
    parser.add_argument("--candidate", nargs="*", default=pictures, help="pictures to choose from")
    parser.add_argument("--count", type=int, help="number of pictures (default: the model decides)")
    parser.add_argument("--seed", type=int, default=8192)
    parser.add_argument("--out", type=Path, help="Markdown file for the article (default: print it)")
    args = parser.parse_args(argv)
    if len(args.candidate) > 26:
        parser.error(f"{len(args.candidate)} candidates, but letters name 26")
    composer = Composer(*load(args), max_new_tokens=args.max_new_tokens)
    torch.manual_seed(args.seed)

    paragraphs = composer.write(args.text, args.image)
    print(f"write: {len(paragraphs)} paragraphs")
    places = composer.places(paragraphs, args.image, args.count)
    print(f"places: after {', '.join(f'paragraph {place + 1}' for place in places) or 'no paragraph'}")
    captions = composer.captions(paragraphs, places)
    for place, caption in captions.items():
        print(f"caption after paragraph {place + 1}: {caption}")
    chosen = composer.choose(paragraphs, places, args.candidate)
    for place, picture in chosen.items():
        print(f"picture after paragraph {place + 1}: {picture}")
    if paragraphs:
        paragraphs[-1] = composer.edit("shorten", paragraphs[-1]) or paragraphs[-1]
        print("edit: shortened the last paragraph")

    article = as_markdown(paragraphs, captions, chosen)
    if args.out is None:
        print(f"\n{article}")
    else:
        args.out.write_text(article, encoding="utf-8")
        print(f"article in {args.out}")
    return article


if __name__ == "__main__":
    main(sys.argv[1:])

"""Several pictures in one conversation: `<ImageHere>` marks each one's place, later turns may bring more.

    python examples/multi_image.py --model FOLDER
"""

import sys

from xcomposer.loading import DATA, arguments, load


def main(argv=None):
    parser = arguments(__doc__)
    parser.add_argument("--image", nargs=2, default=[str(DATA / "shapes.png"), str(DATA / "house.png")])
    parser.add_argument("--third", default=str(DATA / "report.png"), help="the picture of the second turn")
    args = parser.parse_args(argv)
    model, tokenizer = load(args)
    settings = dict(do_sample=False, num_beams=3, use_meta=True, max_new_tokens=args.max_new_tokens)

    # First turn: two pictures.
    query = "Image1 <ImageHere>; Image2 <ImageHere>; what do the two images have in common?"
    images = list(args.image)
    response, history = model.chat(tokenizer, query, images, **settings)
    print(f"Q: {query}\nA: {response}\n")

    # Second turn: one more. The list of pictures covers the whole conversation in order; `history` holds the marks.
    query = "Image3 <ImageHere>; and how does this one differ from the others?"
    images = [*images, args.third]
    response, history = model.chat(tokenizer, query, images, history=history, **settings)
    print(f"Q: {query}\nA: {response}\n")

    # Third turn: text alone, about all three.
    query = "Which of the three would you put on a poster?"
    response, history = model.chat(tokenizer, query, images, history=history, **settings)
    print(f"Q: {query}\nA: {response}")
    return history


if __name__ == "__main__":
    main(sys.argv[1:])

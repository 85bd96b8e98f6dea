"""Articles: one from an instruction alone, one from an instruction and a picture.

    python examples/article.py --model FOLDER --text "Write about ..." --image a.png

compose_article.py goes on from here and places pictures with captions in the text.
"""

import sys

from xcomposer.loading import DATA, arguments, load

INSTRUCTION = (
    "Read the material and write an essay of at least 800 words, with a title of your own. Material: a harbour town "
    "keeps counting its ships by hand, every noon, although machines could do it. What is lost when nobody looks?"
)


def main(argv=None):
    parser = arguments(__doc__, max_new_tokens=4096)
    parser.add_argument("--text", default=INSTRUCTION)
    parser.add_argument("--image", default=str(DATA / "house.png"))
    parser.add_argument("--seed", type=int, default=8192, help="of the sampling; -1: another article each time")
    args = parser.parse_args(argv)
    model, _ = load(args)

    article = model.write_artical(args.text, seed=args.seed, max_new_tokens=args.max_new_tokens)
    print(f"{article}\n\n({len(article)} characters)\n")

    about_picture = "Please write a short essay, in a calm tone, on the theme of the picture. "
    with_picture = model.write_artical(about_picture, [args.image], seed=args.seed, max_new_tokens=args.max_new_tokens)
    print(f"{with_picture}\n\n({len(with_picture)} characters, on {args.image})")
    return [article, with_picture]


if __name__ == "__main__":
    main(sys.argv[1:])

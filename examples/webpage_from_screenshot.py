"""The HTML (with Tailwind CSS) of a webpage seen in a picture.

    python examples/webpage_from_screenshot.py --model FOLDER --image screenshot.png --out page.html
"""

import sys

from xcomposer.loading import DATA, arguments, load


def main(argv=None):
    parser = arguments(__doc__, max_new_tokens=4800)
    parser.add_argument("--image", default=str(DATA / "webpage.png"))
    parser.add_argument("--text", default="Generate the HTML code of this web image with Tailwind CSS.")
    parser.add_argument("--out", default="Screenshot-to-Webpage.html")
    parser.add_argument("--seed", type=int, default=202, help="of the sampling; -1: another page each time")
    args = parser.parse_args(argv)
    model, _ = load(args)

    html = model.screen_2_webpage(
        args.text,
        [args.image],
        seed=args.seed,
        repetition_penalty=3.0,
        max_new_tokens=args.max_new_tokens,
        output_path=args.out,
    )
    print(f"{len(html)} characters of HTML in {args.out}")
    return html


if __name__ == "__main__":
    main(sys.argv[1:])

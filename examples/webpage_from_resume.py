"""A personal page from a resume in Markdown, with its buttons working: a second pass writes the JavaScript.

    python examples/webpage_from_resume.py --model FOLDER --resume resume.md --out page.html
"""

import sys

from xcomposer.loading import DATA, arguments, load


def main(argv=None):
    parser = arguments(__doc__, max_new_tokens=4800)
    parser.add_argument("--resume", default=str(DATA / "resume.md"))
    parser.add_argument("--out", default="Resume-to-Personal_Page.html")
    parser.add_argument("--seed", type=int, default=202, help="of the sampling; -1: another page each time")
    args = parser.parse_args(argv)
    model, _ = load(args)

    html = model.resume_2_webpage(
        args.resume,
        seed=args.seed,
        repetition_penalty=3.0,
        max_new_tokens=args.max_new_tokens,
        output_path=args.out,
    )
    print(f"{len(html)} characters of HTML in {args.out}, {html.count('<script')} script elements")
    return html


if __name__ == "__main__":
    main(sys.argv[1:])

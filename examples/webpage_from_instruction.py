"""A webpage from a description.

    python examples/webpage_from_instruction.py --model FOLDER --text "A website for ..." --out page.html

Without --out the page goes to Instruction-aware_Webpage_Generation.html in the working directory, as ever.
"""

import sys

from xcomposer.loading import arguments, load

INSTRUCTION = (
    "A website for a small tea shop. The name is Kettle & Leaf. The top navigation bar is dark, with links to teas, "
    "pots and a journal. Below it, a banner says that the spring harvest is here, with a green button. Below the "
    "banner, three cards show a tea each, with picture, name and price. The footer gives the opening hours."
)


def main(argv=None):
    parser = arguments(__doc__, max_new_tokens=4800)
    parser.add_argument("--text", default=INSTRUCTION)
    parser.add_argument("--out", default="Instruction-aware_Webpage_Generation.html")
    parser.add_argument("--seed", type=int, default=202, help="of the sampling; -1: another page each time")
    args = parser.parse_args(argv)
    model, _ = load(args)

    html = model.write_webpage(
        args.text,
        seed=args.seed,
        task="Instruction-aware Webpage Generation",
        repetition_penalty=3.0,
        max_new_tokens=args.max_new_tokens,
        output_path=args.out,
    )
    print(f"{len(html)} characters of HTML in {args.out}")
    return html


if __name__ == "__main__":
    main(sys.argv[1:])

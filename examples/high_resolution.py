"""Small print in a large picture: `hd_num` says how many tiles of 560 x 560 pixels the picture may take.

    python examples/high_resolution.py --model FOLDER --image scan.png --text "..." --hd_num 24 6

More tiles show finer detail and cost more: each is some 400 tokens of the prompt. 24 are the default for one picture.
"""

import sys
import time

from xcomposer.loading import DATA, arguments, load


def main(argv=None):
    parser = arguments(__doc__)
    parser.add_argument("--image", default=str(DATA / "report.png"))
    parser.add_argument("--text", default="Read the notes under the table. What does the harbour office not count?")
    parser.add_argument("--hd_num", type=int, nargs="+", default=[24, 6], help="ask once with each")
    args = parser.parse_args(argv)
    model, tokenizer = load(args)

    print(f"Q: {args.text}")
    answers = []
    for hd_num in args.hd_num:
        began = time.perf_counter()
        response, _ = model.chat(
            tokenizer,
            args.text,
            [args.image],
            hd_num=hd_num,
            do_sample=False,
            num_beams=3,
            use_meta=True,
            max_new_tokens=args.max_new_tokens,
        )
        tokens = model.encode_img(args.image, hd_num).shape[1]
        print(f"A, at most {hd_num} tiles ({tokens} image tokens, {time.perf_counter() - began:.1f} s): {response}")
        answers.append(response)
    return answers


if __name__ == "__main__":
    main(sys.argv[1:])

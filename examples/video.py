"""A question about a video, and a follow-up.

    python examples/video.py --model FOLDER --video clip.mp4

A video goes where a picture goes. One frame a second is read, 32 at most, spread evenly.
Needs a decoder: pip install av
"""

import sys

from xcomposer.loading import DATA, arguments, load


def main(argv=None):
    parser = arguments(__doc__)
    parser.add_argument("--video", default=str(DATA / "rolling_ball.mp4"))
    args = parser.parse_args(argv)
    model, tokenizer = load(args)
    settings = dict(do_sample=False, num_beams=3, use_meta=True, max_new_tokens=args.max_new_tokens)

    query = "Here are some frames of a video. Describe this video in detail."
    video = [args.video]
    response, history = model.chat(tokenizer, query, video, **settings)
    print(f"Q: {query}\nA: {response}\n")

    query = "In what order do the colours come?"
    response, history = model.chat(tokenizer, query, video, history=history, **settings)
    print(f"Q: {query}\nA: {response}")
    return history


if __name__ == "__main__":
    main(sys.argv[1:])

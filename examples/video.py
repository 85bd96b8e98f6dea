"""A question about a video: `python examples/video.py [FOLDER]`. Needs a decoder: `pip install av`.

A video goes where a picture goes. One frame a second is read, 32 at most, spread evenly.
"""

import sys

from transformers import AutoModel, AutoTokenizer

import xcomposer  # noqa: F401  after it, a released folder loads as it is

folder = sys.argv[1] if len(sys.argv) > 1 else "demo"
model = AutoModel.from_pretrained(folder, dtype="auto").eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
settings = dict(do_sample=False, use_meta=True, max_new_tokens=64)

video = ["examples/data/rolling_ball.mp4"]
query = "Here are some frames of a video. Describe this video in detail."
answer, history = model.chat(tokenizer, query, video, **settings)
print(answer)
answer, history = model.chat(tokenizer, "In what order do the colours come?", video, history=history, **settings)
print(answer)

"""Several pictures in one conversation: `python examples/multi_image.py [FOLDER]`."""

import sys

from transformers import AutoModel, AutoTokenizer

import xcomposer  # noqa: F401  after it, a released folder loads as it is

folder = sys.argv[1] if len(sys.argv) > 1 else "demo"
model = AutoModel.from_pretrained(folder, dtype="auto").eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
settings = dict(do_sample=False, num_beams=3, use_meta=True, max_new_tokens=64)

# `<ImageHere>` marks each picture's place.
query = "Picture 1: <ImageHere>\nPicture 2: <ImageHere>\nWhich picture has a green triangle?"
pictures = ["demo/pictures/pair1.png", "demo/pictures/pair2.png"]
answer, history = model.chat(tokenizer, query, pictures, **settings)
print(answer)

# The history keeps the marks, so a later turn says nothing of them. One more picture in it would bring its own mark,
# and stand at the end of the list: the list covers the whole conversation in order.
query = "Which picture has a star?"
answer, history = model.chat(tokenizer, query, pictures, history=history, **settings)
print(answer)

"""Chat about a picture, then ask on: `python examples/chat.py [FOLDER]`."""

import sys

from transformers import AutoModel, AutoTokenizer

import xcomposer  # noqa: F401  after it, a released folder loads as it is

folder = sys.argv[1] if len(sys.argv) > 1 else "demo"
model = AutoModel.from_pretrained(folder, dtype="auto").eval()
tokenizer = AutoTokenizer.from_pretrained(folder)

pictures = ["demo/pictures/shapes.png"]  # a path, an address, bytes, a PIL image, an array: all are taken
answer, history = model.chat(tokenizer, "What colour is the star?", pictures, do_sample=False)
print(answer)

# The pictures are those of the whole conversation; the history says what was asked and answered.
answer, history = model.chat(tokenizer, "Where is it?", pictures, history=history, do_sample=False)
print(answer)

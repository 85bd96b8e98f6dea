"""An article from an instruction, and one about a picture: `python examples/article.py [FOLDER]`.

`compose_article.py` goes on from here, with captioned pictures in their places and a file at the end.
"""

import sys

from transformers import AutoModel, AutoTokenizer

import xcomposer  # noqa: F401  after it, a released folder loads as it is

folder = sys.argv[1] if len(sys.argv) > 1 else "demo"
model = AutoModel.from_pretrained(folder, dtype="auto").eval()
model.tokenizer = AutoTokenizer.from_pretrained(folder)

print(model.write_artical("Write about the first snow in the mountains.", seed=8192, max_new_tokens=800))
print(model.write_artical("Write about the picture.", ["demo/pictures/shapes.png"], seed=8192, max_new_tokens=800))

"""Small print in a large picture: `python examples/high_resolution.py [FOLDER]`.

`hd_num` is the most tiles that a picture may take. More tiles show finer detail, and each is some 400 tokens of the
prompt at the release's sizes (9 on the demo). 24 are the default for one picture.
"""

import sys

from transformers import AutoModel, AutoTokenizer

import xcomposer  # noqa: F401  after it, a released folder loads as it is

folder = sys.argv[1] if len(sys.argv) > 1 else "demo"
model = AutoModel.from_pretrained(folder, dtype="auto").eval()
tokenizer = AutoTokenizer.from_pretrained(folder)

picture = "demo/pictures/code.png"
for hd_num in (24, 1):
    query = "Which number is written here?"
    answer, _ = model.chat(tokenizer, query, [picture], hd_num=hd_num, do_sample=False, max_new_tokens=64)
    print(f"at most {hd_num} tiles ({model.encode_img(picture, hd_num).shape[1]} image tokens): {answer}")

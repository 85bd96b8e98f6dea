"""Sample several answers, keep the one that a reward model likes best: `python examples/best_of_n.py [CHAT REWARD]`."""

import sys

from peft import PeftModel
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

import xcomposer  # noqa: F401  after it, a released folder loads as it is

QUERY, PICTURES, N = "What is at the top left?", ["demo/pictures/shapes.png"], 8

folder = sys.argv[1] if len(sys.argv) > 2 else "demo"
model = AutoModel.from_pretrained(folder, dtype="auto").eval()
model.tokenizer = AutoTokenizer.from_pretrained(folder)

if len(sys.argv) > 2:  # a folder of InternLM-XComposer-2.5-Reward
    reward = AutoModel.from_pretrained(sys.argv[2], dtype="auto").eval()
    reward.tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
else:  # the demo's: its own weights, with a head and a LoRA on them
    reward = AutoModelForSequenceClassification.from_pretrained(folder, dtype="float32", new_head=True)
    reward = PeftModel.from_pretrained(reward, "demo/reward").eval()
    reward.get_base_model().tokenizer = model.tokenizer

answers, _ = model.batch_chat(None, [QUERY] * N, [PICTURES] * N, temperature=1.5, top_p=0.95, max_new_tokens=64, seed=0)
answers = list(dict.fromkeys(answers))
talks = [[{"role": "user", "content": QUERY}, {"role": "assistant", "content": answer}] for answer in answers]
order, scores = reward.rank(talks, [PICTURES] * len(talks), return_logits=True)
for place in order:
    print(f"{scores[place]:7.2f}  {answers[place]}")

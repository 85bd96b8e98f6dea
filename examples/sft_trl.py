"""The same with TRL's SFTTrainer, for those who have their pipelines there: a LoRA from rows of any known format.

    python finetune/sft_trl.py --model FOLDER --data train.json --output_dir OUT

Needs: pip install trl datasets peft. TRL tokenises by the processor's chat template, so a picture without a mark stands
at the head of the first question, not in front of the conversation. Learned are the answers and what closes them.
"""

import argparse
import sys

from datasets import Dataset, Image, List
from peft import LoraConfig
from transformers import AutoModel, AutoProcessor
from trl import SFTConfig, SFTTrainer

from xcomposer.finetune.formats import Row, read_rows
from xcomposer.finetune.modes import LORA_TARGETS
from xcomposer.model.prompting_internlm_xcomposer2 import IMAGE_MARK


def as_messages(row: Row) -> dict:
    """A row in TRL's words: typed content, and the pictures in the order of their places."""
    messages, places = [], sum(text.count(IMAGE_MARK) for _, text in row.turns)
    for role, text in row.turns:
        if role == "user" and places == 0 and row.media:
            text, places = IMAGE_MARK + text, 1
        first, *rest = text.split(IMAGE_MARK)
        content = [{"type": "text", "text": first}] if first else []
        for piece in rest:
            content += [{"type": "image"}, *([{"type": "text", "text": piece}] if piece else [])]
        messages.append({"role": role, "content": content})
    return {"messages": messages, "images": row.media}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("--model", "--data", "--output_dir"):
        parser.add_argument(name, required=True)
    parser.add_argument("--max_steps", type=int, default=-1)
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()

    rows = read_rows(args.data)
    if bad := [row for row in rows if not isinstance(row, Row)]:
        sys.exit("\n".join(f"bad row: {row.name}: {row.reason}" for row in bad))
    dataset = Dataset.from_list([as_messages(row) for row in rows])
    dataset = dataset.cast_column("images", List(Image()))  # opened when their batch comes
    trainer = SFTTrainer(
        AutoModel.from_pretrained(args.model, trust_remote_code=True),
        args=SFTConfig(
            args.output_dir, max_length=None, assistant_only_loss=True, learning_rate=5e-5, logging_steps=1,
            per_device_train_batch_size=1, max_steps=args.max_steps, report_to="none",
            use_cpu=args.cpu, bf16=not args.cpu,
        ),
        train_dataset=dataset,
        processing_class=AutoProcessor.from_pretrained(args.model, trust_remote_code=True),
        peft_config=LoraConfig(r=64, lora_alpha=64, target_modules=LORA_TARGETS, task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()

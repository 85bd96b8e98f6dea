"""transformers' Trainer for this model: what is added to it, and no more.

Added: logits of answer tokens alone, `infer_mode`, length groups without opening a picture, checkpoints under the
released names that resume, and the loss curve.
"""

import json
import logging
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from xcomposer.finetune.modes import ADAPTER_FILE, LEARNING_RATES, adapter_state
from xcomposer.model.prompting_internlm_xcomposer2 import IGNORE_INDEX

logger = logging.getLogger(__name__)

# What stands beside the weights in a model folder.
COMPANIONS = (
    "*.py", "*processor*config.json", "chat_template.jinja", "tokenizer*", "special_tokens_map.json",
    "generation_config.json", "*.ttf", "*.otf",
)  # fmt: skip


@dataclass
class Arguments(TrainingArguments):
    """TrainingArguments with the defaults of fine-tuning this model."""

    per_device_train_batch_size: int = 1
    per_device_eval_batch_size: int = 1
    num_train_epochs: float = 1.0
    learning_rate: float | None = field(default=None, metadata={"help": "Default: 1e-5 for full, else 5e-5."})
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = field(default=0.01, metadata={"help": "Steps of warmup, or below 1 a part of all."})
    logging_steps: float = 1
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide NaN losses."})
    save_steps: float = 500
    save_total_limit: int | None = 2
    dataloader_num_workers: int = 2
    remove_unused_columns: bool = False
    prediction_loss_only: bool = True
    report_to: str | None = "none"
    ddp_find_unused_parameters: bool | None = False  # every batch reaches all that is trained, see `Collator`


class GroupedSampler(Sampler):
    """Rows in random order, neighbours of about one length; each epoch's order depends on the seed alone."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


def answers_only(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Model inputs that compute logits at no position but those where some row has a token to learn.

    Raises:
        ValueError: there is none in the batch.
    """
    targets = F.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)  # (B, T), at the position that predicts them
    kept = (targets != IGNORE_INDEX).any(0).nonzero().squeeze(1)
    if not len(kept):
        raise ValueError("every label of this batch is masked: its loss would be 0, and nothing would be learned")
    return {**inputs, "logits_to_keep": kept, "shift_labels": targets[:, kept]}


class IXCTrainer(Trainer):
    """See the module.

    Args:
        base: folder whose code, tokenizer and processor files are put beside saved weights.
        infer_mode: which task adapters are on while training.
        adapters: task adapters that are trained; checkpoints then hold these alone.
        lengths: tokens of each training row, for `--train_sampling_strategy group_by_length`.
        save_dtype: of the finished model; None: as trained.
    """

    def __init__(
        self,
        model,
        args: Arguments,
        *,
        base: Path | None = None,
        infer_mode: str = "base",
        adapters: tuple[str, ...] = (),
        lengths: Sequence[int] | None = None,
        save_dtype: torch.dtype | None = None,
        **kwargs,
    ):
        if args.learning_rate is None:
            args.learning_rate = LEARNING_RATES["lora" if adapters or hasattr(model, "peft_config") else "full"]
        super().__init__(model, args, **kwargs)
        self.base, self.infer_mode, self.adapters = base, infer_mode, adapters
        self.lengths, self.save_dtype = lengths, save_dtype
        self.add_callback(LossCurve())

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy == "group_by_length" and self.lengths is not None:
            batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
            return GroupedSampler(self.lengths, batch, self.args.seed)
        return super()._get_train_sampler(train_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of the answers; see `answers_only`."""
        inputs = {**answers_only(inputs), "infer_mode": self.infer_mode}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _save(self, output_dir=None, state_dict=None):
        """A checkpoint on the way (an adapter alone where one is trained), or the finished model."""
        folder = Path(output_dir or self.args.output_dir)
        finished = folder == Path(self.args.output_dir)
        if hasattr(self.model, "peft_config"):
            return super()._save(str(folder), state_dict)
        if not self.args.should_save:
            return None
        state = dict(self.model.state_dict() if state_dict is None else state_dict)
        if self.adapters and not finished:
            folder.mkdir(parents=True, exist_ok=True)
            part = {name: tensor.contiguous() for name, tensor in adapter_state(state, self.adapters).items()}
            save_file(part, folder / ADAPTER_FILE, metadata={"format": "pt"})
            self.model.config.save_pretrained(folder)
            torch.save(self.args, folder / "training_args.bin")
            return None
        if finished and self.save_dtype is not None:
            state = {n: t.to(self.save_dtype) if t.is_floating_point() else t for n, t in state.items()}
        super()._save(str(folder), state)
        if finished and self.save_dtype is not None:
            name_dtype(folder / "config.json", self.save_dtype)
        if self.base is not None:
            copy_companions(self.base, folder)
        return None

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """The library's would find none of its names in files that hold the released ones."""
        if hasattr(self.model, "peft_config") or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        model = self.model if model is None else model
        folder = Path(resume_from_checkpoint)
        files = [folder / ADAPTER_FILE] if self.adapters else sorted(folder.glob("model*.safetensors"))
        state = {}
        for file in files:
            state.update({tree_name(model, name): tensor for name, tensor in load_file(file).items()})
        needed = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        if missing := sorted(needed - state.keys()):
            raise ValueError(f"{folder} lacks {len(missing)} of the weights that are trained: {missing[:3]}")
        own = model.state_dict().keys()
        model.load_state_dict({name: tensor for name, tensor in state.items() if name in own}, strict=False)
        return None


class PreferenceTrainer(IXCTrainer):
    """Trains a score head on pairs, see `PairCollator`: the loss is -log sigmoid(chosen - rejected)."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Bradley-Terry's, as IXC-2.5-Reward was trained (arXiv:2501.12368, section 3.2)."""
        outputs = model(**inputs)
        chosen, rejected = outputs.logits.flatten().chunk(2)
        loss = -F.logsigmoid(chosen - rejected).mean()
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The library's asks for labels before it computes a loss."""
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None


def tree_name(model, name: str) -> str:
    """A released parameter name as the module tree has it."""
    for pattern, replacement in sys.modules[type(model).__module__].RENAMINGS:
        name = re.sub(pattern, replacement, name)
    return name


def copy_companions(base: Path, folder: Path) -> None:
    """Code, tokenizer and processor files of the model folder `base`, beside the weights in `folder`."""
    for pattern in COMPANIONS:
        for file in base.glob(pattern):
            shutil.copyfile(file, folder / file.name)


def name_dtype(config_file: Path, dtype: torch.dtype) -> None:
    """Say in a saved config which dtype the weights beside it have."""
    fields = json.loads(config_file.read_text(encoding="utf-8"))
    for part in (fields, fields.get("text_config"), fields.get("vision_config")):
        if part:
            part["dtype"] = str(dtype).removeprefix("torch.")
    config_file.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class LossCurve(TrainerCallback):
    """Writes `loss.json` at each log, and `loss.png` at checkpoints and at the end where matplotlib is installed."""

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "loss.json").write_text(json.dumps(state.log_history, indent=1) + "\n")

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            draw_losses(state.log_history, Path(args.output_dir) / "loss.png")

    on_train_end = on_save


def draw_losses(history: Sequence[dict], path: Path) -> None:
    """Training and evaluation loss over steps."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("no %s: pip install matplotlib; the losses are in loss.json", path.name)
        return
    figure = Figure(figsize=(8, 4.5), layout="tight")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o-")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="step", ylabel="loss")
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)

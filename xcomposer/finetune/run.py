"""Fine-tune the model on pictures, videos and text.

    xcomposer finetune --model FOLDER --data train.json --output_dir OUT --mode lora --bf16
    accelerate launch --config_file fsdp2.yaml -m xcomposer finetune --model ... --mode full

README.md beside this file has the formats and the modes; --help has every switch, transformers' own included. All rows
are checked before any weight is loaded.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser, set_seed
from transformers.trainer_utils import get_last_checkpoint

from xcomposer.family import require_family
from xcomposer.finetune import modes
from xcomposer.finetune.data import (
    Checked,
    Collator,
    Encoder,
    PairCollator,
    PairEncoder,
    RowDataset,
    check_rows,
)
from xcomposer.finetune.formats import BadRow, Pair, Row, read_rows
from xcomposer.finetune.training import Arguments, IXCTrainer, PreferenceTrainer
from xcomposer.model.ixc_utils import check_count

RUN_FILE = "run.json"
# What must stay the same for a resumed run to be the one that was begun.
TRAINING_FIELDS = (
    "seed", "num_train_epochs", "max_steps", "learning_rate", "per_device_train_batch_size",
    "gradient_accumulation_steps", "train_sampling_strategy", "bf16",
)  # fmt: skip
EXPECTED = (OSError, ValueError, ImportError)


@dataclass
class Settings:
    """What this script adds to transformers' training arguments."""

    model: str = field(metadata={"help": "Folder of the model: weights, tokenizer and this repo's code."})
    data: str = field(metadata={"help": "Training rows: .json, .jsonl, or a .txt list of such files with counts."})
    eval_data: str | None = field(default=None, metadata={"help": "Rows for the evaluation loss."})
    image_folder: str | None = field(default=None, metadata={"help": "Where relative paths of pictures begin."})
    mode: str = field(default="lora", metadata={"help": "What is trained.", "choices": modes.MODES})
    skip_bad: bool = field(default=False, metadata={"help": "Leave bad rows out instead of stopping at them."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in output_dir, if any."})
    hd_num: int | None = field(default=None, metadata={"help": "Most tiles of a picture (default: 18; 6 of several)."})
    num_frm: int = field(default=32, metadata={"help": "Most frames of a video."})
    max_length: int | None = field(default=None, metadata={"help": "Longest row in tokens (default: the model's)."})
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Of the weights in memory (default: float32 for full, else as saved).",
            "choices": ["float32", "bfloat16", "float16"],
        },
    )
    freeze_vision_tower: bool = field(default=False, metadata={"help": "full: leave the vision tower as it is."})
    freeze_projector: bool = field(default=False, metadata={"help": "full: leave the projector as it is."})
    freeze_partial_lora: bool = field(default=False, metadata={"help": "full: leave the partial LoRA as it is."})
    lora_rank: int = field(default=64, metadata={"help": "lora, qlora: rank."})
    lora_alpha: int = field(default=64, metadata={"help": "lora, qlora: the LoRA is scaled by alpha / rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "lora, qlora: dropout before the LoRA."})
    task: str | None = field(default=None, metadata={"help": "adapter: web, write, or a new name."})
    task_rank: int | None = field(default=None, metadata={"help": "adapter: rank of a new one (default: 256)."})
    start: str | None = field(default=None, metadata={"help": "LoRA or adapter to begin from (a folder)."})

    def __post_init__(self):
        for name in ("hd_num", "num_frm", "max_length", "lora_rank", "lora_alpha", "task_rank"):
            if getattr(self, name) is not None:
                check_count(f"--{name}", getattr(self, name), "leave it out for the default")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora_dropout is {self.lora_dropout}, but must be 0 or more and below 1")
        if self.mode not in modes.MODES:
            raise ValueError(f"unknown --mode {self.mode!r}; use one of {', '.join(modes.MODES)}")
        if (self.mode == "adapter") != (self.task is not None):
            raise ValueError("--mode adapter and --task NAME (web, write, or a new name) go together")
        if self.task is not None:
            modes.adapter_names(self.task)
        if self.mode == "full" and self.start is not None:
            raise ValueError("--start is for lora, qlora and adapter; full begins from --model")


def parse(argv: Sequence[str] | None = None) -> tuple[Settings, Arguments]:
    parser = HfArgumentParser(
        (Settings, Arguments),
        description=__doc__.split("\n")[0],
        prog="xcomposer finetune",
        epilog="example: xcomposer finetune --model FOLDER --data train.json --output_dir OUT --mode lora --bf16",
    )
    settings, arguments = parser.parse_args_into_dataclasses(argv)
    if arguments.learning_rate is None:
        arguments.learning_rate = modes.LEARNING_RATES[settings.mode]
    if settings.eval_data is not None and arguments.eval_strategy == "no":
        arguments.eval_strategy = arguments.save_strategy
        arguments.eval_steps = arguments.save_steps
    return settings, arguments


def run_of(settings: Settings, arguments: Arguments, processes: int) -> dict:
    """What makes a run the run it is, for the file that a resumed run is compared with."""
    fields = {name: value for name, value in asdict(settings).items() if name not in ("resume", "image_folder")}
    fields.update({name: getattr(arguments, name) for name in TRAINING_FIELDS}, processes=processes)
    return json.loads(json.dumps(fields, default=str))


def last_checkpoint(output: Path, run: dict, resume: bool) -> str | None:
    """The checkpoint to go on from; None for a new run.

    Raises:
        FileExistsError: a run is there and is not to be resumed. ValueError: it is another run.
    """
    names = {path.name for path in output.iterdir()} if output.exists() else set()
    if names <= {RUN_FILE}:  # also where a run failed before its first step
        return None
    file = output / RUN_FILE
    if not file.is_file():
        raise FileExistsError(f"{output} has files in it, but no run of this script; name a new folder")
    if not resume:
        raise FileExistsError(f"{output} holds a run; add --resume to go on with it, or name a new folder")
    begun = json.loads(file.read_text(encoding="utf-8"))
    changed = [f"{key} {begun.get(key)!r} -> {run.get(key)!r}" for key in run if begun.get(key) != run.get(key)]
    if changed:
        raise ValueError(f"{output} holds another run ({'; '.join(changed)}); resume that, or name a new folder")
    return get_last_checkpoint(str(output))


def check(
    rows: list[Row | Pair | BadRow],
    path: str,
    settings: Settings,
    encoder: Encoder | PairEncoder,
    arguments: Arguments,
) -> Checked:
    """Rows of the file `path`, checked; the bad ones are listed on stderr.

    Raises:
        ValueError: bad rows and no --skip-bad, or no good row.
    """
    progress = not arguments.disable_tqdm
    checked = check_rows(rows, encoder, arguments.dataloader_num_workers, progress)
    if PartialState().is_main_process:
        for name, reason in checked.bad:
            print(f"bad row: {name}: {reason}", file=sys.stderr)
        if checked.bad and settings.skip_bad and checked.rows:
            print(f"{path}: {len(checked.bad)} bad rows left out, {len(checked.rows)} remain", file=sys.stderr)
    if checked.bad and not settings.skip_bad:
        count = len(checked.bad)
        raise ValueError(f"{path}: {count} bad rows, listed above; mend them, or leave them out: --skip-bad")
    if not checked.rows:
        raise ValueError(f"{path}: none of its {len(rows)} rows can be trained on")
    return checked


def build_model(settings: Settings, arguments: Arguments, scores: bool = False):
    """The model, prepared for its mode, and the names of the task adapters that are trained.

    Args:
        scores: with a score head.
    """
    dtype = getattr(torch, settings.dtype) if settings.dtype else None
    model = modes.load_model(settings.model, settings.mode, dtype, arguments.device, scores)
    model.config.use_cache = False
    if settings.mode == "full":
        frozen = [part for part in modes.PARTS if getattr(settings, f"freeze_{part}")]
        modes.prepare_full(model, tuple(frozen))
        return model, ()
    if settings.mode == "adapter":
        names = modes.prepare_adapter(model, settings.task, settings.task_rank, settings.start)
        if arguments.bf16:  # autocast computes in bf16; the optimiser needs the float32 that it adds to
            for parameter in filter(lambda p: p.requires_grad, model.parameters()):
                parameter.data = parameter.data.float()
        return model, names
    lora = (settings.lora_rank, settings.lora_alpha, settings.lora_dropout)
    return modes.prepare_lora(model, *lora, start=settings.start), ()


def build_trainer(
    settings: Settings, arguments: Arguments, train: Checked, evaluation: Checked | None, encoder: Encoder | PairEncoder
) -> IXCTrainer:
    """Model, datasets and collator in a trainer."""
    set_seed(arguments.seed)
    stored = AutoConfig.from_pretrained(settings.model, trust_remote_code=True).dtype
    scores = isinstance(encoder, PairEncoder)
    model, names = build_model(settings, arguments, scores)
    trainer, collator = (PreferenceTrainer, PairCollator) if scores else (IXCTrainer, Collator)
    return trainer(
        model,
        arguments,
        data_collator=collator(encoder, touch_vision=needs_touch(model, arguments)),
        train_dataset=RowDataset(train.rows, encoder),
        eval_dataset=None if evaluation is None else RowDataset(evaluation.rows, encoder),
        base=Path(settings.model),
        infer_mode=settings.task or "base",
        adapters=names,
        lengths=train.lengths,
        save_dtype=stored if settings.mode in ("full", "adapter") else None,
    )


def needs_touch(model, arguments: Arguments) -> bool:
    """Whether every batch must run the vision tower: see `Collator`."""
    if arguments.world_size == 1:
        return False
    sharded = PartialState().distributed_type in ("FSDP", "DEEPSPEED") or bool(arguments.fsdp or arguments.deepspeed)
    vision = any(p.requires_grad for n, p in model.named_parameters() if ".vision_" in n or n.endswith("_GN"))
    return sharded or vision or os.environ.get("ACCELERATE_USE_FSDP") == "true"


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def memory_advice(settings: Settings, arguments: Arguments, error: BaseException) -> str:
    """What to lower, of what is not low yet."""
    batch = arguments.per_device_train_batch_size
    advice = [
        f"--per_device_train_batch_size 1 (it is {batch}; raise --gradient_accumulation_steps)" if batch > 1 else "",
        "" if arguments.gradient_checkpointing else "--gradient_checkpointing",
        "" if arguments.bf16 else "--bf16",
        f"--hd_num (it is {settings.hd_num or '18, 6 of several'}; a tile is some 400 tokens)",
        "--max_length with --skip-bad, which leaves the longest rows out",
        {"full": "--mode lora, or FSDP or ZeRO-3 (configs/)", "qlora": ""}.get(settings.mode, "--mode qlora"),
    ]
    return f"out of memory ({str(error).splitlines()[0]}); lower it by " + ", ".join(filter(None, advice))


def check_head(settings: Settings, config, pairs: bool) -> None:
    """Raise a ValueError where rows, head and mode do not go together."""
    if pairs and settings.mode == "adapter":
        raise ValueError(f"{settings.data} holds pairs, which train a score head; use --mode full, lora or qlora")
    if not pairs and config.head == "score":
        raise ValueError(
            f"{settings.model} has a score head, which learns from pairs (conversations_a and conversations_b, or "
            f"chosen and rejected); {settings.data} holds none"
        )


def train(settings: Settings, arguments: Arguments) -> IXCTrainer:
    """The whole run: check, load, train, save."""
    state = PartialState()
    output = Path(arguments.output_dir)
    run = run_of(settings, arguments, state.num_processes)
    checkpoint = last_checkpoint(output, run, settings.resume)
    require_family(settings.model)
    config = AutoConfig.from_pretrained(settings.model, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(settings.model, trust_remote_code=True)
    rows = read_rows(settings.data, settings.image_folder, arguments.seed)
    pairs = any(isinstance(row, Pair) for row in rows)
    check_head(settings, config, pairs)
    encoder_of = PairEncoder if pairs else Encoder
    encoder = encoder_of(config, tokenizer, settings.hd_num, settings.num_frm, settings.max_length)
    checked = check(rows, settings.data, settings, encoder, arguments)
    evaluation = None
    if settings.eval_data:
        rows = read_rows(settings.eval_data, settings.image_folder, arguments.seed)
        evaluation = check(rows, settings.eval_data, settings, encoder, arguments)
    state.wait_for_everyone()
    if state.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        (output / RUN_FILE).write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    trainer = build_trainer(settings, arguments, checked, evaluation, encoder)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    return trainer


def main(argv: Sequence[str] | None = None) -> int:
    settings = arguments = None
    try:
        settings, arguments = parse(argv)
        train(settings, arguments)
    except EXPECTED as error:
        print(f"finetune: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        print(f"finetune: {memory_advice(settings, arguments, error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

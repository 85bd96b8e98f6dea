"""Put this repo's code beside released weights, after checking every tensor's name and shape against it.

    xcomposer adopt CHECKPOINT_DIR             # copies of the code
    xcomposer adopt CHECKPOINT_DIR --link      # links to this clone
    xcomposer adopt CHECKPOINT_DIR --dry-run   # only say what would be done

Sizes and adapter ranks are read from the headers of the weight files, so a 22 GB release takes seconds and no memory.
`config.json` keeps the release's own fields and gains what they leave out: vision_config, plora_rank, plora_alpha and
task_adapter_ranks. Weights and vocabulary are never written. A file that is replaced stays as FILE.orig. Everything is
checked before the first write: a folder that does not fit is named with its faults and left as it was, and a second
run changes nothing.
"""

import argparse
import copy
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from xcomposer.files import CODE, code_files
from xcomposer.machine import amount, quiet_imports
from xcomposer.model.kinds_internlm_xcomposer2 import DEFAULT_KIND, KINDS, kind_fields
from xcomposer.model.recognition_internlm_xcomposer2 import (
    ADAPTER,
    HEADS,
    adapter_ranks,
    complete,
    foreign,
    released_name,
    vision_facts,
)
from xcomposer.model.weight_files_internlm_xcomposer2 import Misfit, Stored, WeightFiles, count, read_json, some

OF_THE_CALLER = ("attn_implementation", "_attn_implementation", "auto_map")  # no matter for names and shapes
CHANGED = {"copy": "copied", "link": "linked", "write": "written"}


@dataclass
class Change:
    """One file to put in the folder: `data` as a new file, or a link to `source`."""

    path: Path
    data: bytes
    source: Path | None = None  # set: link

    def is_done(self) -> bool:
        if self.source is not None and self.path.exists():
            return self.path.resolve() == self.source
        leads_here = self.path.parent.resolve() != CODE == self.path.resolve().parent  # a link where a copy is due
        return self.path.is_file() and not leads_here and self.path.read_bytes() == self.data

    def replaces_other_contents(self) -> bool:
        return self.path.is_file() and self.path.read_bytes() != self.data


@dataclass
class Findings:
    """What the folder holds and what is to be done; `screen` writes it out."""

    folder: Path
    files: list[str]
    tensors: dict[str, Stored]  # by released name, those the model loads
    ignored: list[str]
    config: Any  # InternLMXcomposer2Config
    fields: dict[str, Any]  # the new config.json
    new_fields: list[str]
    notes: list[str]
    packing: str | None = None  # what of the weights is packed, in words
    changes: list[Change] = field(default_factory=list)
    done: list[Change] = field(default_factory=list)


# What the code expects.


class Code:
    """What the model's code expects of a checkpoint, and its names both ways."""

    def __init__(self):
        with quiet_imports():
            from xcomposer.model import configuration_internlm_xcomposer2, modeling_internlm_xcomposer2

        self.configuration, self.modeling = configuration_internlm_xcomposer2, modeling_internlm_xcomposer2

    def expect(self, fields: Mapping[str, Any]) -> tuple[Any, dict[str, tuple[int, ...]], set[str], list[str]]:
        """Config, shapes by released name, names that may be absent, patterns to ignore: from the model itself.

        Raises:
            Misfit: the configuration refuses `fields`.
        """
        fields = copy.deepcopy({name: value for name, value in fields.items() if name not in OF_THE_CALLER})
        try:  # on a copy: transformers completes the rope section in place
            config = self.configuration.InternLMXcomposer2Config(**fields)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise Misfit(f"config.json: {error}") from error
        with torch.device("meta"):
            model = self.modeling.InternLMXComposer2ForCausalLM(config)
        shapes = {released_name(name): tuple(value.shape) for name, value in model.state_dict().items()}
        if config.head == "score":
            del shapes["output.weight"]
            shapes["score.weight"] = (1, config.hidden_size)
        tied = set(model._tied_weights_keys or {}) if config.tie_word_embeddings else set()
        ignorable = sorted(model._keys_to_ignore_on_load_unexpected or ())
        return config, shapes, {released_name(name) for name in tied}, ignorable


def by_released_name(stored: Sequence[Stored]) -> dict[str, Stored]:
    table: dict[str, Stored] = {}
    clashes = []
    for tensor in stored:
        name = released_name(tensor.name)
        if name in table:
            clashes.append(f"{table[name].name} and {tensor.name}")
        table[name] = tensor
    if clashes:
        raise Misfit(f"{count(len(clashes), 'parameter')} under two names: {some(clashes)}")
    return table


def refuse_foreign(table: Mapping[str, Stored], config: Mapping[str, Any], code: Code) -> None:
    """Raise a Misfit when most tensors are none of this model family's, whatever its sizes."""
    relative = foreign(table)
    if relative is not None:
        raise Misfit(f"this is {relative}")
    known = {re.sub(r"\d+", "N", name) for name in (*code.expect({})[1], *HEADS)}
    unknown = [t.name for name, t in table.items() if re.sub(r"\d+", "N", name) not in known]
    unknown = [name for name in unknown if not ADAPTER.search(name)]
    if 2 * len(unknown) > len(table):
        kind = ", ".join(config.get("architectures") or [str(config.get("model_type"))])
        raise Misfit(
            f"not an InternLM-XComposer-2.5 checkpoint (config.json: {kind}): {len(unknown):,} of "
            f"{count(len(table), 'tensor')} are unknown to this code: {some(unknown)}"
        )
    if not any(name.startswith("vit.") or ".Plora_" in name for name in table):
        raise Misfit("this is a text-only InternLM2 (no vision tower, no partial LoRA); it is not for this code")


def settle_adapters(text: dict[str, Any], table: Mapping[str, Stored], faults: list[str], notes: list[str]) -> None:
    """Put the weights' ranks into `text`. Here the weights are right: a release says nothing of ranks."""
    ranks, task = adapter_ranks(table)
    plora = Counter(ranks.values()).most_common(1)[0][0] if ranks else None
    stated_rank, stated_alpha = text.get("plora_rank"), text.get("plora_alpha")
    if plora is not None:
        if stated_rank not in (None, plora):
            notes.append(f"plora_rank was {stated_rank!r} in config.json, the weights have {plora}")
        text["plora_rank"] = plora
        if stated_alpha is None or (stated_alpha == stated_rank != plora):
            text["plora_alpha"] = plora
            notes.append(f"plora_alpha is not in the weights: set to the rank ({plora}, scale 1), as released")
        elif stated_rank not in (None, plora):
            notes.append(f"plora_alpha stays {stated_alpha!r}, as config.json has it")
    stated = text.get("task_adapter_ranks")
    if stated is not None and not isinstance(stated, dict):
        faults.append(f"config.json: task_adapter_ranks is {stated!r}, not ranks by name")
        return
    absent = sorted(set(stated or {}) - set(task))
    if absent:
        faults.append(
            f"config.json names task adapters that the weights lack: {some(absent)}; download them, or take them out "
            f"of task_adapter_ranks"
        )
    for name, rank in (stated or {}).items():
        if task.get(name, rank) != rank:
            notes.append(f"task adapter {name}: the rank was {rank!r} in config.json, the weights have {task[name]}")
    if stated != task:  # an equal one keeps its order
        text["task_adapter_ranks"] = {**dict.fromkeys(name for name in stated or {} if name in task), **task}


def complete_config(
    config: Mapping[str, Any], table: Mapping[str, Stored], code: Code
) -> tuple[dict[str, Any], list[str], list[str]]:
    """`config` with what it leaves out, contradictions with the weights, and notes for the screen.

    Raises:
        Misfit: a number of attention heads is missing: weights do not tell it.
    """
    fields: dict[str, Any] = copy.deepcopy(dict(config))
    faults: list[str] = []
    notes: list[str] = []
    nested = isinstance(fields.get("text_config"), dict)
    text = fields["text_config"] if nested else fields  # a nested section is what save_pretrained writes
    heads = text.get("num_attention_heads", fields.get("num_attention_heads"))
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
        raise Misfit(
            f"config.json: num_attention_heads is {heads!r}, and the weights do not tell it; take config.json from the "
            f"release (the 7B has 32)"
        )
    settle_adapters(text, table, faults, notes)

    stated = fields.get("vision_config") or {}
    if not isinstance(stated, dict):
        raise Misfit(f"config.json: vision_config is {stated!r}, not fields by name")
    defaults = code.configuration.VISION_DEFAULTS
    found = {fact.field: fact.value for fact in vision_facts(table) if fact.section == "vision"}
    width = found.get("hidden_size", defaults["hidden_size"])
    if width == defaults["hidden_size"]:  # the release says nothing of its tower, which is the default one
        tower = {name: defaults[name] for name in ("intermediate_size", "num_hidden_layers", "num_attention_heads")}
    elif "num_attention_heads" in stated:
        tower = {}
    else:
        raise Misfit(
            f"config.json: vision_config.num_attention_heads is missing, and the weights do not tell it (the released "
            f"tower is {defaults['hidden_size']} wide with {defaults['num_attention_heads']} heads, this one {width})"
        )
    fields["vision_config"] = {**tower, **stated}
    try:
        fields, contradictions = complete(fields, table)
    except ValueError as error:
        raise Misfit(f"config.json: {error}") from error
    faults += [f"config.json: {fault}" for fault in contradictions]
    vision, order = fields["vision_config"], {**stated, **defaults}
    fields["vision_config"] = {name: vision.get(name, default) for name, default in order.items()} | vision
    said_by_kind = {**kind_fields(fields["kind"]), "kind": DEFAULT_KIND}
    fields = {n: v for n, v in fields.items() if n in config or n not in said_by_kind or v != said_by_kind[n]}

    own = read_json(CODE / "config.json")
    fields |= {name: own[name] for name in ("architectures", "auto_map")}
    return fields, faults, notes


def compare(table: Mapping[str, Stored], shapes: Mapping[str, tuple], optional: set[str], ignorable: list[str]):
    """Faults, and the tensors that the model does not load but may find."""
    missing = [name for name in shapes if name not in table and name not in optional]
    unknown = [name for name in table if name not in shapes]
    ignored = [name for name in unknown if any(re.search(pattern, name) for pattern in ignorable)]
    unknown = [table[name].name for name in unknown if name not in ignored]
    wrong = [
        f"{table[name].name} is {table[name].shape}, not {shape}"
        for name, shape in shapes.items()
        if name in table and table[name].shape != shape
    ]
    faults = [
        f"{count(len(names), 'tensor')} {what}: {some(names)}"
        for names, what in ((missing, "missing"), (wrong, "of the wrong shape"), (unknown, "unknown to this code"))
        if names
    ]
    return faults, ignored


# What to write.


def tokenizer_config_works(folder: Path) -> bool:
    """Whether the folder's own `tokenizer_config.json` leads to a tokenizer that this code or transformers has."""
    path = folder / "tokenizer_config.json"
    try:
        config = read_json(path) if path.is_file() else {}
    except Misfit:
        return False
    reference = (config.get("auto_map") or {}).get("AutoTokenizer")
    if reference is None:
        generic = ("PreTrainedTokenizerFast", "TokenizersBackend")
        return config.get("tokenizer_class") in generic and (folder / "tokenizer.json").is_file()
    if not isinstance(reference, list) or not isinstance(reference[0], str):
        return False  # transformers 5 wants the pair [slow, fast]
    module, _, name = reference[0].partition(".")
    source = CODE / f"{module}.py"
    return source.is_file() and re.search(rf"^class {re.escape(name)}\b", source.read_text("utf-8"), re.M) is not None


def plan(folder: Path, config: Mapping[str, Any], fields: Mapping[str, Any], vocab_size: int, link: bool) -> list:
    """Every file that should stand in `folder`, `config.json` last."""
    changes = []
    for source in code_files():
        changes.append(Change(folder / source.name, source.read_bytes(), source if link else None))
    own = read_json(CODE / "config.json")
    wanted = {"tokenizer_config.json": not tokenizer_config_works(folder)}
    # Stop tokens are ids of the released vocabulary.
    same_vocabulary = vocab_size == own["vocab_size"]
    wanted["generation_config.json"] = same_vocabulary and not (folder / "generation_config.json").exists()
    for name, is_wanted in wanted.items():
        if is_wanted and (CODE / name).is_file():
            changes.append(Change(folder / name, (CODE / name).read_bytes()))
    path = folder / "config.json"
    data = path.read_bytes() if config == fields else (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()
    return [*changes, Change(path, data)]


def apply(changes: Sequence[Change]) -> list[str]:
    """Make the changes and return the names of backups. All is written beside the files before the first moves in."""
    staged: list[tuple[Path, Path]] = []
    backups = []

    def stage(path: Path) -> Path:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
        staged.append((Path(name), path))
        return Path(name)

    try:
        for change in changes:
            backup = change.path.with_name(change.path.name + ".orig")
            if change.replaces_other_contents() and not backup.exists():
                shutil.copyfile(change.path, stage(backup))
                backups.append(backup.name)
        for change in changes:
            temporary = stage(change.path)
            if change.source is not None:
                temporary.unlink()
                temporary.symlink_to(change.source)
            else:
                temporary.write_bytes(change.data)
        for temporary, path in staged:
            if not temporary.is_symlink():
                os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide the file from a server's user
            os.replace(temporary, path)
    finally:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)
    return backups


def examine(folder: Path, link: bool = False) -> Findings:
    """Read, check and plan; nothing is written.

    Raises:
        Misfit: the folder cannot be adopted.
    """
    if not folder.is_dir():
        raise Misfit("there is no such folder")
    weights = WeightFiles(folder)
    if not (folder / "config.json").is_file():
        raise Misfit("no config.json, and the weights do not tell the number of attention heads; download it")
    config = read_json(folder / "config.json")
    code = Code()
    table = by_released_name(list(weights.tensors.values()))
    refuse_foreign(table, config, code)
    fields, faults, notes = complete_config(config, table, code)
    try:
        parsed, shapes, optional, ignorable = code.expect(fields)
        misfits, ignored = compare(table, shapes, optional, ignorable)
    except Misfit as misfit:
        raise Misfit(*faults, *misfit.lines) from misfit
    if faults or misfits:
        raise Misfit(*faults, *misfits)

    tensors = {name: tensor for name, tensor in table.items() if name in shapes}
    dtypes = Counter(tensor.dtype for tensor in tensors.values())
    stated = config.get("torch_dtype", config.get("dtype"))
    if stated not in (None, "auto") and stated not in dtypes:
        notes.append(f"config.json says {stated}, the weights are {', '.join(dtypes)}: converted on loading")
    new_fields = sorted(name for name in fields if config.get(name) != fields[name])
    found = Findings(folder, weights.files, tensors, ignored, parsed, fields, new_fields, notes, weights.packing)
    for change in plan(folder, config, fields, parsed.vocab_size, link):
        (found.done if change.is_done() else found.changes).append(change)
    return found


def tokenizer_kind(folder: Path) -> str:
    kinds = {"tokenizer.json": "tokenizer.json (fast)", "tokenizer.model": "tokenizer.model (SentencePiece)"}
    here = [kind for name, kind in kinds.items() if (folder / name).is_file()]
    return ", ".join(here) or "NONE: download tokenizer.model, chat needs it"


def describe(found: Findings) -> list[tuple[str, str]]:
    """What the folder holds, as (label, text) rows."""
    tensors, text, vision = found.tensors.values(), found.config.text_config, found.config.vision_config
    groups: Counter = Counter()
    for name, tensor in found.tensors.items():
        match = ADAPTER.search(name)
        groups[match[1] if match else "base"] += tensor.nbytes
    dtypes = Counter(tensor.dtype for tensor in tensors)
    dtype = next(iter(dtypes)) if len(dtypes) == 1 else ", ".join(f"{name} ({n:,})" for name, n in dtypes.items())
    total = sum(tensor.size for tensor in tensors)
    unit, scale = next((u, s) for u, s in (("B", 1e9), ("M", 1e6), ("k", 1e3), ("", 1)) if total >= s)
    kind = "safetensors" if found.files[0].endswith(".safetensors") else "bin"
    unused = f"; {count(len(found.ignored), 'tensor')} not used: {some(found.ignored, 1)}" if found.ignored else ""
    tasks = [f"{name} {rank} ({amount(groups['lora_' + name])})" for name, rank in text.task_adapter_ranks.items()]
    tiles = "px a picture," if found.config.tiling == "none" else "px tiles of"
    tile = f"{vision.image_size} {tiles} {found.config.tokens_per_side**2} tokens"
    rows = [
        ("kind", KINDS[found.config.kind].title),
        ("weights", f"{count(len(found.files), f'{kind} file')}, {amount(sum(t.nbytes for t in tensors))}{unused}"),
        ("parameters", f"{total / scale:.2f} {unit} in {count(len(tensors), 'tensor')}, {dtype}"),
        (
            "decoder",
            f"{text.num_hidden_layers} layers, width {text.hidden_size}, feed-forward {text.intermediate_size}, "
            f"{text.num_attention_heads} heads ({text.num_key_value_heads} key/value), vocabulary {text.vocab_size}",
        ),
        (
            "vision",
            f"{vision.num_hidden_layers} layers, width {vision.hidden_size}, feed-forward {vision.intermediate_size}, "
            f"{vision.num_attention_heads} heads, patch {vision.patch_size}, {tile}",
        ),
        ("partial LoRA", f"rank {text.plora_rank}, alpha {text.plora_alpha} ({amount(groups['Plora'])})"),
        ("task adapters", ", ".join(tasks) or "none: chat works, the webpage and article methods need them"),
        ("tokenizer", tokenizer_kind(found.folder)),
        ("checked", f"names and shapes of {count(len(tensors), 'tensor')}: all as the code expects"),
    ]
    if found.packing:
        rows.insert(2, ("packed", found.packing))
    return [*rows, *(("note", note) for note in found.notes)]


def screen(found: Findings, backups: Sequence[str], dry_run: bool) -> str:
    rows = describe(found)
    would = "would be " if dry_run else ""
    by_kind: dict[str, list[str]] = defaultdict(list)
    for change in found.changes:
        kind = "write" if change.path.name == "config.json" else "link" if change.source else "copy"
        by_kind[would + CHANGED[kind]].append(change.path.name)
    for what, names in by_kind.items():
        if names == ["config.json"]:
            rows.append((what, f"config.json: {', '.join(found.new_fields)}"))
        else:
            rows.append((what, f"{count(len(names), 'file')}: {some(names)}"))
    if backups:
        rows.append(("kept", f"what was replaced: {some(backups)}"))
    if found.done:
        rows.append(("unchanged", f"{count(len(found.done), 'file')}: {some([c.path.name for c in found.done])}"))
    if not found.changes:
        rows.append(("nothing to do", "the folder is as it should be; no file was touched"))
    chat = ["xcomposer", "chat", "--model", str(found.folder), "--text", "Hello"]
    rows.append(("next", shlex.join(chat)))
    lines = [f"{KINDS[found.config.kind].title} in {found.folder}", *(f"  {label:<17}{text}" for label, text in rows)]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="example: xcomposer adopt FOLDER --dry-run", prog="xcomposer adopt"
    )
    parser.add_argument("folder", metavar="CHECKPOINT_DIR", type=Path, help="folder with released weights and config")
    parser.add_argument("--link", action="store_true", help="link to this clone's code instead of copying it")
    parser.add_argument("--dry-run", action="store_true", help="check and say what would be done; write nothing")
    options = parser.parse_args(arguments)
    try:
        found = examine(options.folder, options.link)
        backups = [] if options.dry_run else apply(found.changes)
    except Misfit as misfit:
        print(f"adopt: {options.folder} cannot be adopted; nothing was changed", file=sys.stderr)
        for line in misfit.lines:
            print(f"  - {line}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"adopt: {options.folder}: {error}", file=sys.stderr)
        return 1
    print(screen(found, backups, options.dry_run))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Whether a folder or a hub id is a checkpoint of this family, told from its `config.json` alone."""

from typing import Any

MODEL_TYPE = "internlmxcomposer2"
# Arguments of a `from_pretrained` that say where a file is to be found.
WHERE = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")


def class_names(fields: dict[str, Any]) -> list[str]:
    """The classes that the fields of a `config.json` name."""
    auto_map = fields.get("auto_map") or {}
    named = [*(fields.get("architectures") or ()), *(auto_map.values() if isinstance(auto_map, dict) else ())]
    return [name for name in named if isinstance(name, str)]


def is_family(fields: dict[str, Any]) -> bool:
    """Whether the fields of a `config.json` are those of a checkpoint of this family.

    Releases spell `model_type` in several ways, some of them a language model's; the classes that they name tell.
    """
    return fields.get("model_type") == MODEL_TYPE or any("xcomposer2" in name.lower() for name in class_names(fields))


def read_fields(name_or_path: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The `config.json` that `from_pretrained(name_or_path, **kwargs)` asks for, or None where there is none."""
    from transformers import PretrainedConfig

    where = {name: kwargs[name] for name in WHERE if name in kwargs}
    try:
        return PretrainedConfig.get_config_dict(name_or_path, **where)[0]
    except (OSError, ValueError, TypeError):
        return None


def belongs(name_or_path: Any, kwargs: dict[str, Any]) -> bool:
    """Whether `from_pretrained(name_or_path, **kwargs)` asks for a checkpoint of this family.

    False where there is no `config.json` to tell by: the caller's own error is the better one then.
    """
    from transformers import PretrainedConfig

    config = kwargs.get("config")
    if isinstance(config, PretrainedConfig):
        return config.model_type == MODEL_TYPE
    fields = read_fields(name_or_path, kwargs)
    return fields is not None and is_family(fields)


def relative(name_or_path: Any, kwargs: dict[str, Any] | None = None) -> str | None:
    """What a checkpoint of another architecture is, and where to look, if it is one often taken for this family."""
    from xcomposer.model.kinds_internlm_xcomposer2 import RELATIVES

    names = class_names(read_fields(name_or_path, kwargs or {}) or {})
    found = next((it for it in RELATIVES if any(part in name for part in it.classes for name in names)), None)
    return None if found is None else f"{name_or_path} is {found}"


def require_family(name_or_path: Any) -> None:
    """Raise a ValueError for a checkpoint of another family, which says what it is; a folder without config passes."""
    fields = read_fields(name_or_path, {})
    if fields is not None and not is_family(fields):
        named = class_names(fields)[:1] or [f"model_type {fields.get('model_type')!r}"]
        other = f"{name_or_path} is no checkpoint of this family: its config.json names {named[0]}"
        raise ValueError(relative(name_or_path) or other)

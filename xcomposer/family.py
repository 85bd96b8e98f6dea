"""Whether a folder or a hub id is a checkpoint of this family, told from its `config.json` alone."""

from typing import Any

MODEL_TYPE = "internlmxcomposer2"
# Arguments of a `from_pretrained` that say where a file is to be found.
WHERE = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")


def is_family(fields: dict[str, Any]) -> bool:
    """Whether the fields of a `config.json` are those of a checkpoint of this family.

    Releases spell `model_type` in several ways, some of them a language model's; the classes that they name tell.
    """
    if fields.get("model_type") == MODEL_TYPE:
        return True
    auto_map = fields.get("auto_map") or {}
    named = [*(fields.get("architectures") or ()), *(auto_map.values() if isinstance(auto_map, dict) else ())]
    return any("xcomposer2" in name.lower() for name in named if isinstance(name, str))


def belongs(name_or_path: Any, kwargs: dict[str, Any]) -> bool:
    """Whether `from_pretrained(name_or_path, **kwargs)` asks for a checkpoint of this family.

    False where there is no `config.json` to tell by: the caller's own error is the better one then.
    """
    from transformers import PretrainedConfig

    config = kwargs.get("config")
    if isinstance(config, PretrainedConfig):
        return config.model_type == MODEL_TYPE
    where = {name: kwargs[name] for name in WHERE if name in kwargs}
    try:
        fields, _ = PretrainedConfig.get_config_dict(name_or_path, **where)
    except (OSError, ValueError, TypeError):
        return False
    return is_family(fields)

"""Where the code, its metadata and the demo checkpoint lie, in a clone and in an installed package alike."""

from pathlib import Path

import xcomposer.model

# What stands beside the weights under remote code; the configs of a checkpoint are its own.
CODE_PATTERNS = ("*.py", "*processor*config.json", "chat_template.jinja")
CODE = Path(next(iter(xcomposer.model.__path__)))  # the flat model files and the release's metadata


def code_files() -> list[Path]:
    """The files that `adopt` puts beside a checkpoint's weights."""
    return sorted(path for pattern in CODE_PATTERNS for path in CODE.glob(pattern))

"""InternLM-XComposer-2.5 on today's transformers: `import xcomposer`, and released folders load as they are.

    import xcomposer
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained("internlm/internlm-xcomposer2d5-7b", dtype="auto")

The import registers the model's classes with the Auto classes of transformers (see `register`); it brings in neither
torch nor the model before one of those is used. `xcomposer.model` holds the files that a checkpoint folder holds under
remote code; everything that is run (command line, servers, fine-tuning, checkpoint tools) stands beside it.
"""

import sys
from pathlib import Path
from types import ModuleType

CHECKOUT = Path(__file__).resolve().parents[1]  # in a clone; of no meaning in an installed wheel


def _model_package() -> None:
    """Let `xcomposer.model` be the flat files at the top of a clone. A wheel has them in a folder of that name."""
    if "xcomposer.model" in sys.modules or (Path(__file__).parent / "model").is_dir():
        return
    package = ModuleType("xcomposer.model", "The model's files: what a checkpoint folder holds under remote code.")
    package.__path__ = [str(CHECKOUT)]
    sys.modules[package.__name__] = package
    globals()["model"] = package


_model_package()

from .register import register  # noqa: E402

register()

__all__ = ["register"]

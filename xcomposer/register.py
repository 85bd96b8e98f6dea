"""Makes the Auto classes of transformers open this family's checkpoints with this package's classes.

`from_pretrained` of each Auto class first asks whether a folder or a hub id belongs to the family. If so, the classes
here are registered (`AutoModel.register` and its like), and config, tokenizer and processors are handed to them. The
registry alone is not enough: releases call their `model_type` "internlm2" and their tokenizer `InternLM2Tokenizer`,
names of a language model that is not to be touched, and most have no processor files.

What a folder says in `auto_map` is not run, whatever `trust_remote_code` is. `import xcomposer` costs nothing: an Auto
class is wrapped when transformers imports its module, and the model is imported when the first checkpoint is opened.
"""

import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

from xcomposer.family import MODEL_TYPE, belongs, relative

AUTO = "transformers.models.auto."


class Row(NamedTuple):
    """An Auto class, the module it stands in, and what opens our checkpoints in its place."""

    module: str
    auto_class: str
    our_module: str
    our_class: str

    def ours(self) -> type:
        return getattr(importlib.import_module("xcomposer.model." + self.our_module), self.our_class)


CONFIG = ("configuration_internlm_xcomposer2", "InternLMXcomposer2Config")
CAUSAL_LM = ("modeling_internlm_xcomposer2", "InternLMXComposer2ForCausalLM")
FRONT = (
    Row("configuration_auto", "AutoConfig", *CONFIG),
    Row("tokenization_auto", "AutoTokenizer", "tokenization_internlm_xcomposer2", "InternLMXComposer2Tokenizer"),
    Row(
        "image_processing_auto", "AutoImageProcessor",
        "image_processing_internlm_xcomposer2", "InternLMXComposer2ImageProcessor",
    ),
    Row(
        "video_processing_auto", "AutoVideoProcessor",
        "video_processing_internlm_xcomposer2", "InternLMXComposer2VideoProcessor",
    ),
    Row("processing_auto", "AutoProcessor", "processing_internlm_xcomposer2", "InternLMXComposer2Processor"),
)  # fmt: skip
SCORES = ("reward_internlm_xcomposer2", "InternLMXComposer2ForSequenceClassification")
MODELS = (
    *(
        Row("modeling_auto", auto_class, *CAUSAL_LM)  # which opens a checkpoint with a score head, too
        for auto_class in (
            "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM",
        )
    ),
    Row("modeling_auto", "AutoModelForSequenceClassification", *SCORES),
)  # fmt: skip


# Arguments of the Auto classes' `from_pretrained` that are settled once the class is known.
SETTLED = ("trust_remote_code", "code_revision", "use_fast", "tokenizer_type", "backend")


@functools.cache
def register_classes() -> None:
    """Register every class under our config class, for `from_config`, `pipeline` and what else looks a config up."""
    config = FRONT[0].ours()
    for row in (*FRONT, *MODELS):
        auto_class = getattr(importlib.import_module(AUTO + row.module), row.auto_class)
        if row.auto_class == "AutoConfig":
            auto_class.register(config.model_type, config, exist_ok=True)
        elif row.auto_class == "AutoImageProcessor":
            auto_class.register(config, slow_image_processor_class=row.ours(), exist_ok=True)
        else:
            auto_class.register(config, row.ours(), exist_ok=True)


def _hand_over(auto_class: type, row: Row) -> None:
    """Let `from_pretrained` of an Auto class hand our checkpoints to our class."""
    library = auto_class.from_pretrained.__func__  # type: ignore[attr-defined]

    @functools.wraps(library)
    def from_pretrained(cls, pretrained_model_name_or_path, *inputs, **kwargs):
        if not belongs(pretrained_model_name_or_path, kwargs):
            try:
                return library(cls, pretrained_model_name_or_path, *inputs, **kwargs)
            except Exception as error:  # whatever it is: a relative's name is the better thing to say
                what = relative(pretrained_model_name_or_path, kwargs)
                if what is None:
                    raise
                raise ValueError(what) from error
        register_classes()
        for name in SETTLED if row.auto_class == "AutoConfig" else (*SETTLED, "config"):
            kwargs.pop(name, None)
        return row.ours().from_pretrained(pretrained_model_name_or_path, *inputs, **kwargs)

    auto_class.from_pretrained = classmethod(from_pretrained)  # type: ignore[attr-defined]


def _know_config(auto_class: type) -> None:
    """Let `from_config` of an Auto class know our config; its `from_pretrained` reads one with `AutoConfig`."""
    library = auto_class.from_config.__func__  # type: ignore[attr-defined]

    @functools.wraps(library)
    def from_config(cls, config, **kwargs):
        if config.model_type == MODEL_TYPE:
            register_classes()
        return library(cls, config, **kwargs)

    auto_class.from_config = classmethod(from_config)  # type: ignore[attr-defined]


def _wrap(module: ModuleType) -> None:
    """Wrap the Auto classes of a module of transformers."""
    short = module.__name__.removeprefix(AUTO)
    for row in FRONT:
        if row.module == short:
            _hand_over(getattr(module, row.auto_class), row)
    for row in MODELS:
        if row.module == short:
            _know_config(getattr(module, row.auto_class))


MODULES = {AUTO + row.module for row in (*FRONT, *MODELS)}


class _AfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads the modules of `MODULES` as Python does, and wraps their Auto classes then."""

    def __init__(self):
        self.loaders: dict[str, Any] = {}

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if fullname not in MODULES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None:
            self.loaders[fullname], spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loaders[spec.name].create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        loader = self.loaders.pop(module.__name__)
        module.__spec__.loader = module.__loader__ = loader  # type: ignore[union-attr]
        loader.exec_module(module)
        _wrap(module)


def register() -> None:
    """Make transformers' Auto classes open this family's checkpoints; a second call does nothing."""
    if any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _AfterImport())
    for name in MODULES & set(sys.modules):
        _wrap(sys.modules[name])

"""What stays in full precision when the model is loaded quantised.

A plain `BitsAndBytesConfig(load_in_4bit=True)` or `TorchAoConfig(...)` quantises the decoder's own linears: 7.0 of the
8.7 B parameters that the 7B release has without task adapters. The rest is small beside them, and image tokens and
the public methods' adapters hang on it.
"""

import copy
from typing import Any

from transformers.quantizers import AutoQuantizationConfig

from .packed_weights_internlm_xcomposer2 import FULL_PRECISION

# Where a quantisation config lists what it skips: bitsandbytes; torchao and most others.
SKIP_FIELDS = ("llm_int8_skip_modules", "modules_to_not_convert")


def keep_full_precision(quantization_config: Any) -> Any:
    """A copy of a quantisation config, or a config from its dict, that spares `FULL_PRECISION`.

    A config that names modules to skip, be it an empty list, says all it wants to say and stays as it is.
    """
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    quantization_config = copy.copy(quantization_config)
    for field in SKIP_FIELDS:
        if getattr(quantization_config, field, ()) is None:
            setattr(quantization_config, field, list(FULL_PRECISION))
    return quantization_config


class QuantisationMixin:
    """`quantization_config=` of `from_pretrained` spares `FULL_PRECISION`; stands before `PreTrainedModel`."""

    @classmethod
    def from_pretrained(cls, *args, quantization_config=None, **kwargs):
        """transformers' `from_pretrained`; see `keep_full_precision`."""
        if quantization_config is not None:
            kwargs["quantization_config"] = keep_full_precision(quantization_config)
        return super().from_pretrained(*args, **kwargs)

"""Registers the model with ms-swift 4, which knows the release but cannot load it: pass this file to its commands.

    swift infer --external_plugins xcomposer/swift_model.py --model FOLDER --model_type xcomposer2_5 --use_hf true
    swift sft   --external_plugins xcomposer/swift_model.py --model FOLDER --model_type xcomposer2_5 --use_hf true \\
        --tuner_type lora --target_modules all-linear --dataset data.jsonl

ms-swift's own loader of this family returns no model and asks for decord. What else differs here: where the parts of
the module tree are, that pictures take as many tiles as in `chat`, of the checkpoint's own tile side, and that
training computes the logits of whole rows (`XComposer2D5Loader`).
"""

import inspect
from typing import Any

from swift.model import Model, ModelGroup, ModelLoader, ModelMeta, MultiModelKeys, register_model, register_model_arch
from swift.template import StdTemplateInputs, Template, TemplateType, load_file, register_template
from swift.template.templates.internlm import InternLMXComposer2_5Template, Xcomposer2TemplateMeta
from swift.utils import get_env_args
from transformers.dynamic_module_utils import get_class_from_dynamic_module

MODEL_TYPE = "xcomposer2_5"


class XComposer2D5Template(InternLMXComposer2_5Template):
    """ms-swift's template, with pixels by the model's own layout: ms-swift's takes every tile for 560 pixels wide.

    `HD_NUM` in the environment is the most tiles of a picture; without it the model's own numbers count.
    """

    def _encode(self, inputs: StdTemplateInputs) -> dict[str, Any]:
        model = self.model
        encoded = Template._encode(self, inputs)
        pictures = [self._opened(source) for source in inputs.images or []]
        layout = model.config.layout
        hd_num = get_env_args("hd_num", int, layout.default_hd_num(len(pictures)))
        encoded["images"] = [layout.pixels(picture, hd_num, model.font).to(model.dtype) for picture in pictures]
        return encoded

    def _opened(self, source: Any) -> Any:
        """A picture as it is; a video, which ms-swift leaves unread, as its frames."""
        if not isinstance(source, str | bytes):
            return source
        load_media = get_class_from_dynamic_module("media_internlm_xcomposer2.load_media", self.model.model_dir)
        return load_media(source if isinstance(source, bytes) else load_file(source).getvalue())


class XComposer2D5Loader(ModelLoader):
    """ms-swift's, with a `forward` that does not show `logits_to_keep`.

    Where ms-swift finds it, it cuts labels to the positions that are learned, before its template of this family has
    put pictures between them; then labels and logits differ in number.
    """

    def get_model(self, *args, **kwargs):
        model = super().get_model(*args, **kwargs)
        forward = type(model).forward
        signature = inspect.signature(forward)
        shown = [value for name, value in signature.parameters.items() if name != "logits_to_keep"]
        forward.__signature__ = signature.replace(parameters=shown)
        return model


register_model_arch(
    MultiModelKeys(
        "xcomposer2_5_parts",
        language_model="model.language_model",
        aligner="model.vision_proj",
        vision_tower="model.vision_tower",
    )
)
register_template(Xcomposer2TemplateMeta(TemplateType.xcomposer2_5, template_cls=XComposer2D5Template), exist_ok=True)
register_model(
    ModelMeta(
        MODEL_TYPE,
        [ModelGroup([Model("Shanghai_AI_Laboratory/internlm-xcomposer2d5-7b", "internlm/internlm-xcomposer2d5-7b")])],
        XComposer2D5Loader,
        template=TemplateType.xcomposer2_5,
        architectures=["InternLMXComposer2ForCausalLM"],
        model_arch="xcomposer2_5_parts",
        tags=["vision", "video"],
    ),
    exist_ok=True,
)

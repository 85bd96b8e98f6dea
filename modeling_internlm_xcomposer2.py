"""InternLM-XComposer-2.5: vision tower, projector and decoder in one model that chats.

Legend: B batch, T tokens, D decoder width, N tiles of all pictures, S tokens along a
side of a tile, L image tokens of one picture.

Inside, the module tree is the one transformers and vLLM look for; on disk, the released parameter names stay, and
`RENAMINGS` maps one to the other both ways. The released tree's attributes remain as properties.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import (
    TransformersKwargs,
    can_return_tuple,
    is_flash_attn_2_available,
    is_kernels_available,
    logging,
)

from .adapter_names_internlm_xcomposer2 import ReleasedAdaptersMixin
from .build_mlp import VisionTower, build_projector, device_of, end_rows, in_own_type, join_tiles, merge_patches
from .cache_internlm_xcomposer2 import GrowingCache
from .chat_internlm_xcomposer2 import ChatMixin
from .configuration_internlm_xcomposer2 import InternLMXcomposer2Config
from .generation_internlm_xcomposer2 import PICTURE_INPUTS, PrefillMixin, PromptEmbeddings
from .ixc_utils import overview
from .kinds_internlm_xcomposer2 import refuse_methods_of_other_heads
from .modeling_internlm2 import InternLM2Model
from .quantisation_internlm_xcomposer2 import QuantisationMixin
from .recognition_internlm_xcomposer2 import RENAMINGS, CheckedLoadingMixin
from .release_clients_internlm_xcomposer2 import ReleaseClientsMixin
from .reuse_internlm_xcomposer2 import ReuseStore, default_limits
from .settings_internlm_xcomposer2 import SETTINGS, check_cache, check_settings, config_settings, end_tokens
from .task_adapters_internlm_xcomposer2 import TaskAdapterMixin
from .threads_internlm_xcomposer2 import ComputeLock

logger = logging.get_logger(__name__)

# Inputs that are read beside the token embeddings.
AT_EMBEDDING = ("input_ids", "inputs_embeds", "mm_token_type_ids", "im_mask", "attention_mask", "position_ids")
# Arguments of `generate` that bring or choose a cache.
OTHER_CACHES = ("past_key_values", "cache_implementation", "assistant_model", "is_assistant")


class InternLMXComposer2PreTrainedModel(QuantisationMixin, CheckedLoadingMixin, PreTrainedModel):
    """What transformers may do with the model, and what it may find in a released checkpoint."""

    config_class = InternLMXcomposer2Config
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer", "CLIPEncoderLayer", "CLIPVisionEmbeddings"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # The tower's last norm is never read; the buffers are computed; task adapters may stay on disk; OmniLive's memory
    # part reads its base's video_mem_proj.
    _keys_to_ignore_on_load_unexpected = [
        r"^video_mem_proj\.",
        r"post_layernorm\.",
        r"position_ids$",
        r"rotary_emb\.inv_freq$",
        r"\.task_[AB]\.",
    ]

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args, **kwargs) -> str:
        """transformers', which takes the hub's build of flash-attn where only the package `kernels` is installed.

        Releases ask for flash-attn in their config: a build that cannot be loaded here is no reason to fail.
        """
        asked = attn_implementation == "flash_attention_2" and not is_flash_attn_2_available()
        if not (asked and is_kernels_available()):
            return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)
        try:
            if not torch.accelerator.is_available():
                raise OSError("there is no GPU")
            found = super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)
        except Exception as error:  # whatever a download, a driver or a missing build may raise
            logger.warning_once(f"the hub's flash-attn cannot be loaded ({error}): attention runs on PyTorch's SDPA.")
            found = "sdpa"
        self.config._attn_implementation = found  # and of its parts, which would ask again
        return found

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, InternLMXComposer2Model) and self.config.image_separators:
            nn.init.normal_(module.plora_glb_GN, std=self.config.initializer_range)
            nn.init.normal_(module.plora_sub_GN, std=self.config.initializer_range)


class InternLMXComposer2Model(InternLMXComposer2PreTrainedModel):
    """Features, merge, decoder: everything but the head.

    Image tokens take the place of `image_token_id` (pictures) and `video_token_id` (stitched videos) in `input_ids`.
    """

    tiles_at_once = 8  # the ViT's activations stay small however large the picture is

    def __init__(self, config: InternLMXcomposer2Config):
        super().__init__(config)
        self.vision_tower = VisionTower._from_config(config.vision_config)
        self.vision_proj = build_projector(config)
        self.language_model = InternLM2Model._from_config(config.text_config)
        separators = (1, 1), (1, 1, 1)
        glb, sub = (
            nn.Parameter(torch.zeros(*ones, config.merged_width)) if config.image_separators else None
            for ones in separators
        )
        self.register_parameter("plora_glb_GN", glb)
        self.register_parameter("plora_sub_GN", sub)
        self.post_init()

    def _adjust_missing_and_unexpected_keys(self, loading_info) -> None:
        """The library's check of a checkpoint's names; a whole checkpoint's head is no surprise.

        (Listed among the ignored names, it would be left out by vLLM too, which builds the head beside this model.)
        """
        super()._adjust_missing_and_unexpected_keys(loading_info)
        heads = ("lm_head.", "score.")
        names = {name for name in loading_info.unexpected_keys if not name.startswith(heads)}
        loading_info.unexpected_keys = names

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.tok_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.tok_embeddings = value

    @property
    def tok_embeddings(self) -> nn.Module:
        """The released tree's name of the token embedding."""
        return self.language_model.tok_embeddings

    @property
    def layers(self) -> nn.ModuleList:
        """The released tree's name of the decoder layers."""
        return self.language_model.layers

    @property
    def norm(self) -> nn.Module:
        """The released tree's name of the decoder's last norm."""
        return self.language_model.norm

    def held(self, name: str) -> Tensor | None:
        """A parameter of this module itself, fetched where accelerate has offloaded it (which it does in `forward`).

        None: this kind of checkpoint has no such vector.
        """
        parameter, hook = getattr(self, name), getattr(self, "_hf_hook", None)
        if parameter is None:
            return None
        return parameter if not parameter.is_meta or hook is None else hook.weights_map[name].to(hook.execution_device)

    def encode_tiles(self, tiles: Tensor) -> Tensor:
        """Tiles (N, 3, tile, tile) -> merged patches (N, S, S, 4 V), a bounded number of tiles at a time."""
        tiles = tiles.to(device_of(self.vision_tower), self.vision_tower.embeddings.class_embedding.dtype)
        batches = tiles.split(self.tiles_at_once)
        features = [self.vision_tower(batch).last_hidden_state[:, 1:] for batch in batches]
        return merge_patches(torch.cat(features), self.config.spatial_merge_size)

    def arrange_pictures(
        self, tiles: Tensor, grids: list[list[int]], separator: Tensor | None, newline: Tensor | None
    ) -> list[Tensor]:
        """Tiles of several pictures -> each picture's sequence (L, 4 V), before the projector.

        A sequence is the global view's rows, the separator, then the rows of the joined tiles; each row ends with the
        newline vector (InternLM-XComposer2-4KHD, arXiv:2404.06512, section 3.2). Without separator and newline a
        picture is its one tile, row by row.
        """
        counts = [rows * cols for _, rows, cols in grids]
        if sum(counts) != len(tiles):
            raise ValueError(
                f"the grids {grids} ask for {sum(counts)} tiles (rows x cols for each picture), but pixel_values holds "
                f"{len(tiles)}; pass both as the processor returned them"
            )
        if separator is None or newline is None:
            if any(count != 1 for count in counts):
                raise ValueError(f"the grids {grids} hold several tiles a picture; this checkpoint takes one")
            return [tile_map.flatten(0, 1) for tile_map in self.encode_tiles(tiles)]
        parts = zip(tiles.split(counts), grids, strict=True)
        # A picture of one tile is its own global view.
        views = [overview(part, rows, cols) for part, (_, rows, cols) in parts if rows * cols > 1]
        maps = self.encode_tiles(torch.cat([torch.stack(views), tiles]) if views else tiles)
        views, maps = iter(maps[: len(views)]), maps[len(views) :]
        newline, separator = newline.to(maps), separator.to(maps)
        sequences = []
        for picture, (_, rows, cols) in zip(maps.split(counts), grids, strict=True):
            whole = end_rows(next(views) if rows * cols > 1 else picture[0], newline)
            detail = end_rows(join_tiles(picture, rows, cols), newline)
            sequences.append(torch.cat([whole, separator.flatten(0, 1), detail]))
        return sequences

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor, image_grid_thw: Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """Embeddings of pictures, one tensor (L, D) each in `pooler_output`.

        Args:
            pixel_values: (N, 3, tile, tile), the tiles of each picture in row order; its global view is made here.
            image_grid_thw: (pictures, 3), rows of (1, tile rows, tile columns).

        Raises:
            ValueError: grids and tiles differ in number.
        """
        grids = image_grid_thw.tolist()
        separator, newline = (self.held(name) for name in ("plora_glb_GN", "plora_sub_GN"))
        with in_own_type(self.vision_tower):
            sequences = self.arrange_pictures(pixel_values, grids, separator, newline)
            projected = self.vision_proj(torch.cat(sequences).to(device_of(self.vision_proj)))
        pooled = projected.split([len(sequence) for sequence in sequences])
        return BaseModelOutputWithPooling(last_hidden_state=projected[None], pooler_output=pooled)

    @can_return_tuple
    def get_video_features(
        self, pixel_values_videos: Tensor, video_grid_thw: Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """As `get_image_features`: a video is one tall picture of its frames."""
        return self.get_image_features(pixel_values_videos, video_grid_thw, return_dict=True)

    def get_rope_index(
        self, input_ids: Tensor, mm_token_type_ids: Tensor | None = None, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Positions (3, B, T) and their offset (B, 1), 0, as vLLM asks for them: it passes the decoder nothing else.

        Row 0 is the plain positions. Row 1 is the prompt's last position, which tells dynamic rope the prompt's length
        however the prompt is cut; tokens after it get their own position there, as in all rows (vLLM continues them).
        Row 2 is larger than row 0 by one at image tokens, and so carries the mask of partial LoRA.
        `InternLM2Model.forward` reads all three.
        """
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        types = torch.zeros_like(input_ids) if mm_token_type_ids is None else mm_token_type_ids
        last = positions[:, -1:].expand_as(positions)
        return torch.stack([positions, last, positions + (types > 0)]), torch.zeros_like(input_ids[:, :1])

    def image_slots(self, input_ids: Tensor) -> Tensor:
        """Where pictures and videos stand in ids (B, T): (B, T) bool."""
        return (input_ids == self.config.image_token_id) | (input_ids == self.config.video_token_id)

    def prompt_embeddings(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
    ) -> PromptEmbeddings:
        """Embeddings of ids (B, T), with picture and video features in the places of their placeholders.

        Args:
            mm_token_type_ids: (B, T), 0 where a placeholder id is text that somebody typed. None: nowhere.

        Raises:
            ValueError: placeholders and features differ in number.
        """
        embeds = PromptEmbeddings(self.get_input_embeddings(), input_ids)
        typed = None if mm_token_type_ids is None else mm_token_type_ids == 0
        for pixels, grids, token_id, features_of, kind in (
            (pixel_values, image_grid_thw, self.config.image_token_id, self.get_image_features, "image"),
            (pixel_values_videos, video_grid_thw, self.config.video_token_id, self.get_video_features, "video"),
        ):
            if pixels is None:
                continue
            slots = input_ids == token_id
            if typed is not None:
                slots &= ~typed
            features = torch.cat(features_of(pixels, grids, return_dict=True).pooler_output)
            if int(slots.sum()) != len(features):
                raise ValueError(
                    f"input_ids hold {int(slots.sum())} {kind} placeholder tokens, but the {kind} features have "
                    f"{len(features)} rows; build both with one processor call"
                )
            embeds.place(slots, features)
        return embeds

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        im_mask: Tensor | None = None,
        infer_mode: str = "base",
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Ids (B, T) with pictures, or embeddings (B, T, D), -> hidden states (B, T, D).

        Args:
            mm_token_type_ids: (B, >= T), above 0 at image tokens (the last T columns are read). Without it, image
                tokens are found by their placeholder ids in `input_ids`.
            im_mask: the same under the released name.
            infer_mode: which task adapters are on: "base" (none), "web", "write", or an adapter's own name.
        """
        image_mask = mm_token_type_ids if im_mask is None else im_mask
        has_pictures = pixel_values is not None or pixel_values_videos is not None
        if inputs_embeds is None:
            if image_mask is None and has_pictures:
                image_mask = self.image_slots(input_ids)
            types = None if image_mask is None else image_mask[:, -input_ids.shape[1] :]
            pictures = (pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw)
            inputs_embeds = self.prompt_embeddings(input_ids, *pictures, mm_token_type_ids=types).read()
        elif has_pictures:
            raise ValueError("pixels need input_ids to say where they stand; got inputs_embeds in their place")
        if image_mask is not None:
            image_mask = image_mask[:, -inputs_embeds.shape[1] :] > 0
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            image_mask=image_mask,
            infer_mode=infer_mode,
            use_cache=use_cache,
            **kwargs,
        )


class InternLMXComposer2WithHead(ReleasedAdaptersMixin, InternLMXComposer2PreTrainedModel):
    """The model below its head, and what it keeps between calls."""

    def __init__(self, config: InternLMXcomposer2Config):
        super().__init__(config)
        self.model = InternLMXComposer2Model(config)
        self.tokenizer = None  # set by the caller, or passed to the public methods
        self.compute_lock = ComputeLock()  # what the methods that compute take turns by
        self.reuse = ReuseStore(*default_limits(config))  # what past conversations leave for their next turns
        self.max_length = config.context_length  # tokens of a row of `forward(samples=...)`
        self.hd_num = config.default_hd_num  # tiles of `encode_img` when it is not told

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    @property
    def device(self) -> torch.device:
        """Where inputs go: the token embedding's device. (The library takes any parameter's.)"""
        return device_of(self.get_input_embeddings())

    def _at_embedding(self, first: Tensor | None, values: dict) -> tuple[Tensor | None, dict]:
        """`first`, and those of `values` that `AT_EMBEDDING` names, at the embedding: callers have them anywhere."""
        device = self.device
        moved = {name: values[name].to(device) for name in AT_EMBEDDING if isinstance(values.get(name), Tensor)}
        return first.to(device) if isinstance(first, Tensor) else first, moved

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: Tensor, image_grid_thw: Tensor, **kwargs):
        """See `InternLMXComposer2Model.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_grid_thw, **kwargs)

    def get_video_features(self, pixel_values_videos: Tensor, video_grid_thw: Tensor, **kwargs):
        """See `InternLMXComposer2Model.get_video_features`."""
        return self.model.get_video_features(pixel_values_videos, video_grid_thw, **kwargs)


def score_class() -> type[PreTrainedModel]:
    """The class of checkpoints with a score head; its module needs this one."""
    from .reward_internlm_xcomposer2 import InternLMXComposer2ForSequenceClassification

    return InternLMXComposer2ForSequenceClassification


@refuse_methods_of_other_heads("vocabulary")
class InternLMXComposer2ForCausalLM(
    TaskAdapterMixin, ChatMixin, ReleaseClientsMixin, PrefillMixin, InternLMXComposer2WithHead, GenerationMixin
):
    """The model with its head, `generate`, and the public methods (`chat`, `write_artical`, ...)."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.tok_embeddings.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: InternLMXcomposer2Config):
        super().__init__(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        """transformers' `from_pretrained`; Auto classes come here for any checkpoint, and get the class of its head.

        Args:
            task_adapters: see `TaskAdapterMixin.from_pretrained`.
        """
        if getattr(config, "head", None) == "score":
            return score_class().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config, **kwargs):
        """What `from_config` of the Auto classes calls; as `from_pretrained`, the class of the config's head."""
        if config.head == "score":
            return score_class()._from_config(config, **kwargs)
        return super()._from_config(config, **kwargs)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        im_mask: Tensor | None = None,
        infer_mode: str = "base",
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        samples: dict[str, Any] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """As `InternLMXComposer2Model.forward`, with logits (B, kept, vocabulary) and, from `labels` (B, T), a loss.

        Args:
            labels: token ids to predict (shifted inside), -100 where nothing is to be learned. Image tokens never are.
            logits_to_keep: compute logits of the last so many positions only (0: all), or of these positions.
            samples: training texts and pictures as the released data code hands them over, in the place of all other
                inputs; see `ReleaseClientsMixin`.
        """
        if samples is not None:
            return self.forward(**self._inputs_of_samples(samples), logits_to_keep=logits_to_keep, **kwargs)
        self._need_task_adapters(infer_mode)
        given = {"inputs_embeds": inputs_embeds, "mm_token_type_ids": mm_token_type_ids, "im_mask": im_mask}
        input_ids, moved = self._at_embedding(input_ids, given)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            pixel_values_videos=pixel_values_videos,
            video_grid_thw=video_grid_thw,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **moved,
            infer_mode="base" if infer_mode == self._merged_mode else infer_mode,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            vocab_size = self.config.text_config.vocab_size
            image_mask = mm_token_type_ids if im_mask is None else im_mask
            labels, kwargs = self._text_labels(labels, input_ids, image_mask, kwargs)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _text_labels(
        self, labels: Tensor, input_ids: Tensor | None, image_mask: Tensor | None, kwargs: dict
    ) -> tuple[Tensor, dict]:
        """Labels (B, T) without image tokens: trainers that learn whole conversations take their placeholders along.

        A trainer's count of the labels, which the loss is divided by, shrinks in the proportion of this batch.
        """
        if image_mask is None and input_ids is not None:
            image_mask = self.model.image_slots(input_ids)
        if image_mask is None or image_mask.shape != labels.shape:
            return labels, kwargs
        learned = labels.masked_fill(image_mask.to(labels.device) > 0, -100)
        count = kwargs.get("num_items_in_batch")
        if count is not None:
            kept, all_labels = ((rows != -100).sum().clamp(min=1) for rows in (learned, labels))
            kwargs = {**kwargs, "num_items_in_batch": count * (kept / all_labels)}
        return learned, kwargs

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args,
        im_mask: Tensor | None = None,
        **kwargs,
    ):
        """transformers' `generate`, and:

        Args:
            im_mask: (B, T), the released name of `mm_token_type_ids`.
            infer_mode: which task adapters are on, see `forward`.
            eos_token_id: a number that is one of the checkpoint's several end tokens stands for them all, see
                `end_tokens`; a list is taken as it is.

        Raises:
            ValueError: a setting of a wrong kind or out of its range, see `SETTINGS`.
        """
        if "eos_token_id" in kwargs:
            kwargs["eos_token_id"] = end_tokens(kwargs["eos_token_id"], self.generation_config.eos_token_id)
        check_settings({"generation_config": generation_config})
        check_settings(config_settings(generation_config), self.config.vocab_size)
        kwargs = check_settings(kwargs, self.config.vocab_size)
        kwargs = {name: value for name, value in kwargs.items() if value is not None or name not in SETTINGS}
        if im_mask is not None:
            kwargs["mm_token_type_ids"] = im_mask.long()
        inputs, moved = self._at_embedding(inputs, kwargs)
        kwargs.update(moved)
        said = config_settings(self.generation_config) | config_settings(generation_config) | kwargs
        check_cache(said.get("cache_implementation"), self.device.type)
        # Whoever brings or chooses a cache has it; an empty one counts, too. A draft's model keeps transformers' own.
        others = any(said.get(name) is not None for name in OTHER_CACHES)
        if not others and said.get("use_cache") is not False:
            kwargs["past_key_values"] = GrowingCache(self.config)
        with self.compute_lock, self.task_adapters_checked(kwargs.get("infer_mode", "base")):
            return super().generate(inputs, generation_config, *args, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, is_first_iteration: bool = False, **kwargs
    ) -> dict:
        """What follows the prompt is text: decode steps carry neither pictures nor an image mask."""
        types = kwargs.get("mm_token_type_ids")
        if types is not None and types.shape[1] < input_ids.shape[1]:  # transformers' drafts come without types
            kwargs["mm_token_type_ids"] = nn.functional.pad(types, (0, input_ids.shape[1] - types.shape[1]))
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in (*PICTURE_INPUTS, "mm_token_type_ids"):
                inputs.pop(name, None)
        return inputs


# transformers looks these up by class name, loading and saving.
for _name in ("InternLMXComposer2ForCausalLM", "InternLMXComposer2Model"):
    _renamings = [WeightRenaming(released, inside) for released, inside in RENAMINGS]
    register_checkpoint_conversion_mapping(_name, _renamings, overwrite=True)

__all__ = ["InternLMXComposer2ForCausalLM", "InternLMXComposer2Model", "InternLMXComposer2PreTrainedModel"]

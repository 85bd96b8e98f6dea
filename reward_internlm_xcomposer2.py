"""The model with a score head: a number for each conversation (InternLM-XComposer-2.5-Reward, arXiv:2501.12368).

A conversation is laid out as the release was trained: BOS, its turns, `</s>`, and a last token, whose hidden state the
head reads. Nothing is generated.

Legend: B conversations, T tokens, D decoder width.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.cache_utils import Cache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .conversation_internlm_xcomposer2 import Conversation, ConversationMixin, as_list
from .kinds_internlm_xcomposer2 import refuse_methods_of_other_heads
from .modeling_internlm_xcomposer2 import InternLMXComposer2WithHead
from .prompting_internlm_xcomposer2 import reward_text
from .recognition_internlm_xcomposer2 import RENAMINGS
from .release_clients_internlm_xcomposer2 import ReleaseClientsMixin
from .threads_internlm_xcomposer2 import takes_turns
from .weight_files_internlm_xcomposer2 import some

# Tokens of one forward call, padding included, at most (a longer conversation is a call of its own).
BATCH_TOKENS = 16384


def own_positions(attention_mask: Tensor) -> Tensor:
    """Positions (B, T) counted from each row's first token; padding takes its neighbour's.

    Dynamic rope goes by a row's greatest position: so a longer row beside it changes nothing.
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def last_attended(attention_mask: Tensor) -> Tensor:
    """The last position (B,) of each row that is attended to, wherever its padding stands."""
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (places * (attention_mask > 0)).argmax(-1)


def by_length(conversations: Sequence[Conversation], most: int) -> Iterator[list[int]]:
    """Indices of conversations in batches of about one length, `most` tokens each with padding."""
    lengths = [len(conversation.prompt.input_ids) for conversation in conversations]
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and lengths[index] * (len(batch) + 1) > most:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@refuse_methods_of_other_heads("score")
class InternLMXComposer2ForSequenceClassification(ConversationMixin, ReleaseClientsMixin, InternLMXComposer2WithHead):
    """The model with a linear `score` in place of the vocabulary, and the release's methods around it.

    The methods may be called from several threads, and read what `chat` reads as pictures.
    """

    _keys_to_ignore_on_load_unexpected = [
        *InternLMXComposer2WithHead._keys_to_ignore_on_load_unexpected,
        r"^lm_head\.",  # a vocabulary may ride along
    ]

    def __init__(self, config: PretrainedConfig):
        super().__init__(config)
        config.head, config.num_labels, config.problem_type = "score", 1, "regression"
        self.num_labels = config.num_labels
        self.score = nn.Linear(config.text_config.hidden_size, 1, bias=False)
        self.post_init()

    @classmethod
    def _from_config(cls, config, **kwargs):
        """A new model of a config of either head, without task adapters; the config given stays as it is."""
        config = copy.deepcopy(config)
        config.head, config.task_adapter_ranks = "score", {}
        return super()._from_config(config, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        config=None,
        new_head: bool = False,
        task_adapters: Any = None,
        output_loading_info: bool = False,
        **kwargs,
    ):
        """transformers' `from_pretrained`, and:

        Args:
            new_head: give a checkpoint of the vocabulary head a score head of zeros, to be trained. Its task adapters
                stay away.
            task_adapters: as the chat model takes it; a score is read without any.

        Raises:
            ValueError: the checkpoint has no score head, and none is asked for.
        """
        source = pretrained_model_name_or_path
        if not isinstance(config, PretrainedConfig):
            where = {**kwargs, "return_unused_kwargs": True}
            config, kwargs = cls.config_class.from_pretrained(config or source, **where)
        has_score = config.head == "score"
        if not has_score and not new_head:
            raise ValueError(
                f"{source} has a {config.head} head and no score.weight; load it with AutoModel, or pass new_head=True "
                f"to train a score head on it"
            )
        config.head = "score"
        if has_score:
            return super().from_pretrained(
                source, *args, config=config, output_loading_info=output_loading_info, **kwargs
            )
        config.task_adapter_ranks = {}
        model, info = super().from_pretrained(source, *args, config=config, output_loading_info=True, **kwargs)
        missing = sorted(set(info["missing_keys"]) - {"score.weight"})
        if missing:
            raise ValueError(f"{source} lacks {some(missing)}")
        nn.init.zeros_(model.score.weight)
        return (model, info) if output_loading_info else model

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
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        """As `InternLMXComposer2Model.forward`, with `logits` (B, 1): the score at each row's last attended position.

        Args:
            attention_mask: (B, T), 0 at padding, which may stand on either side. None: every row is full.
            labels: (B,) scores to come near to; `loss` is their mean squared error.
        """
        given = {"inputs_embeds": inputs_embeds, "mm_token_type_ids": mm_token_type_ids, "im_mask": im_mask}
        input_ids, moved = self._at_embedding(input_ids, {**given, "attention_mask": attention_mask})
        attention_mask = moved.pop("attention_mask", attention_mask)
        if attention_mask is not None and position_ids is None and past_key_values is None:
            position_ids = own_positions(attention_mask)
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
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        if attention_mask is None:
            last = hidden[:, -1]
        else:
            at = last_attended(attention_mask[:, -hidden.shape[1] :]).to(hidden.device)
            last = hidden[torch.arange(len(hidden), device=hidden.device), at]
        logits = self.score(last).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels.float(), pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def get_score(
        self,
        conversation: Sequence[Mapping[str, Any]] | str,
        image: Any = (),
        max_length: int = 16384,
        hd_num: int = 24,
        apply_template: bool = True,
    ) -> float:
        """The score of one conversation; see `get_scores`."""
        return self.get_scores([conversation], [image], max_length, hd_num, apply_template)[0]

    def get_scores(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]] | str],
        images: Sequence[Any] | None = None,
        max_length: int = 16384,
        hd_num: int = 24,
        apply_template: bool = True,
    ) -> list[float]:
        """How good the answers of conversations are: a number each, the higher the better.

        Args:
            conversations: each a list of {"role": "user" | "assistant" | "system", "content": text}; `<ImageHere>`
                marks each picture's place, and one picture may go unmarked.
            images: for each conversation what `chat` takes as `image`; None: no pictures at all.
            max_length: most tokens of a conversation. Nothing is cut: the last token is the one that is read.
            hd_num: most tiles of a conversation's only picture; several have 6 each.
            apply_template: False: a conversation is text as the model shall read it, template and last token included.

        Raises:
            ValueError: lists of different lengths, a conversation of another shape or too long, slots and pictures
                that differ in number; says which conversation.
        """
        rows = self._open_rows(conversations, images, max_length, hd_num, apply_template)
        return self._scores(rows)

    def compare(
        self,
        conversation1: Sequence[Mapping[str, Any]] | str,
        image1: Any,
        conversation2: Sequence[Mapping[str, Any]] | str,
        image2: Any,
        max_length: int = 16384,
        hd_num: int = 24,
        return_logits: bool = False,
        apply_template: bool = True,
    ) -> bool | tuple[bool, list[float]]:
        """Whether the first of two conversations has the higher score; with `return_logits` also both scores."""
        pair = [conversation1, conversation2], [image1, image2]
        scores = self.get_scores(*pair, max_length, hd_num, apply_template)
        is_better = scores[0] > scores[1]
        return (is_better, scores) if return_logits else is_better

    def rank(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]] | str],
        images: Sequence[Any] | None = None,
        max_length: int = 16384,
        hd_num: int = 24,
        return_logits: bool = False,
        apply_template: bool = True,
    ) -> list[int] | tuple[list[int], list[float]]:
        """Indices of conversations, the best first; with `return_logits` also the scores, in the order given."""
        scores = self.get_scores(conversations, images, max_length, hd_num, apply_template)
        order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
        return (order, scores) if return_logits else order

    def _open_rows(
        self, conversations: Any, images: Any, max_length: int, hd_num: int, apply_template: bool
    ) -> list[Conversation]:
        if isinstance(conversations, str | Mapping):
            raise ValueError("conversations must be a list with one entry a conversation; get_score takes a single one")
        conversations = list(conversations)
        images = [None] * len(conversations) if images is None else list(images)
        if len(images) != len(conversations):
            raise ValueError(
                f"{len(conversations)} conversations, but images for {len(images)}; pass one list of pictures each "
                f"([] where there is none)"
            )
        tokenizer, rows = self._tokenizer(None), []
        for index, (conversation, image) in enumerate(zip(conversations, images, strict=True)):
            tiles = hd_num if len(as_list(image)) < 2 else self.config.layout.many_hd_num
            try:
                text = reward_text(conversation, apply_template)
                rows.append(self._open(tokenizer, text, image, tiles, max_length, room=0))
            except (ValueError, FileNotFoundError, TypeError) as error:
                raise type(error)(f"conversation {index}: {error}") from error
        return rows

    @takes_turns
    def _scores(self, rows: list[Conversation]) -> list[float]:
        """Scores of opened conversations, in their order."""
        scores = [0.0] * len(rows)
        for batch in by_length(rows, BATCH_TOKENS):
            logits = self(**self._padded([rows[i] for i in batch]), use_cache=False).logits
            for index, score in zip(batch, logits.flatten().tolist(), strict=True):
                scores[index] = score
        return scores


register_checkpoint_conversion_mapping(
    InternLMXComposer2ForSequenceClassification.__name__,
    [WeightRenaming(released, inside) for released, inside in RENAMINGS],
    overwrite=True,
)

__all__ = ["InternLMXComposer2ForSequenceClassification"]

"""From a conversation to an answer: open, check, embed, generate, cut. The public methods stand on this.

Everything that can be wrong with a call is found by `_open`, before any compute. Task adapters are an argument of
`generate`, so nothing is left switched on. Generation starts from embeddings: a repetition penalty sees generated
tokens alone, as in the release.

Legend: B conversations, T prompt tokens, D decoder width, L image tokens of one picture.
"""

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation import LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers.utils import logging

from .build_mlp import device_of
from .cache_internlm_xcomposer2 import GrowingCache, crop, row_of, stack
from .fingerprint_internlm_xcomposer2 import Stamp, parts_of, rows_of, stamp_of
from .generation_internlm_xcomposer2 import PromptEmbeddings
from .media_internlm_xcomposer2 import load_media, source_identity
from .patches_internlm_xcomposer2 import Unseen, forwards_of
from .prompting_internlm_xcomposer2 import (
    CHAT_SYSTEM,
    SYSTEM_TEXTS,
    TURN_CLOSE,
    TURN_OPEN,
    Prompt,
    chat_prompt,
    check_text,
    check_text_length,
    cut_answer,
    place_images,
    short,
    tokenize_prompt,
    tokenize_with,
)
from .reuse_internlm_xcomposer2 import ReuseStore, digest
from .settings_internlm_xcomposer2 import check_settings
from .threads_internlm_xcomposer2 import ComputeLock, seeded, takes_turns

logger = logging.get_logger(__name__)

# Settings of a call that are not `generate`'s: of how videos are read, and of its random numbers.
OF_VIDEOS = ("num_frm", "start", "end", "fps")
OF_CONVERSATION = (*OF_VIDEOS, "seed", "bos_once")


class Conversation(NamedTuple):
    """A prompt with its pictures opened and counted, nothing computed yet."""

    prompt: Prompt
    pictures: list[Any]
    digests: list[bytes]
    hd_num: int

    @property
    def key(self) -> list[Hashable]:
        """What the rows of this prompt's cache depend on: token ids, and the picture's digest at its tokens."""
        key: list[Hashable] = list(self.prompt.input_ids)
        for (start, end), content in zip(self.prompt.image_spans, self.digests, strict=True):
            key[start:end] = [content] * (end - start)
        return key


class OpenedSource(NamedTuple):
    """A picture, or the call that reads it where nobody needs its pixels yet; its tokens; the digest of its content."""

    picture: Any
    length: int
    digest: bytes


def as_list(image: Any) -> list[Any]:
    """`image=` as a list of pictures: None is none, one needs no list around it, and a tensor (n, 3, H, W) is n."""
    if image is None:
        return []
    if isinstance(image, Tensor) and image.ndim == 4:
        return list(image)
    return list(image) if isinstance(image, list | tuple) else [image]


def as_rows(generated: Any) -> Tensor:
    """Generated ids, a row each, of what `generate` returns: a tensor, or an output that holds it."""
    return generated if isinstance(generated, Tensor) else generated.sequences


def up_to_stop(answer: list[int], stops: Sequence[int]) -> list[int]:
    """Generated ids before the first that stops: a batch goes on until its last row has stopped."""
    return answer[: next((at for at, token in enumerate(answer) if token in stops), len(answer))]


def with_penalty(settings: dict, spared: int | None = None) -> dict:
    """Settings whose repetition penalty is a logits processor.

    Args:
        spared: so many ids of the prompt are not penalised; None: a prompt of embeddings has no ids.
    """
    penalty = settings.get("repetition_penalty", 1.0)
    processors = LogitsProcessorList(settings.get("logits_processor") or [])
    if penalty != 1.0:
        processors.insert(0, RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=spared))
    return {**settings, "repetition_penalty": 1.0, "logits_processor": processors}


class ConversationMixin:
    """The steps of a call, and the embedding helpers that the release's clients use.

    Several threads may call one model: reading sources and prompts goes on side by side, computing takes turns.
    """

    tokenizer: Any
    reuse: ReuseStore
    compute_lock: ComputeLock

    def _apply(self, *args, **kwargs):
        """`.to(..)` and its like: what was kept in another dtype or elsewhere is of no use any more."""
        before = self.dtype, self.device
        super()._apply(*args, **kwargs)
        if (self.dtype, self.device) != before:
            self.reuse.clear()
        return self

    def _tokenizer(self, tokenizer):
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        if tokenizer is None:
            raise ValueError(
                "no tokenizer: pass tokenizer=, or set model.tokenizer = AutoTokenizer.from_pretrained(path, "
                "trust_remote_code=True) once"
            )
        if not callable(tokenizer):
            raise ValueError(
                f"tokenizer is {short(tokenizer)}; pass the checkpoint's, AutoTokenizer.from_pretrained(path), first, "
                f"then the query"
            )
        if isinstance(tokenizer, PreTrainedTokenizerBase):  # others say by being passed that they know
            self._check_vocabulary(tokenizer)
        return tokenizer

    def _check_vocabulary(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise a ValueError for another model's tokenizer: its ids would mean other words, and nothing would stop."""
        rows = self.config.text_config.vocab_size
        unknown = (None, tokenizer.unk_token_id)
        lacking = [token for token in (TURN_OPEN, TURN_CLOSE) if tokenizer.convert_tokens_to_ids(token) in unknown]
        if lacking:
            raise ValueError(f"the tokenizer has no {' and no '.join(lacking)}: it is another model's; use this one's")
        if tokenizer.convert_tokens_to_ids(TURN_OPEN) >= rows:
            raise ValueError(
                f"the tokenizer's {TURN_OPEN} has id {tokenizer.convert_tokens_to_ids(TURN_OPEN)}, but the model has "
                f"{rows} tokens: it is another model's; use this one's"
            )
        if tokenizer.bos_token_id != self.config.bos_token_id:
            raise ValueError(
                f"the tokenizer begins texts with id {tokenizer.bos_token_id}, the model with "
                f"{self.config.bos_token_id}: it is another model's; use this one's"
            )

    def _system(
        self, use_meta: bool, meta_instruction: str | None, released: str = CHAT_SYSTEM, always: bool = True
    ) -> str:
        """The system turn's text, "" for none. `released`: what None means; `always`: the kind may have it unasked."""
        by_default = SYSTEM_TEXTS[self.config.default_system] if always else ""
        if meta_instruction is None:
            return by_default or (released if use_meta else "")
        return meta_instruction if use_meta or by_default else ""

    def _open(
        self,
        tokenizer,
        text: str,
        image: Any,
        hd_num: int | None = None,
        max_length: int | None = None,
        room: int = 1,
        bos_once: bool = False,
        **settings,
    ) -> Conversation:
        """Open the pictures, lay out the prompt, and see that it fits `max_length` (default: the model's).

        Args:
            room: tokens of `max_length` that are kept free, for an answer.
            bos_once: one BOS in front and no more, whatever the chat of the kind has.
            settings: of a call; those of videos are read here, see `load_video`.
        """
        images = as_list(image)
        pieces = place_images(text, len(images))
        checked = check_settings(
            {"hd_num": self.config.layout.default_hd_num(len(images)) if hd_num is None else hd_num}
        )
        hd_num, limit = checked["hd_num"], self.config.context_length if max_length is None else max_length
        check_text_length(text, limit, tokenizer)
        video = {name: settings[name] for name in OF_VIDEOS if name in settings}
        sources = [self._open_source(source, text, hd_num, video) for source in images]
        pictures, lengths = [source.picture for source in sources], [source.length for source in sources]
        placeholders = [self.config.image_token_id] * len(pictures)
        prompt = tokenize_prompt(
            pieces,
            lengths,
            placeholders,
            tokenize_with(tokenizer),
            bos_on_each_piece=self.config.bos_on_each_piece and not bos_once,
            text_only_bos=1 if bos_once else self.config.text_only_bos,
        )
        if len(prompt.input_ids) > limit - room:
            raise ValueError(self._too_long(len(prompt.input_ids), sum(lengths), limit, pictures, hd_num, room))
        return Conversation(prompt, pictures, [source.digest for source in sources], hd_num)

    def _open_source(self, source: Any, text: str, hd_num: int, video: dict) -> "OpenedSource":
        """Read a picture or video, unless it is known and its embeddings are kept: then it stays as it is, unread."""
        tile, known = self.config.tile, self.reuse.sources
        read = partial(load_media, source, tile=tile, **video)
        identity = source_identity(source) if self.reuse.picture_bytes else None
        key = identity, hd_num, tile, self.config.layout, *(repr(item) for item in sorted(video.items()))
        found = known.find(key, text) if identity is not None else None
        if found is not None and self.reuse.holds_picture(found[1]):
            known.keep(key, text, found)
            return OpenedSource(read, *found)
        picture = read()
        (length,), content = self._image_lengths([picture], hd_num), digest(picture, hd_num, tile)
        if identity is not None:
            known.keep(key, text, (length, content))
        return OpenedSource(picture, length, content)

    def _picture(self, conversation: Conversation, index: int) -> Any:
        """One picture of a conversation, read now where `_open_source` left it."""
        picture = conversation.pictures[index]
        if not isinstance(picture, partial):
            return picture
        picture = picture()
        if digest(picture, conversation.hd_num, self.config.tile) != conversation.digests[index]:
            raise ValueError(f"picture {index + 1} has changed since this conversation began; begin a new one")
        return picture

    def _image_lengths(self, pictures: list[Any], hd_num: int) -> list[int]:
        layout = self.config.layout
        return [layout.tokens(*layout.grid(picture, hd_num)) for picture in pictures]

    def _too_long(self, length: int, of_images: int, limit: int, pictures: list[Any], hd_num: int, room: int) -> str:
        """What to do about a prompt of `length` tokens where `limit` less `room` fit."""
        message = f"the prompt has {length} tokens ({of_images} of them image tokens), but max_length is {limit}; "
        pictures = [picture() if isinstance(picture, partial) else picture for picture in pictures]
        grids = [self.config.layout.grid(picture, hd_num) for picture in pictures]
        most = max((rows * cols for rows, cols in grids), default=1)  # a greater hd_num changes nothing
        for fewer in range(min(hd_num - 1, most), 0, -1):
            if length - of_images + sum(self._image_lengths(pictures, fewer)) <= limit - room:
                return message + f"hd_num={fewer} would fit (hd_num is {hd_num} now)"
        return message + "shorten the text or the history" + (", or pass fewer images" if pictures else "")

    def _pixels(self, picture: Any, hd_num: int) -> Tensor:
        """An opened picture -> pixels (3, H, W)."""
        return self.config.layout.pixels(picture, hd_num, self.font)

    def _features(self, conversation: Conversation, seen: int, stamp: Stamp | None) -> list[Tensor | None]:
        """Each picture's embeddings (L, D), kept or newly computed; None where the cache has its rows already."""
        needed = [end > seen for _, end in conversation.prompt.image_spans]
        keep = any(needed) and self.reuse.picture_bytes > 0 and stamp is not None and not torch.is_grad_enabled()
        keys = [(stamp, content) for content in conversation.digests]
        found = [self.reuse.picture(key) if need and keep else None for key, need in zip(keys, needed, strict=True)]
        missing = [i for i, need in enumerate(needed) if need and found[i] is None]
        if missing:
            pictures = [self._picture(conversation, i) for i in missing]
            tiles, grids = self.config.layout.tiles(pictures, conversation.hd_num, self.font)
            tiles = tiles.to(device_of(self.model.vision_tower))
            features = self.get_image_features(tiles, grids, return_dict=True).pooler_output
            for i, feature in zip(missing, features, strict=True):
                found[i] = feature
                if keep:
                    self.reuse.keep_picture(keys[i], feature)
        return found

    def _embed(
        self, conversation: Conversation, seen: int = 0, stamp: Stamp | None = None
    ) -> tuple[PromptEmbeddings, Tensor]:
        """Embeddings of a conversation and its image mask (1, T), 1 at image tokens.

        Args:
            seen: positions that a cache holds: pictures that end before are not embedded.
            stamp: what kept pictures must have been embedded under; None: embed all anew.
        """
        embedding = self.get_input_embeddings()
        input_ids = torch.tensor([conversation.prompt.input_ids], device=device_of(embedding))
        embeds = PromptEmbeddings(embedding, input_ids)
        image_mask, slots = torch.zeros_like(input_ids), torch.zeros_like(input_ids, dtype=torch.bool)
        features = self._features(conversation, seen, stamp)
        for (start, end), feature in zip(conversation.prompt.image_spans, features, strict=True):
            image_mask[0, start:end] = 1
            slots[0, start:end] = feature is not None
        found = [feature for feature in features if feature is not None]
        if found:
            embeds.place(slots, found[0] if len(found) == 1 else torch.cat(found))
        return embeds, image_mask

    def _stamps(self, infer_mode: str | None) -> tuple[Stamp | None, Stamp | None]:
        """What kept pictures, and kept caches of a mode, depend on besides what was asked; frees what is outdated.

        Loads the mode's adapters, which count.

        Args:
            infer_mode: None: no cache is asked for, and the decoder need not be looked at.

        Returns:
            None in the place of what must not be kept, by the limits or because not all that counts can be seen.
        """
        if infer_mode is not None:
            self._need_task_adapters(infer_mode)
        if not self.reuse.enabled:
            return None, None
        device_type = device_of(self).type
        autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
        try:
            parts = parts_of(self.model)
            pictures = stamp_of(parts, ["vision"], (autocast, self.config.vision_config._attn_implementation))
            self.reuse.drop_outdated(pictures)
            if infer_mode is None or not self.reuse.prefix_bytes:
                return pictures, None
            about = infer_mode, self._merged_mode, self.config.text_config._attn_implementation
            code = frozenset(forwards_of([self]))
            names = ["decoder", *self.config.adapters_of(infer_mode)]
            prefixes = stamp_of(parts, names, (*pictures.circumstances, *about, code))
        except Unseen as error:
            logger.warning_once(f"nothing is kept between turns: {error} cannot be compared from one call to the next")
            return None, None
        # A merged adapter's weights come and go: they are another part, not the end of the plain ones.
        merged = tuple(((name, self._merged_mode), content) for name, content in prefixes.contents)
        prefixes = Stamp(prefixes.circumstances, pictures.contents + merged)
        self.reuse.drop_outdated(prefixes)
        return pictures, prefixes

    def _may_reuse(self, length: int) -> bool:
        """Whether rows of a prompt of `length` tokens are the same in every longer prompt.

        Beyond `max_position_embeddings` dynamic rope turns the whole prompt by its length.
        """
        rotary = self.model.language_model.rotary_emb
        return self.reuse.prefix_bytes > 0 and (rotary.factor is None or length <= rotary.max_position)

    def _settings(self, tokenizer, settings: dict, length: int) -> dict:
        """Settings as `generate` takes them after a prompt of `length` tokens: with the stops of a chat, and lengths
        counted from the prompt's end.

        The penalty is a processor, since that it spares the prompt is what the release does, and no cause to warn.
        """
        settings = {name: value for name, value in settings.items() if name not in OF_CONVERSATION}
        cache = settings.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            raise ValueError(
                f"past_key_values hold {cache.get_seq_length()} positions: a conversation begins in an empty cache, "
                f"and finds what it has computed before by itself"
            )
        stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(TURN_CLOSE)]
        stops += settings.pop("stop_token_ids", [])
        most, least = settings.pop("max_length", None), settings.pop("min_length", None)
        if most is not None or "max_new_tokens" not in settings:
            room = max(1, (self.config.context_length if most is None else most) - length)
            settings["max_new_tokens"] = min(room, settings.get("max_new_tokens", room))
        if least is not None:
            settings.setdefault("min_new_tokens", max(0, least - length))
        if "stop_strings" in settings:
            settings["tokenizer"] = tokenizer
        return {
            "eos_token_id": stops,
            "pad_token_id": tokenizer.pad_token_id,
            "use_cache": True,  # some releases' config says no, and every step would start over
            **settings,
        }

    def _chooses_cache(self, settings: dict) -> bool:
        """Whether the caller brings a cache or says which kind: then nothing of it is kept."""
        said = [settings.get(name) for name in ("past_key_values", "cache_implementation")]
        return any(value is not None for value in (*said, self.generation_config.cache_implementation))

    @takes_turns
    def _answer(self, tokenizer, conversation: Conversation, infer_mode: str, seed: int = -1, **kwargs) -> str:
        """Generate after one conversation and cut the answer; keeps its cache for the next turn."""
        settings = self._settings(tokenizer, kwargs, len(conversation.prompt.input_ids))
        if settings.get("prompt_lookup_num_tokens") or settings.get("assistant_model"):
            with seeded(seed):
                return self._answer_from_ids(tokenizer, conversation, infer_mode, settings)
        pictures, stamp = self._stamps(infer_mode)
        length = len(conversation.prompt.input_ids)
        own_cache = self._chooses_cache(settings)
        reusable = not own_cache and stamp is not None and self._may_reuse(length)
        cache = self._take(conversation, stamp) if reusable else None
        if not own_cache:
            cache = settings["past_key_values"] = cache or GrowingCache(self.config)
        embeds, image_mask = self._embed(conversation, cache.get_seq_length() if cache else 0, pictures)
        if cache is not None and self.share_prefill and length > self.embedded_whole:
            inputs_embeds = self._run_ahead(embeds, self._prompt_inputs(image_mask, infer_mode), cache)
        else:
            inputs_embeds = embeds.read()
        with seeded(seed):
            generated = self.generate(
                inputs_embeds=inputs_embeds,
                attention_mask=torch.ones_like(image_mask),
                mm_token_type_ids=image_mask,
                infer_mode=infer_mode,
                **with_penalty(settings),
            )
        generated = as_rows(generated)
        if reusable and cache.get_seq_length():
            self._keep(conversation, generated[0].tolist(), stamp, cache)
        return cut_answer(tokenizer.decode(generated[0], skip_special_tokens=True))

    @staticmethod
    def _prompt_inputs(image_mask: Tensor, infer_mode: str) -> dict:
        """What `_run_prompt` wants to know of a prompt without padding."""
        positions = torch.arange(image_mask.shape[1], device=image_mask.device)[None]
        return {"position_ids": positions, "mm_token_type_ids": image_mask, "infer_mode": infer_mode}

    def _know_rows(self, ids: Sequence[Hashable]) -> bool:
        """Look at the embeddings of these tokens; whether they are as they were for what is kept (else it is freed)."""
        return self.reuse.know_rows(rows_of(self.get_input_embeddings(), ids))

    def _take(self, conversation: Conversation, stamp: Stamp) -> GrowingCache | None:
        """A cache that this conversation may continue."""
        self._know_rows(conversation.prompt.input_ids)
        return self.reuse.take(conversation.key, stamp)

    def _keep(self, conversation: Conversation, answer: list[int], stamp: Stamp, cache: GrowingCache, row: int = 0):
        """Keep one row of a cache for the next turn: the prompt, and the answer where one row made it."""
        prompt = len(conversation.prompt.input_ids)
        batched = len(cache.layers[0].keys) > 1
        key = [*conversation.key, *answer]
        limit = self.model.language_model.rotary_emb.max_position
        end = len(key) if self._may_reuse(len(key)) else limit
        if batched:  # beams have traded places since the prompt, which they share
            cache = row_of(cache, row, 0, prompt)
        crop(cache, min(end, cache.get_seq_length()))
        if self._know_rows(answer):
            self.reuse.keep(key, stamp, cache)

    def _answer_from_ids(self, tokenizer, conversation: Conversation, infer_mode: str, settings: dict) -> str:
        """Generate from token ids, where drafts are looked up in the prompt; the penalty still spares the prompt."""
        prompt, hd_num = conversation.prompt, conversation.hd_num
        pictures = [self._picture(conversation, i) for i in range(len(conversation.pictures))]
        input_ids = torch.tensor([prompt.input_ids], device=device_of(self.get_input_embeddings()))
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        if pictures:
            tiles, inputs["image_grid_thw"] = self.config.layout.tiles(pictures, hd_num, self.font)
            inputs["pixel_values"] = tiles.to(device_of(self.model.vision_tower))
            types = inputs["mm_token_type_ids"] = torch.zeros_like(input_ids)
            for start, end in prompt.image_spans:
                types[0, start:end] = 1
        settings = with_penalty(settings, len(prompt.input_ids))
        generated = self.generate(**inputs, infer_mode=infer_mode, **settings)
        generated = as_rows(generated)
        return cut_answer(tokenizer.decode(generated[0, input_ids.shape[1] :], skip_special_tokens=True))

    @takes_turns
    def _answer_batch(
        self, tokenizer, conversations: list[Conversation], infer_mode: str, seed: int = -1, **kwargs
    ) -> list[str]:
        """Generate after several conversations at once.

        Each prompt runs by itself, continuing its own cache, so that neither padding nor a longer neighbour costs
        anything; their caches are then stacked, and the rows decode together.
        """
        lengths = [len(conversation.prompt.input_ids) for conversation in conversations]
        longest = max(lengths)
        starts = [longest - length for length in lengths]
        settings = with_penalty(self._settings(tokenizer, kwargs, longest))
        if self._chooses_cache(settings):
            with seeded(seed):
                generated = self.generate(**self._padded(conversations), infer_mode=infer_mode, **settings)
            return self._texts(tokenizer, generated, len(lengths))
        pictures, stamp = self._stamps(infer_mode)
        caches, last = [], []
        for conversation in conversations:
            length = len(conversation.prompt.input_ids)
            reusable = stamp is not None and self._may_reuse(length)
            cache = self._take(conversation, stamp) if reusable else None
            cache = cache or GrowingCache(self.config)
            embeds, image_mask = self._embed(conversation, cache.get_seq_length(), pictures)
            last.append(self._run_ahead(embeds, self._prompt_inputs(image_mask, infer_mode), cache))
            caches.append(cache)
        batch = stack(caches)
        caches.clear()
        embeds = torch.cat(last)
        mask = torch.arange(longest, device=embeds.device)[None] >= torch.tensor(starts, device=embeds.device)[:, None]
        with seeded(seed):
            generated = self.generate(
                inputs_embeds=embeds,
                attention_mask=mask.long(),
                past_key_values=batch,
                infer_mode=infer_mode,
                **settings,
            )
        stops = settings["eos_token_id"]
        copies = len(batch.layers[0].keys) // len(lengths)
        for i, (conversation, start) in enumerate(zip(conversations, starts, strict=True)):
            if stamp is not None and self._may_reuse(lengths[i]):
                row = row_of(batch, i * copies, start, batch.get_seq_length())
                answer = [] if copies > 1 else up_to_stop(as_rows(generated)[i].tolist(), stops)
                crop(row, lengths[i] + len(answer))
                self._keep(conversation, answer, stamp, row)
        return self._texts(tokenizer, generated, len(lengths))

    def _padded(self, conversations: list[Conversation]) -> dict[str, Tensor]:
        """Embeddings of several conversations as one batch (B, T, D) with its masks, filled up on the left."""
        rows = [self._embed(conversation) for conversation in conversations]
        longest = max(embeds.shape[1] for embeds, _ in rows)
        rooms = [longest - embeds.shape[1] for embeds, _ in rows]
        pad = torch.nn.functional.pad
        types = [types for _, types in rows]
        return {
            "inputs_embeds": torch.cat(
                [pad(e.read(), (0, 0, room, 0)) for (e, _), room in zip(rows, rooms, strict=True)]
            ),
            "attention_mask": torch.cat(
                [pad(torch.ones_like(row), (room, 0)) for row, room in zip(types, rooms, strict=True)]
            ),
            "mm_token_type_ids": torch.cat([pad(row, (room, 0)) for row, room in zip(types, rooms, strict=True)]),
        }

    @staticmethod
    def _texts(tokenizer, generated: Any, conversations: int) -> list[str]:
        """The first answer to each conversation, cut."""
        ids = as_rows(generated)
        rows = ids[:: len(ids) // conversations]
        return [cut_answer(text) for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]

    # Embedding helpers of the release's clients.

    def encode_text(self, text: str, add_special_tokens: bool = False) -> Tensor:
        """Text -> token embeddings (1, T, D), with `model.tokenizer`.

        Raises:
            ValueError: no text, or one of more tokens than the model reads.
        """
        check_text("text", text)
        tokenizer = self._tokenizer(None)
        check_text_length(text, self.config.context_length, tokenizer)
        tokens = tokenizer(text, return_tensors="pt", add_special_tokens=add_special_tokens).input_ids
        embedding = self.get_input_embeddings()
        return embedding(tokens.to(device_of(embedding)))

    def encode_img(self, image: Any, hd_num: int | None = None) -> Tensor | None:
        """One picture or video (anything `chat` takes; None stays None) -> embeddings (1, L, D).

        A pixel tensor (n, 3, H, W) gives (n, L, D).

        Args:
            hd_num: most tiles; None takes `model.hd_num`.
        """
        if image is None:
            return None
        hd_num = check_settings({"hd_num": self.hd_num if hd_num is None else hd_num})["hd_num"]
        images = as_list(image) if isinstance(image, Tensor) else [image]
        pixels = [self._pixels(load_media(one), hd_num) for one in images]
        return self.img2emb(torch.stack(pixels))[0]

    def img2emb(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels (n, 3, H, W) -> embeddings (n, L, D), attention mask of ones (n, L), labels of -100 (n, L)."""
        merged, _ = self.vit(list(image.split(1)), self.plora_glb_GN, self.plora_sub_GN)
        embeds = self.vision_proj(merged.view(len(image), -1, merged.shape[-1]))
        ones = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        return embeds, ones, -100 * ones

    def interleav_wrap_chat(
        self,
        query: str,
        image: Any,
        history: Sequence[tuple[str, str]] = (),
        meta_instruction: str = "",
        max_length: int = 16384,
        hd_num: int | None = None,
    ) -> tuple[dict[str, Tensor], Tensor, int]:
        """A conversation's embeddings as the release's clients take them (the spelling is the public one).

        Returns:
            {"inputs_embeds": (1, T, D)}, the image mask (1, T) bool, and T.
        """
        tokenizer = self._tokenizer(None)
        text = chat_prompt(query, history, meta_instruction)
        conversation = self._open(tokenizer, text, image, hd_num, max_length)
        stamp = None if torch.is_grad_enabled() else self._stamps(None)[0]
        embeds, image_mask = self._embed(conversation, stamp=stamp)
        inputs_embeds = embeds.read()
        return {"inputs_embeds": inputs_embeds}, image_mask.bool(), inputs_embeds.shape[1]

"""The public methods: thin steps over `generate`.

Each call goes the same way: check the arguments, open the pictures, lay out the prompt and check its length (all before
any compute), embed, generate, cut the answer. Task adapters are an argument of `generate`, so nothing is left switched on.

Legend: T prompt tokens, D decoder width, L image tokens of one picture.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import logging

from .ixc_utils import image_tokens, load_media, media_grid, stack_tiles, to_pixels
from .prompting_internlm_xcomposer2 import (
    CHAT_SYSTEM,
    IMAGE_MARK,
    TURN_CLOSE,
    WRITE_SYSTEM,
    Prompt,
    chat_prompt,
    cut_answer,
    place_images,
    tokenize_prompt,
    tokenize_with,
)

logger = logging.get_logger(__name__)

ONE_IMAGE_HD_NUM = 24
MANY_IMAGES_HD_NUM = 6
PUBLIC_FILE = "auto"  # `output_path` of the webpage methods: the task's own file name, in the working directory

RESUME_QUERY = " Generate a personal page using the content in the resume:"
SCRIPT_QUERY = " Generate JavaScript events for the html code:"
SCREENSHOT_QUERY = " Generate the HTML code of this web image with Tailwind CSS."

_SCRIPT = re.compile(r"<script\b[^>]*>.*?</script\s*>", re.DOTALL | re.IGNORECASE)
_PAGE_END = re.compile(r"</body\s*>|</html\s*>", re.IGNORECASE)
_UNSPLASH = re.compile(r"""https://source\.unsplash\.com/random/(\d+)x(\d+)/\?[^'"]+""")


class Conversation(NamedTuple):
    """A prompt with its pictures opened and counted, nothing computed yet."""

    prompt: Prompt
    pictures: list[Any]
    hd_num: int


def as_list(image: Any) -> list[Any]:
    """`image=` as a list of pictures: None is none, and one picture needs no list around it."""
    if image is None:
        return []
    return list(image) if isinstance(image, list | tuple) else [image]


def page_path(task: str, output_path: str | os.PathLike | None) -> Path | None:
    """Where a webpage goes: None for nowhere.

    Raises:
        ValueError: a task that is no plain file name.
        FileNotFoundError: the folder does not exist.
    """
    if output_path is None:
        return None
    if output_path == PUBLIC_FILE:
        name = task.replace(" ", "_") + ".html"
        if not task.strip() or Path(name).name != name or "\\" in name or "\0" in name:
            raise ValueError(f"task {task!r} does not make a file name; use plain words, or say output_path=")
        output_path = name
    path = Path(output_path)
    if path.is_dir():
        raise ValueError(f"output_path {str(path)!r} is a folder; name a file in it")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"output_path {str(path)!r}: the folder {str(path.absolute().parent)!r} does not exist")
    return path


def write_page(html: str, path: Path | None) -> str:
    """Write the page whole or not at all, in UTF-8; returns it."""
    if path is not None:
        draft = path.with_name(path.name + ".part")
        draft.write_text(html, encoding="utf-8")
        draft.replace(path)
    return html


def real_pictures(html: str) -> str:
    """The picture service that the model learned to name is gone; its successor takes the same sizes."""
    return _UNSPLASH.sub(r"https://picsum.photos/\1/\2", html)


def add_scripts(html: str, answer: str) -> str:
    """Put the `<script>` elements of a second answer at the end of the page's body."""
    scripts = "\n".join(_SCRIPT.findall(answer))
    if not scripts:
        logger.warning("The second pass wrote no whole <script>: the page stays as the first pass wrote it.")
        return html
    ends = list(_PAGE_END.finditer(html))
    # Before the first of the closing tags that end the page: `</body></html>` or `</html>` alone.
    at = ends[0].start() if ends else len(html)
    return f"{html[:at]}\n{scripts}\n{html[at:]}"


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Sample from `seed` inside, and leave the caller's random state alone. -1: no seed."""
    if seed == -1:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


class ChatMixin:
    """`chat`, `write_artical` and the webpage methods of the release, and the embedding helpers its clients use."""

    @torch.no_grad()
    def chat(
        self,
        tokenizer=None,
        query: str = "",
        image: Any = None,
        hd_num: int | None = None,
        history: Sequence[tuple[str, str]] = (),
        streamer=None,
        max_new_tokens: int = 1024,
        do_sample: bool = True,
        num_beams: int = 1,
        temperature: float = 1.0,
        top_p: float = 0.8,
        repetition_penalty: float = 1.005,
        infer_mode: str = "base",
        use_meta: bool = False,
        meta_instruction: str = CHAT_SYSTEM,
        **kwargs,
    ) -> tuple[str, list[tuple[str, str]]]:
        """Answer `query`, about pictures and videos if there are any.

        Args:
            tokenizer: the checkpoint's tokenizer; None takes `model.tokenizer`.
            query: text; `<ImageHere>` marks each picture's place (one picture may go unmarked).
            image: pictures and videos of the whole conversation, history first: one, or a list. Each is a path, a URL,
                bytes, a PIL image, an array, a pixel tensor, or a list of frames; see `ixc_utils.load_media`.
            hd_num: most tiles a picture may have; None: 24 for one picture, 6 each for more.
            history: (query, answer) of the turns so far, as the last call returned it.
            infer_mode: task adapters that are on during this call: "base", "web", "write", or an adapter's name.
            use_meta: put `meta_instruction` in front as the system turn.
            streamer, kwargs and the rest: as in transformers' `generate`.

        Returns:
            The answer, and history with this turn at its end.

        Raises:
            ValueError: slots and pictures differ in number, a prompt longer than the model's, a history of another
                shape, an unknown adapter, a picture that cannot be read. All before any compute.
        """
        history = list(history or ())
        tokenizer = self._tokenizer(tokenizer)
        self.config.adapters_of(infer_mode)
        system = meta_instruction if use_meta else ""
        conversation = self._open(tokenizer, chat_prompt(query, history, system), image, hd_num)
        answer = self._answer(
            tokenizer,
            conversation,
            infer_mode,
            streamer=streamer,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            num_beams=num_beams,
            temperature=temperature,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            **kwargs,
        )
        return answer, [*history, (query, answer)]

    @torch.no_grad()
    def write_artical(
        self,
        inst: str,
        image: Any = None,
        hd_num: int | None = None,
        history: Sequence[tuple[str, str]] = (),
        streamer=None,
        max_new_tokens: int | None = None,
        do_sample: bool = True,
        num_beams: int = 1,
        temperature: float = 1.0,
        top_p: float = 0.8,
        top_k: int = 40,
        repetition_penalty: float = 1.005,
        max_length: int = 8192,
        seed: int = -1,
        use_meta: bool = False,
        meta_instruction: str = WRITE_SYSTEM,
        tokenizer=None,
        **kwargs,
    ) -> str:
        """Write an article by the instruction `inst`, with the write adapter on. (The spelling is the public one.)

        Args:
            max_length: most tokens of prompt and article together.
            max_new_tokens: most tokens of the article; None: what `max_length` leaves.
            seed: of the sampling; -1: none.
            Others: see `chat`.
        """
        tokenizer = self._tokenizer(tokenizer)
        self.config.adapters_of("write")
        system = meta_instruction if use_meta else ""
        conversation = self._open(tokenizer, chat_prompt(inst, history, system), image, hd_num, max_length)
        room = max_length - len(conversation.prompt.input_ids)
        with seeded(seed):
            return self._answer(
                tokenizer,
                conversation,
                "write",
                streamer=streamer,
                max_new_tokens=room if max_new_tokens is None else min(max_new_tokens, room),
                do_sample=do_sample,
                num_beams=num_beams,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                repetition_penalty=repetition_penalty,
                **kwargs,
            )

    @torch.no_grad()
    def write_webpage(
        self,
        inst: str,
        image: Any = None,
        max_new_tokens: int = 4800,
        do_sample: bool = True,
        num_beams: int = 2,
        temperature: float = 1.0,
        repetition_penalty: float = 3.0,
        seed: int = -1,
        use_meta: bool = False,
        task: str = "Instruction-aware Webpage Generation",
        output_path: str | os.PathLike | None = PUBLIC_FILE,
        **kwargs,
    ) -> str:
        """Write a webpage by the instruction `inst`, with the web adapter on; returns its HTML.

        Args:
            task: names the file, `<task with spaces as _>.html` in the working directory.
            output_path: another file for the page; None writes none.
            kwargs: `tokenizer`, `hd_num`, `history`, `meta_instruction` as in `chat`; the rest as in `generate`.
            Others: see `write_artical`.
        """
        path = page_path(task, output_path)
        settings = dict(
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            num_beams=num_beams,
            temperature=temperature,
            repetition_penalty=repetition_penalty,
            seed=seed,
            use_meta=use_meta,
        )
        return write_page(real_pictures(self._web(inst, image, **settings, **kwargs)), path)

    @torch.no_grad()
    def resume_2_webpage(
        self,
        inst: str | os.PathLike,
        image: Any = None,
        max_new_tokens: int = 4800,
        do_sample: bool = True,
        num_beams: int = 2,
        temperature: float = 1.0,
        repetition_penalty: float = 3.0,
        seed: int = -1,
        use_meta: bool = False,
        task: str = "Resume-to-Personal Page",
        output_path: str | os.PathLike | None = PUBLIC_FILE,
        **kwargs,
    ) -> str:
        """Make a personal page of the resume in the Markdown file `inst`; a second pass adds its JavaScript.

        Args:
            Others: see `write_webpage`.

        Raises:
            FileNotFoundError: no such resume. ValueError: it is empty or no UTF-8 text.
        """
        path = page_path(task, output_path)
        resume = Path(inst)
        if not resume.is_file():
            raise FileNotFoundError(f"resume {str(inst)!r} is no file; pass the path of a Markdown file")
        try:
            text = resume.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"resume {str(inst)!r} is no UTF-8 text ({error}); save it as Markdown in UTF-8") from error
        if not text.strip():
            raise ValueError(f"resume {str(inst)!r} is empty")
        settings = dict(
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            num_beams=num_beams,
            temperature=temperature,
            repetition_penalty=repetition_penalty,
            seed=seed,
            use_meta=use_meta,
        )
        html = self._web(RESUME_QUERY + text, image, **settings, **kwargs)
        script = self._web(SCRIPT_QUERY + html, image, **settings, **kwargs)
        return write_page(real_pictures(add_scripts(html, script)), path)

    @torch.no_grad()
    def screen_2_webpage(
        self,
        inst: str = "",
        image: Any = None,
        max_new_tokens: int = 4800,
        do_sample: bool = True,
        num_beams: int = 2,
        temperature: float = 1.0,
        repetition_penalty: float = 3.0,
        seed: int = -1,
        use_meta: bool = False,
        task: str = "Screenshot-to-Webpage",
        output_path: str | os.PathLike | None = PUBLIC_FILE,
        **kwargs,
    ) -> str:
        """Write the HTML of the webpage that the picture `image` shows.

        Args:
            inst: the instruction; empty takes the one the model was trained with.
            Others: see `write_webpage`.

        Raises:
            ValueError: no picture.
        """
        if not as_list(image):
            raise ValueError("screen_2_webpage needs the picture of a webpage: pass image=[path]")
        return self.write_webpage(
            inst or SCREENSHOT_QUERY,
            image,
            max_new_tokens,
            do_sample,
            num_beams,
            temperature,
            repetition_penalty,
            seed,
            use_meta,
            task,
            output_path,
            **kwargs,
        )

    def _web(self, query: str, image: Any, seed: int, use_meta: bool, tokenizer=None, **kwargs) -> str:
        """One pass with the web adapter."""
        with seeded(seed):
            return self.chat(tokenizer, query, image, use_meta=use_meta, infer_mode="web", **kwargs)[0]

    # The steps of a call.

    def _tokenizer(self, tokenizer):
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        if tokenizer is None:
            raise ValueError(
                "no tokenizer: pass tokenizer=, or set model.tokenizer = AutoTokenizer.from_pretrained(path, "
                "trust_remote_code=True) once"
            )
        return tokenizer

    def _open(
        self, tokenizer, text: str, image: Any, hd_num: int | None, max_length: int | None = None
    ) -> Conversation:
        """Open the pictures, lay out the prompt, and see that it fits `max_length` (default: the model's)."""
        images = as_list(image)
        pieces = place_images(text, len(images))
        if hd_num is None:
            hd_num = ONE_IMAGE_HD_NUM if len(images) < 2 else MANY_IMAGES_HD_NUM
        pictures = [load_media(source) for source in images]
        lengths = self._image_lengths(pictures, hd_num)
        placeholders = [self.config.image_token_id] * len(pictures)
        prompt = tokenize_prompt(pieces, lengths, placeholders, tokenize_with(tokenizer))
        limit = max_length or self.config.context_length
        if len(prompt.input_ids) >= limit:
            raise ValueError(self._too_long(len(prompt.input_ids), sum(lengths), limit, pictures, hd_num))
        return Conversation(prompt, pictures, hd_num)

    def _image_lengths(self, pictures: list[Any], hd_num: int) -> list[int]:
        grids = [media_grid(picture, hd_num, self.config.tile) for picture in pictures]
        return [image_tokens(rows, cols, self.config.tokens_per_side) for rows, cols in grids]

    def _too_long(self, length: int, of_images: int, limit: int, pictures: list[Any], hd_num: int) -> str:
        """What to do about a prompt of `length` tokens where fewer than `limit` fit."""
        message = f"the prompt has {length} tokens ({of_images} of them image tokens), but max_length is {limit}; "
        for fewer in range(hd_num - 1, 0, -1):
            if length - of_images + sum(self._image_lengths(pictures, fewer)) < limit:
                return message + f"hd_num={fewer} would fit (hd_num is {hd_num} now)"
        return message + "shorten the text or the history" + (", or pass fewer images" if pictures else "")

    def _answer(self, tokenizer, conversation: Conversation, infer_mode: str, do_sample: bool, **kwargs) -> str:
        """Embed the conversation, generate, and cut the answer.

        Generation starts from embeddings: a repetition penalty sees generated tokens alone, as in the release.
        """
        if not do_sample:  # transformers warns about sampling settings that have no effect
            for name in ("temperature", "top_p", "top_k"):
                kwargs.pop(name, None)
        kwargs.setdefault("eos_token_id", [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(TURN_CLOSE)])
        kwargs.setdefault("pad_token_id", tokenizer.pad_token_id)
        kwargs.setdefault("use_cache", True)  # some releases' config says no, and every step would start over
        inputs_embeds, image_mask = self._embed(conversation)
        generated = self.generate(
            inputs_embeds=inputs_embeds,
            attention_mask=torch.ones_like(image_mask),
            mm_token_type_ids=image_mask,
            infer_mode=infer_mode,
            do_sample=do_sample,
            **kwargs,
        )
        return cut_answer(tokenizer.decode(generated[0], skip_special_tokens=True))

    def _embed(self, conversation: Conversation) -> tuple[Tensor, Tensor]:
        """Embeddings of a conversation (1, T, D) and its image mask (1, T), 1 at image tokens."""
        prompt, pictures, hd_num = conversation
        embedding = self.get_input_embeddings()
        input_ids = torch.tensor([prompt.input_ids], device=embedding.weight.device)
        inputs_embeds = embedding(input_ids)
        image_mask = torch.zeros_like(input_ids)
        if pictures:
            pixels = [to_pixels(picture, hd_num, self.config.tile, self.font) for picture in pictures]
            tiles, grids = stack_tiles(pixels, self.config.tile)
            features = self.get_image_features(tiles.to(self.device), grids, return_dict=True).pooler_output
            for (start, end), feature in zip(prompt.image_spans, features, strict=True):
                inputs_embeds[0, start:end] = feature.to(inputs_embeds)
                image_mask[0, start:end] = 1
        return inputs_embeds, image_mask

    # Embedding helpers of the release's clients.

    def encode_text(self, text: str, add_special_tokens: bool = False) -> Tensor:
        """Text -> token embeddings (1, T, D), with `model.tokenizer`."""
        tokens = self._tokenizer(None)(text, return_tensors="pt", add_special_tokens=add_special_tokens).input_ids
        embedding = self.get_input_embeddings()
        return embedding(tokens.to(embedding.weight.device))

    def encode_img(self, image: Any, hd_num: int | None = None) -> Tensor | None:
        """One picture or video (anything `chat` takes; None stays None) -> embeddings (1, L, D)."""
        if image is None:
            return None
        pixels = to_pixels(load_media(image), hd_num or self.hd_num, self.config.tile, self.font)
        return self.img2emb(pixels[None])[0]

    def img2emb(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels (1, 3, H, W) -> embeddings (1, L, D), attention mask of ones (1, L), labels of -100 (1, L)."""
        merged, _ = self.vit([image], self.plora_glb_GN, self.plora_sub_GN)
        embeds = self.vision_proj(merged)
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
        inputs_embeds, image_mask = self._embed(self._open(tokenizer, text, image, hd_num, max_length))
        return {"inputs_embeds": inputs_embeds}, image_mask.bool(), inputs_embeds.shape[1]

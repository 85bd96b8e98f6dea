"""The processor against `chat`: the same ids, places, pixels and answers; batches, loading, and what is refused."""

import base64
import importlib
import io
import os
import sys

import numpy as np
import pytest
import torch
from conftest import CLOSE, GOLDEN, MARK, OPEN, REPO, golden_prompt, read_golden
from PIL import Image, ImageFont
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # hidden at the top without torchvision
from transformers.models.auto.video_processing_auto import AutoVideoProcessor  # likewise

from xcomposer.checkpoints import tiny

WIDE, TALL, FLAT, SMALL = (
    str(GOLDEN / "images" / f"small_{size}.png") for size in ("150x100", "90x210", "300x60", "56x56")
)
CLIP, UPRIGHT_CLIP = (
    str(GOLDEN / "videos" / name) for name in ("clip_90f_30fps_320x240.mp4", "tall_75f_25fps_160x288.mp4")
)
IMAGE, VIDEO = "[UNUSED_TOKEN_140]", "[UNUSED_TOKEN_139]"

# query, history, pictures, hd_num, system text wanted: one of each kind of conversation.
CONVERSATIONS = {
    "text": ("What is paper?", [], [], None, False),
    "unmarked": ("Describe this image in detail.", [], [WIDE], None, False),
    "inside": (f"What is {MARK} about? 请描述。", [], [TALL], None, True),
    "hd_num_1": ("Describe it", [], [FLAT], 1, False),
    "hd_num_9": (f"{MARK}", [], [TALL], 9, False),
    "several": (f"Image1 {MARK}; Image2 {MARK}; Image3 {MARK}; compare", [], [WIDE, SMALL, FLAT], None, True),
    "history": (f"And {MARK}?", [(f"{MARK}{MARK} compare", "They differ.")], [WIDE, SMALL, TALL], None, False),
    "history_text": ("Why?", [("What is it?", "A picture"), ("早上好", "你好")], [], None, True),
    "space": ("  two  spaces \n\n and 😀 ", [], [WIDE], None, False),
}
# The rows of a batch: text, pictures, videos.
ROWS = [
    ("What is paper?", [], []),
    (f"Describe {MARK}", [WIDE], []),
    (f"{MARK}, {MARK} and {MARK}: compare", [TALL, FLAT, SMALL], []),
    (f"{VIDEO} What happens?", [], [CLIP]),
    (f"{VIDEO} or {MARK}", [TALL], [UPRIGHT_CLIP]),
]


def header(query):
    return f"{OPEN}user\n{query}{CLOSE}\n{OPEN}assistant\n"


def messages(query, history=(), pictures=()):
    """A conversation as chat messages; each mark becomes an item that carries the next picture."""
    left = iter(pictures)

    def content(text):
        if MARK not in text:
            return text
        first, *rest = text.split(MARK)
        items = [{"type": "text", "text": first}]
        for piece in rest:
            items += [{"type": "image", "image": next(left)}, {"type": "text", "text": piece}]
        return items

    turns = []
    for asked, said in history:
        turns += [{"role": "user", "content": content(asked)}, {"role": "assistant", "content": said}]
    return [*turns, {"role": "user", "content": content(query)}]


@pytest.fixture(scope="module")
def processor(tiny_checkpoint):
    return AutoProcessor.from_pretrained(tiny_checkpoint, trust_remote_code=True)


@pytest.fixture(scope="module")
def model(tiny_checkpoint, processor):
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint, trust_remote_code=True).eval()
    model.tokenizer = processor.tokenizer
    return model


@pytest.fixture(scope="module")
def module(processor):
    """Sibling modules of the loaded code, by name."""
    package = type(processor).__module__.rpartition(".")[0]
    return lambda name: importlib.import_module(f"{package}.{name}")


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Processor of a tiny checkpoint with the released vocabulary; skips without it."""
    vocabulary = os.environ.get("IXC_TOKENIZER_MODEL")
    if not vocabulary:
        pytest.skip("IXC_TOKENIZER_MODEL does not name the released tokenizer.model")
    folder = tiny.write_checkpoint(tmp_path_factory.mktemp("vocabulary") / "ixc", tokenizer_model=vocabulary)
    return AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def embedded(model, inputs):
    """What the decoder gets: embeddings with the pictures' in their places."""
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    for kind, pixels, grids in (
        (1, "pixel_values", "image_grid_thw"),
        (2, "pixel_values_videos", "video_grid_thw"),
    ):
        if pixels in inputs:
            features = model.get_image_features(inputs[pixels], inputs[grids], return_dict=True).pooler_output
            embeds[inputs["mm_token_type_ids"] == kind] = torch.cat(list(features))
    return embeds


def generate(model, inputs, **kwargs):
    out = model.generate(**inputs, max_new_tokens=10, do_sample=False, use_cache=True, **kwargs)
    return out[:, inputs["input_ids"].shape[1] :]


# ------------------------------------------------------------------------------------------- equal to chat


@pytest.mark.parametrize("name", CONVERSATIONS)
@torch.no_grad()
def test_inputs_equal_those_of_chat(name, processor, model, module):
    query, history, pictures, hd_num, use_meta = CONVERSATIONS[name]
    prompting = module("prompting_internlm_xcomposer2")
    system = prompting.CHAT_SYSTEM if use_meta else ""
    chat, mask, length = model.interleav_wrap_chat(query, pictures, history, system, hd_num=hd_num)
    text = prompting.chat_prompt(query, history, system)
    inputs = processor(text=text, images=pictures or None, hd_num=hd_num, return_tensors="pt")
    assert inputs["input_ids"].shape == (1, length)
    assert torch.equal(inputs["mm_token_type_ids"].bool(), mask)
    assert torch.equal(embedded(model, inputs), chat["inputs_embeds"])
    if pictures:
        utils, most = module("ixc_utils"), hd_num or (24 if len(pictures) == 1 else 6)
        pixels = [utils.to_pixels(utils.load_media(picture), most, 56) for picture in pictures]
        assert torch.equal(inputs["pixel_values"], utils.stack_tiles(pixels, 56)[0])


@pytest.mark.parametrize("name", [name for name in CONVERSATIONS if name not in ("unmarked", "hd_num_1", "space")])
def test_chat_template_writes_the_same_prompt(name, processor, module):
    query, history, pictures, hd_num, use_meta = CONVERSATIONS[name]
    prompting = module("prompting_internlm_xcomposer2")
    chat, options = messages(query, history, pictures), {"hd_num": hd_num, "return_tensors": "pt"}
    text = prompting.chat_prompt(query, history, prompting.CHAT_SYSTEM if use_meta else "")
    written = processor.apply_chat_template(chat, add_generation_prompt=True, use_meta=use_meta)
    assert written == "<s>" + text.replace(MARK, IMAGE)
    whole = processor.apply_chat_template(
        chat, add_generation_prompt=True, use_meta=use_meta, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"hd_num": hd_num},
    )  # fmt: skip
    for prompt in (text, written):
        inputs = processor(text=prompt, images=pictures or None, **options)
        assert inputs.keys() == whole.keys()
        assert all(torch.equal(inputs[key], whole[key]) for key in inputs)


@pytest.mark.parametrize("case", [case for case in read_golden("chat_cases.json")], ids=lambda case: case["name"])
def test_ids_and_places_equal_the_recorded_ones(case, released):
    pictures = [str(GOLDEN / path) for path in case["images"]]
    inputs = released(text=golden_prompt(case), images=pictures or None, hd_num=case["kwargs"].get("hd_num"))
    (ids,), (kinds,) = inputs["input_ids"], inputs["mm_token_type_ids"]
    assert len(ids) == case["prompt_tokens"]
    expected, spans = [], [*case["image_spans"], None]
    for piece, span in zip(case["piece_ids"], spans, strict=True):
        expected += piece + ([released.image_token_id] * (span[1] - span[0]) if span else [])
    assert ids == expected
    assert [index for index, kind in enumerate(kinds) if kind] == [i for s in case["image_spans"] for i in range(*s)]


@torch.no_grad()
def test_batch_equals_single_runs_and_chat(processor, model):
    texts = [header(query) for query, _, _ in ROWS]
    images, videos = [row[1] for row in ROWS], [row[2] for row in ROWS]
    batch = processor(text=texts, images=images, videos=videos, return_tensors="pt")
    assert (batch["attention_mask"][:, -1] == 1).all()  # padded left
    assert sorted(set(batch["mm_token_type_ids"].flatten().tolist())) == [0, 1, 2]
    together, beams = generate(model, batch), generate(model, batch, num_beams=2)
    for index, (query, pictures, clips) in enumerate(ROWS):
        single = processor(text=texts[index], images=pictures or None, videos=clips or None, return_tensors="pt")
        (alone,), (beam,) = generate(model, single), generate(model, single, num_beams=2)
        assert together[index, : len(alone)].tolist() == alone.tolist()
        assert beams[index, : len(beam)].tolist() == beam.tolist()
        if not clips:
            answer, _ = model.chat(None, query, pictures, do_sample=False, max_new_tokens=10, repetition_penalty=1.0)
            assert processor.decode(alone, skip_special_tokens=True) == answer


@torch.no_grad()
def test_videos_equal_those_of_chat(processor, model):
    for query, pictures, clips in ROWS[3:]:
        chat, mask, _ = model.interleav_wrap_chat(query.replace(VIDEO, MARK), clips + pictures)
        inputs = processor(text=header(query), images=pictures or None, videos=clips, return_tensors="pt")
        assert torch.equal(inputs["mm_token_type_ids"].bool(), mask)
        assert torch.equal(embedded(model, inputs), chat["inputs_embeds"])


@torch.no_grad()
def test_loss_from_labels(processor, model):
    texts = [header(query) + f"A picture{CLOSE}\n" for query, _, _ in ROWS]
    inputs = processor(
        text=texts, images=[row[1] for row in ROWS], videos=[row[2] for row in ROWS], return_tensors="pt"
    )
    hidden = (inputs["attention_mask"] == 0) | (inputs["mm_token_type_ids"] > 0)
    labels = inputs["input_ids"].masked_fill(hidden, -100)
    out = model(**inputs, labels=labels)
    expected = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize("auto", [AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM])
@torch.no_grad()
def test_auto_classes_generate(auto, tiny_checkpoint, processor, model):
    inputs = processor(text=header(f"Compare {MARK} and {MARK}"), images=[WIDE, TALL], return_tensors="pt")
    other = auto.from_pretrained(tiny_checkpoint, trust_remote_code=True).eval()
    assert torch.equal(generate(other, inputs), generate(model, inputs))


# ------------------------------------------------------------------------------------------- sources and layouts


def test_a_picture_may_come_in_every_form(processor):
    image, data = Image.open(WIDE), open(WIDE, "rb").read()
    code = base64.b64encode(data).decode()
    forms = [WIDE, image, np.asarray(image), data, f"data:image/png;base64,{code}", code, [image], [[image]], [WIDE]]
    first, *others = (processor(text=f"see {MARK}", images=form, return_tensors="pt") for form in forms)
    for inputs in others:
        assert torch.equal(inputs["pixel_values"], first["pixel_values"])
        assert torch.equal(inputs["input_ids"], first["input_ids"])


def test_flat_pictures_go_to_the_texts_with_places(processor):
    texts, flat = [f"{MARK}{MARK} two", "none", f"{MARK} one"], [WIDE, TALL, SMALL]
    by_place = processor(text=texts, images=flat, return_tensors="pt")
    by_row = processor(text=texts, images=[flat[:2], [], flat[2:]], return_tensors="pt")
    assert all(torch.equal(by_place[key], by_row[key]) for key in by_row)


def test_tiles_depend_on_the_number_of_pictures_as_in_chat(processor):
    grid = lambda *args, **kwargs: processor(*args, return_tensors="pt", **kwargs)["image_grid_thw"].prod(-1).tolist()  # noqa: E731
    big = Image.new("RGB", (500, 400))
    assert grid(text=f"{MARK}", images=big) == [20]
    assert grid(text=f"{MARK}{MARK}", images=[big, big]) == [4, 4]
    assert grid(text=[f"{MARK}", f"{MARK}{MARK}"], images=[[big], [big, big]]) == [20, 4, 4]
    assert grid(text=f"{MARK}{VIDEO}", images=big, videos=[[Image.new("RGB", (90, 60))]]) == [4]
    assert grid(text=f"{MARK}{MARK}", images=[big, big], hd_num=12) == [9, 9]
    assert grid(text=f"{MARK}", images=big, images_kwargs={"hd_num": 5}) == [4]


def test_videos_are_stitched_and_come_in_every_form(processor, module):
    utils = module("ixc_utils")
    frames = utils.load_video(CLIP)
    tiles, grids = utils.stack_tiles([utils.to_pixels(frames, tile=56)], 56)
    forms = [
        CLIP,
        [CLIP],
        [[CLIP]],
        frames,
        [frames],
        np.stack([np.asarray(frame) for frame in frames]),
        open(CLIP, "rb").read(),
    ]
    for form in forms:
        inputs = processor(text=f"{VIDEO} what?", videos=form, return_tensors="pt")
        assert torch.equal(inputs["pixel_values_videos"], tiles)
        assert torch.equal(inputs["video_grid_thw"], grids)
        assert int((inputs["mm_token_type_ids"] == 2).sum()) == utils.image_tokens(*grids[0, 1:].tolist(), 2)
    chat = [{"role": "user", "content": [{"type": "video", "url": CLIP}, {"type": "text", "text": "what?"}]}]
    whole = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    assert torch.equal(whole["pixel_values_videos"], tiles)


def test_frames_shrink_as_they_are_read(processor, module):
    """A video is never whole in memory: 4K frames weigh 25 MB each."""
    video, utils = processor.video_processor, module("ixc_utils")
    whole = utils.load_video(CLIP)
    (frames,) = video.fetch_frames([CLIP])
    wanted = [utils.shrink_frame(frame, video.tile) for frame in whole]
    assert [frame.tobytes() for frame in frames] == [frame.tobytes() for frame in wanted]
    assert all(small.width < big.width for small, big in zip(frames, whole, strict=True))


def test_frames_are_chosen_as_asked(processor, module):
    video, utils = processor.video_processor, module("ixc_utils")
    count = lambda clip=CLIP, **kwargs: len(video.fetch_frames([clip], **kwargs)[0])  # noqa: E731
    assert (count(), count(num_frames=2), count(fps=3), count(fps=3, num_frames=5)) == (3, 2, 9, 5)
    assert count(do_sample_frames=False) == 90
    given = utils.load_video(CLIP, fps=30, num_frm=90)
    assert (count(given), count(given, do_sample_frames=True)) == (90, 32)
    assert count(given, do_sample_frames=True, video_metadata=[{"fps": 30.0}]) == 3
    inputs = processor(text=f"{VIDEO}", videos=CLIP, num_frames=1, fps=1, return_tensors="pt")
    assert inputs["video_grid_thw"].tolist() == [[1, 1, 2]]


def test_the_label_font_is_an_argument(processor, module, tmp_path):
    (tmp_path / "label.ttf").write_bytes(ImageFont.load_default(40).path.getvalue())  # Pillow's own, as a file
    utils = module("ixc_utils")
    wanted = utils.to_pixels(utils.load_video(CLIP), tile=56, font=ImageFont.truetype(tmp_path / "label.ttf", 40))
    for font in (tmp_path, str(tmp_path / "label.ttf")):
        inputs = processor(text=VIDEO, videos=CLIP, font=font, return_tensors="pt")
        assert torch.equal(inputs["pixel_values_videos"], utils.stack_tiles([wanted], 56)[0])
    with pytest.raises(ValueError, match="readable font"):
        processor(text=VIDEO, videos=CLIP, font=CLIP)


# ------------------------------------------------------------------------------------------- loading and saving


@pytest.fixture(scope="module")
def saved(processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "processor v1.0"
    processor.save_pretrained(folder)
    return folder


def test_saved_processor_comes_back(saved, processor):
    again = AutoProcessor.from_pretrained(saved, trust_remote_code=True)
    assert again.chat_template == processor.chat_template
    assert again.image_processor.tile == again.video_processor.tile == 56
    text, images = [header(ROWS[2][0]), header(ROWS[4][0])], [ROWS[2][1], ROWS[4][1]]
    first, second = (p(text=text, images=images, videos=[[], [CLIP]], return_tensors="pt") for p in (processor, again))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert str(saved.parent.parent) not in (saved / "processor_config.json").read_text()


def test_image_and_video_processor_alone(tiny_checkpoint, saved, processor):
    for folder in (tiny_checkpoint, saved):
        pictures = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True, hd_num=4)
        inputs = pictures([WIDE, TALL], return_tensors="pt")
        assert (inputs["image_grid_thw"].prod(-1) <= 4).all()
        assert inputs["pixel_values"].shape == (int(inputs["image_grid_thw"].prod(-1).sum()), 3, 56, 56)
        assert pictures([[WIDE], [TALL]], hd_num=[1, 9])["image_grid_thw"].prod(-1).tolist() == [1, 8]
        clips = AutoVideoProcessor.from_pretrained(folder, trust_remote_code=True, num_frames=2)
        assert (
            clips(CLIP)["video_grid_thw"].tolist()
            == processor.video_processor(CLIP, num_frames=2)["video_grid_thw"].tolist()
        )


def test_sizes_of_the_7b_release(module):
    pictures = module("image_processing_internlm_xcomposer2").InternLMXComposer2ImageProcessor.from_pretrained(REPO)
    assert (pictures.tile, pictures.patch_size, pictures.tokens_per_side) == (560, 14, 20)
    assert pictures.num_tokens(4, 6) == (4 * 6 + 1) * 400 + 1 + (4 + 1) * 20
    assert pictures.get_number_of_image_patches(2160, 3240) == 24


def test_token_counts_for_serving_engines(processor):
    sizes = [(100, 150), (210, 90), (60, 300)]
    pictures = [Image.new("RGB", size[::-1]) for size in sizes]
    inputs = processor(text=MARK * 3, images=pictures, return_tensors="pt")
    counts = processor._get_num_multimodal_tokens(image_sizes=sizes)
    assert sum(counts["num_image_tokens"]) == int(inputs["mm_token_type_ids"].sum())
    assert sum(counts["num_image_patches"]) == len(inputs["pixel_values"])
    assert processor._get_num_multimodal_tokens(image_sizes=sizes[:1], hd_num=1)["num_image_tokens"] == [13]
    largest = processor.image_processor.size
    sizes = [(largest["height"], largest["width"]), (1000, 1000), (1000, 1500), (1500, 1000), (200, 4800)]
    most, *others = (processor._get_num_multimodal_tokens(image_sizes=[size])["num_image_tokens"][0] for size in sizes)
    assert most >= max(others)
    film = [Image.new("RGB", (320, 240))] * 3
    inputs = processor(text=VIDEO, videos=[film], return_tensors="pt")
    counts = processor._get_num_multimodal_tokens(video_sizes=[(3, 240, 320)])
    assert counts["num_video_tokens"] == [int((inputs["mm_token_type_ids"] == 2).sum())]


def test_decode_drops_the_closing_token(processor):
    ids = processor.tokenizer(f"A picture{CLOSE}</s></s>", add_special_tokens=False)["input_ids"]
    assert processor.decode(ids, skip_special_tokens=True) == "A picture"
    assert processor.batch_decode([ids, ids], skip_special_tokens=True) == ["A picture"] * 2
    assert processor.post_process_image_text_to_text(torch.tensor([ids])) == ["A picture"]
    assert CLOSE in processor.decode(ids)


def test_assistant_mask_covers_answers_and_what_closes_them(processor):
    chat = [*messages("Hi", [("What?", "A picture")]), {"role": "assistant", "content": "Colour"}]
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    (ids,), (mask,) = inputs["input_ids"], inputs["assistant_masks"]
    learned = [token for token, wanted in zip(ids, mask, strict=True) if wanted]
    assert processor.tokenizer.decode(learned) == f"A picture{CLOSE}Colour{CLOSE}"


def test_assistant_mask_leaves_pictures_as_they_are(processor):
    chat, options = messages(f"{MARK}{MARK} compare", pictures=[FLAT, FLAT]), {"tokenize": True, "return_dict": True}
    plain = processor.apply_chat_template(chat, **options)
    masked = processor.apply_chat_template(chat, return_assistant_tokens_mask=True, **options)
    assert masked["input_ids"] == plain["input_ids"] and not any(masked["assistant_masks"][0])
    assert torch.equal(masked["pixel_values"], plain["pixel_values"])


# ------------------------------------------------------------------------------------------- refused


def item_chat(*items):
    return [{"role": "user", "content": list(items)}]


TEXT_ITEM, IMAGE_ITEM = {"type": "text", "text": "see"}, {"type": "image", "image": WIDE}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (dict(text=f"{MARK}{MARK}", images=[WIDE]), ["text[0]", "2 places for images but 1", MARK]),
        (dict(text="none", images=[WIDE, TALL]), ["0 places for images but 2"]),
        (dict(text=f"{MARK}"), ["1 places for images but 0"]),
        (dict(text=f"{VIDEO}", images=WIDE), ["1 places for videos but 0"]),
        (dict(text=["none", f"{MARK}"], images=[[WIDE], [WIDE]]), ["text[0]", "0 places for images but 1"]),
        (dict(text=["none", f"{MARK}"], images=[WIDE, WIDE]), ["2 images for 2 texts with 1 places", "list of lists"]),
        (dict(text=["a", "b"], images=[[WIDE]]), ["1 lists of images but 2 texts"]),
        (dict(text=["a", "b"], videos=[[CLIP]]), ["1 lists of videos but 2 texts"]),
        (dict(text=MARK, images=WIDE, hd_num=0), ["hd_num is 0", "1 or more"]),
        (dict(text=MARK, images=WIDE, hd_num=-3), ["hd_num is -3"]),
        (dict(text=MARK * 2, images=[WIDE, TALL], hd_num=[1]), ["hd_num lists 1 numbers for 2 images"]),
        (dict(text=VIDEO, videos=CLIP, num_frames=0), ["0", "1 or more"]),
        (dict(text=VIDEO, videos=CLIP, fps=0), ["fps is 0"]),
        (dict(text=VIDEO, videos=WIDE), ["no video"]),
        (dict(text=VIDEO, videos=CLIP, video_metadata=[{}, {}]), ["describes 2 videos, but there are 1"]),
        (dict(text=MARK, images=b"no picture at all"), ["neither a picture nor a video"]),
        (dict(text=3, images=WIDE), ["text must be text or a list of texts, got int"]),
        (dict(text=["a", 3]), ["text[1] must be text, got int"]),
        (dict(text="a", audio=np.zeros(3)), ["audio is no input"]),
        (dict(), ["nothing to process"]),
    ],
    ids=lambda value: None if isinstance(value, list) else " ".join(value) or "nothing",
)
def test_wrong_calls_are_refused(call, words, processor):
    with pytest.raises(ValueError) as refused:
        processor(**call)
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("chat", "options", "words"),
    [
        (
            item_chat({"type": "audio", "audio": "a.wav"}),
            {},
            ["unknown type 'audio'", "text, image, image_url, video"],
        ),
        (item_chat(IMAGE_ITEM, {"type": "text", "text": f"{MARK} see"}), {}, [MARK, "item at once"]),
        ([{"role": "tool", "content": "x"}], {}, ['unknown role "tool"', "message 0"]),
        ([*item_chat(TEXT_ITEM), {"role": "system", "content": "x"}], {}, ["system message is message 1"]),
        ([{"role": "system", "content": "x"}, *item_chat(TEXT_ITEM)], {"use_meta": True}, ["one system text"]),
    ],
)
@pytest.mark.parametrize("tokenize", [False, True])
def test_wrong_chats_are_refused(chat, options, words, tokenize, processor):
    with pytest.raises(ValueError) as refused:
        processor.apply_chat_template(chat, tokenize=tokenize, **options)
    for word in words:
        assert word in str(refused.value)


def test_system_text_by_message_or_argument(processor):
    user = item_chat(TEXT_ITEM)
    by_message = processor.apply_chat_template([{"role": "system", "content": "Be brief."}, *user])
    by_argument = processor.apply_chat_template(user, use_meta=True, meta_instruction="Be brief.")
    assert by_message == by_argument == f"<s>{OPEN}system\nBe brief.{CLOSE}\n{OPEN}user\nsee{CLOSE}\n"


def test_a_video_without_a_decoder(processor, module, monkeypatch):
    for name in ("av", "torchcodec", "torchcodec.decoders", "decord"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="no video decoder"):
        processor(text=VIDEO, videos=CLIP)


def test_an_animated_gif_needs_no_decoder(processor):
    frames, file = [Image.new("RGB", (40, 30), (80 * k, 0, 0)) for k in range(3)], io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=1000)
    inputs = processor(text=VIDEO, videos=file.getvalue(), return_tensors="pt")
    assert inputs["video_grid_thw"].tolist() == [[1, 3, 1]]

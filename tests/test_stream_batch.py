"""`stream_chat` and `batch_chat`: the same answers as `chat`, row by row and step by step."""

import threading

import pytest
import torch
from conftest import GOLDEN, golden_prompt, read_golden

PICTURES = [str(GOLDEN / f"images/small_{size}.png") for size in ("150x100", "56x56", "90x210", "300x60")]
CLIP = str(GOLDEN / "videos" / "clip_90f_30fps_320x240.mp4")
GREEDY = {"do_sample": False, "max_new_tokens": 12}

ROWS = [  # query, pictures, history
    ("Hello!", None, []),
    ("<ImageHere>What is it?", [PICTURES[0]], []),
    ("Compare <ImageHere> with <ImageHere>, and say which one is the larger of the two.", PICTURES[1:3], []),
    ("And now?", [PICTURES[3]], [("<ImageHere>Describe it", "A picture."), ("More", "No.")]),
    ("What happens?", [CLIP], []),
    ("你好，请介绍一下你自己", [], []),
]


@pytest.fixture
def model(tiny_model):
    tiny_model.reuse.clear()
    yield tiny_model
    tiny_model.reuse.clear()


def generating_threads():
    return [thread for thread in threading.enumerate() if thread.name == "stream_chat"]


class TestBatch:
    @pytest.mark.parametrize("beams", [1, 3])
    @pytest.mark.parametrize("mode", ["base", "web"])
    def test_rows_equal_single_chats(self, model, tiny_tokenizer, beams, mode):
        queries, images, histories = (list(column) for column in zip(*ROWS, strict=True))
        settings = {**GREEDY, "num_beams": beams, "infer_mode": mode}
        answers, told = model.batch_chat(tiny_tokenizer, queries, images, histories, **settings)
        model.reuse.clear()
        for answer, after, (query, image, history) in zip(answers, told, ROWS, strict=True):
            single, _ = model.chat(tiny_tokenizer, query, image, history=history, **settings)
            assert answer == single
            assert after == [*history, (query, answer)]

    def test_penalties_count_from_the_first_generated_token_in_padded_rows(self, model, tiny_tokenizer):
        queries = ["hi", "a much longer question " * 3]
        settings = {**GREEDY, "repetition_penalty": 1.6, "max_new_tokens": 24}
        answers, _ = model.batch_chat(tiny_tokenizer, queries, **settings)
        assert answers == [model.chat(tiny_tokenizer, query, **settings)[0] for query in queries]

    def test_a_second_turn_continues_each_row(self, model, tiny_tokenizer):
        queries, images, histories = (list(column) for column in zip(*ROWS, strict=True))
        _, histories = model.batch_chat(tiny_tokenizer, queries, images, histories, **GREEDY)
        again = ["more, please"] * len(queries)
        answers, _ = model.batch_chat(tiny_tokenizer, again, images, histories, **GREEDY)
        model.reuse.clear()
        for answer, image, history in zip(answers, images, histories, strict=True):
            assert answer == model.chat(tiny_tokenizer, "more, please", image, history=history, **GREEDY)[0]

    def test_rows_longer_than_the_model_was_trained_for(self, model, tiny_tokenizer):
        """Dynamic rope goes by each row's own length."""
        queries = ["short", "long " * 400]
        assert len(tiny_tokenizer(queries[1]).input_ids) > model.config.max_position_embeddings
        answers, _ = model.batch_chat(tiny_tokenizer, queries, **GREEDY)
        assert answers == [model.chat(tiny_tokenizer, query, **GREEDY)[0] for query in queries]

    def test_golden_chats_in_one_batch(self, golden_model, released_tokenizer):
        cases = [
            case
            for case in read_golden("chat_cases.json")
            if case["mode"] == "base" and "num_beams" not in case["kwargs"] and len(case["output_ids"]) == 16
            if not {"repetition_penalty", "hd_num"} & case["kwargs"].keys()
        ]
        assert len(cases) >= 6
        for use_meta in (False, True):
            rows = [case for case in cases if case["kwargs"].get("use_meta", False) == use_meta]
            answers, _ = golden_model.batch_chat(
                released_tokenizer,
                [case["query"] for case in rows],
                [[str(GOLDEN / image) for image in case["images"]] for case in rows],
                [case["kwargs"].get("history", []) for case in rows],
                use_meta=use_meta,
                do_sample=False,
                max_new_tokens=16,
            )
            assert answers == [case["response"] for case in rows]
        assert all("<ImageHere>" in golden_prompt(case) or len(case["images"]) < 2 for case in cases)

    def test_lists_of_different_lengths(self, model, tiny_tokenizer):
        with pytest.raises(ValueError, match="2 queries, 1 images, 2 histories"):
            model.batch_chat(tiny_tokenizer, ["a", "b"], [PICTURES[0]], **GREEDY)

    def test_the_wrong_row_is_named(self, model, tiny_tokenizer):
        with pytest.raises(ValueError, match="conversation 1: 2 <ImageHere> slots but 1 images"):
            model.batch_chat(tiny_tokenizer, ["a", "<ImageHere><ImageHere>"], [None, [PICTURES[0]]], **GREEDY)
        with pytest.raises(FileNotFoundError, match="conversation 0: .*nowhere.png"):
            model.batch_chat(tiny_tokenizer, ["a", "b"], [["nowhere.png"], None], **GREEDY)


class TestStream:
    @pytest.mark.parametrize("query, image, history", ROWS)
    def test_ends_as_chat_does(self, model, tiny_tokenizer, query, image, history):
        steps = list(model.stream_chat(tiny_tokenizer, query, image, history=history, **GREEDY))
        model.reuse.clear()
        assert steps[-1] == model.chat(tiny_tokenizer, query, image, history=history, **GREEDY)
        assert len(steps) > 3
        for (text, told), (longer, _) in zip(steps, steps[1:], strict=False):
            assert longer.startswith(text)
            assert told == [*history, (query, text)]

    def test_characters_appear_whole(self, model, tiny_tokenizer, monkeypatch):
        """An answer whose characters take several byte tokens each."""
        said = "é😀漢字 fin"
        ids = tiny_tokenizer(said, add_special_tokens=False).input_ids
        assert len(ids) > len(said)  # some characters are spelled in bytes

        def speak(*args, streamer, **kwargs):
            streamer.put(torch.zeros(1, 0, dtype=torch.long))
            for token in ids:
                streamer.put(torch.tensor([token]))
            streamer.end()
            return torch.tensor([ids])

        monkeypatch.setattr(model, "generate", speak)
        texts = [text for text, _ in model.stream_chat(tiny_tokenizer, "hi")]
        assert texts[-1] == said
        assert all(said.startswith(text) for text in texts)

    def test_a_mark_in_an_answer_is_no_slot(self, model, tiny_tokenizer, monkeypatch):
        ids = tiny_tokenizer("see <ImageHere>", add_special_tokens=False).input_ids
        with monkeypatch.context() as patch:
            patch.setattr(model, "generate", lambda *args, **kwargs: torch.tensor([ids]))
            answer, history = model.chat(tiny_tokenizer, "hi")
        assert answer == "see <ImageHere>"
        model.chat(tiny_tokenizer, "and?", history=history, **GREEDY)

    def test_leaving_early_stops_the_generation(self, model, tiny_tokenizer):
        made = []
        forward = model.lm_head.register_forward_hook(lambda *_: made.append(1))
        stream = model.stream_chat(tiny_tokenizer, "go on", do_sample=False, max_new_tokens=4000, eos_token_id=-1)
        next(stream)
        stream.close()
        forward.remove()
        assert not generating_threads()
        assert len(made) < 4000

    def test_an_iterator_nobody_reads_starts_nothing(self, model, tiny_tokenizer):
        model.stream_chat(tiny_tokenizer, "hi", **GREEDY)
        assert not generating_threads()

    def test_what_generation_raises_is_raised_in_the_reader(self, model, tiny_tokenizer, monkeypatch):
        def fail(*args, **kwargs):
            raise RuntimeError("the card fell out")

        monkeypatch.setattr(model, "generate", fail)
        with pytest.raises(RuntimeError, match="the card fell out"):
            list(model.stream_chat(tiny_tokenizer, "hi"))
        assert not generating_threads()

    def test_bad_input_is_told_before_the_first_step(self, model, tiny_tokenizer):
        with pytest.raises(ValueError, match="1 <ImageHere> slots but 0 images"):
            model.stream_chat(tiny_tokenizer, "<ImageHere>?")
        with pytest.raises(ValueError, match="num_beams=3 cannot stream"):
            model.stream_chat(tiny_tokenizer, "hi", num_beams=3)

    def test_the_callers_autocast_holds(self, model, tiny_tokenizer):
        seen = []
        hook = model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
        with torch.autocast("cpu", torch.bfloat16):
            list(model.stream_chat(tiny_tokenizer, "hi", do_sample=False, max_new_tokens=2))
        hook.remove()
        assert set(seen) == {torch.bfloat16}

    def test_a_stopping_criterion_of_the_callers_is_heard(self, model, tiny_tokenizer):
        def after_three(ids, scores, **kwargs):
            return torch.full((len(ids),), ids.shape[1] >= 3)

        made = []
        hook = model.lm_head.register_forward_hook(lambda *_: made.append(1))
        list(model.stream_chat(tiny_tokenizer, "hi", stopping_criteria=[after_three], eos_token_id=-1, **GREEDY))
        hook.remove()
        assert len(made) == 3


class TestStreamWebpage:
    GREEDY = {**GREEDY, "repetition_penalty": 1.2}

    @pytest.mark.parametrize("image", [None, PICTURES[0]])
    def test_ends_as_write_webpage_does(self, model, tiny_tokenizer, image):
        steps = list(model.stream_webpage("A page", image, tokenizer=tiny_tokenizer, **self.GREEDY))
        model.reuse.clear()
        whole = model.write_webpage(
            "A page", image, num_beams=1, output_path=None, tokenizer=tiny_tokenizer, **self.GREEDY
        )
        assert steps[-1] == whole
        assert len(steps) > 3

    def test_a_seed_gives_the_same_page_and_leaves_the_callers_random_state(self, model, tiny_tokenizer):
        before = torch.get_rng_state()
        settings = {"max_new_tokens": 8, "seed": 7, "tokenizer": tiny_tokenizer}
        first, second = ([*model.stream_webpage("A page", **settings)][-1] for _ in range(2))
        whole = model.write_webpage("A page", num_beams=1, output_path=None, **settings)
        assert first == second == whole
        assert torch.equal(torch.get_rng_state(), before)

    def test_leaving_stops_it(self, model, tiny_tokenizer):
        pages = model.stream_webpage("A page", tokenizer=tiny_tokenizer, do_sample=False, max_new_tokens=4000)
        next(pages)
        pages.close()
        assert not generating_threads()

    def test_beams_cannot_stream(self, model, tiny_tokenizer):
        with pytest.raises(ValueError, match="num_beams=2 cannot stream"):
            model.stream_webpage("A page", tokenizer=tiny_tokenizer, num_beams=2)

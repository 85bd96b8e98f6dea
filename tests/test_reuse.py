"""What one turn leaves for the next changes no token: seeded random conversations with reuse against recomputing.

And it is real work saved, within its limits, and golden chats stay what they are under every switch.
"""

import itertools
import os
import random
from contextlib import contextmanager

import pytest
import torch
from conftest import CLOSE, GOLDEN, MARK, OPEN, load, read_golden
from PIL import Image
from transformers.cache_utils import DynamicCache
from transformers.generation import StoppingCriteriaList

from xcomposer import cli, loading
from xcomposer.checkpoints import tiny
from xcomposer.machine import ONEDNN
from xcomposer.model.reuse_internlm_xcomposer2 import default_limits

CASES = read_golden("chat_cases.json")
WORDS = "paper harbour garden night image sign line number title page red small first second window rain".split()


def picture(number):
    """Small pictures of several shapes, no two alike."""
    img = Image.radial_gradient("L").resize([(112, 56), (56, 56), (60, 130), (168, 100)][number % 4])
    return Image.merge("RGB", [img.point(lambda v, s=s: (v * s + 40 * number) % 256) for s in (1, 2, 3)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One checkpoint in whose range a conversation stays, one whose range it soon leaves."""
    out = tmp_path_factory.mktemp("reuse")
    ranges = {"long range": 4096, "short range": 160}
    return {
        name: tiny.write_checkpoint(out / name.replace(" ", "-"), {"max_position_embeddings": positions})
        for name, positions in ranges.items()
    }


def fresh(folder, tokenizer):
    model = load(folder)
    model.tokenizer = tokenizer
    return model


@pytest.fixture
def model(folders, tiny_tokenizer):
    return fresh(folders["long range"], tiny_tokenizer)


@contextmanager
def recomputing(model):
    """Nothing is taken or kept; what is stored stays."""
    store, model.reuse = model.reuse, type(model.reuse)(0, 0)
    try:
        yield
        assert model.reuse.nbytes() == 0
    finally:
        model.reuse = store


@contextmanager
def counting(model):
    """Vision tower calls, and positions that the decoder runs in calls of more than a token or of a prompt's end."""
    seen = {"vision": 0, "tokens": 0, "calls": 0}

    def vision(module, args, kwargs):
        seen["vision"] += 1

    def decoder(module, args, kwargs):
        given = kwargs.get("inputs_embeds")
        seen["tokens"] += (given if given is not None else kwargs["input_ids"]).shape[1]
        seen["calls"] += 1

    hooks = [
        model.model.vision_tower.register_forward_pre_hook(vision, with_kwargs=True),
        model.model.language_model.register_forward_pre_hook(decoder, with_kwargs=True),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def recording(model):
    """Token ids of each `generate`."""
    rows, generate = [], model.generate

    def record(*args, **kwargs):
        out = generate(*args, **kwargs)
        rows.append(out.tolist())
        return out

    model.generate = record
    try:
        yield rows
    finally:
        del model.generate


def bytes_held(store):
    """Bytes of the storages behind what a store holds, room to grow included."""
    tensors = [*store._pictures.values()]
    for prefix in store._prefixes:
        tensors += [t for layer in prefix.cache.layers for t in (layer.keys, layer.values)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def within_limits(store):
    pictures = sum(t.untyped_storage().nbytes() for t in store._pictures.values())
    return pictures <= store.picture_bytes and bytes_held(store) - pictures <= store.prefix_bytes


# ------------------------------------------------------------------------------------------------ random conversations


class Talk:
    """A conversation that a seed writes: each step asks something, or first changes what an answer depends on."""

    def __init__(self, model, seed):
        self.model, self.random = model, random.Random(seed)
        self.history, self.pictures = [], []
        self.hd_num, self.use_meta, self.mode = 4, False, "base"
        self.others = []  # earlier states of this conversation, to which it may return

    def words(self, least=1, most=12):
        return " ".join(self.random.choices(WORDS, k=self.random.randint(least, most)))

    def query(self):
        """Words, sometimes about one more picture."""
        if len(self.pictures) < 3 and self.random.random() < 0.4:
            self.pictures.append(picture(self.random.randrange(8)))
            return f"{self.words()} {MARK} {self.words()}"
        return self.words()

    def compare(self, ask):
        """The call with reuse and the same call without: the same tokens."""
        with recording(self.model) as rows:
            got = ask()
            with recomputing(self.model):
                expected = ask()
        assert rows[: len(rows) // 2] == rows[len(rows) // 2 :]
        assert got == expected
        assert within_limits(self.model.reuse)
        return got

    def given(self, **more):
        return {
            "image": list(self.pictures),
            "hd_num": self.hd_num,
            "history": list(self.history),
            "use_meta": self.use_meta,
            "infer_mode": self.mode,
            "do_sample": False,
            "max_new_tokens": self.random.choice([1, 4, 9]),
            **more,
        }

    # Steps that ask.

    def turn(self, **more):
        query = self.query()
        given = self.given(**more)
        _, self.history = self.compare(lambda: self.model.chat(query=query, **given))

    def beams(self):
        self.turn(num_beams=self.random.choice([2, 3]))

    def stops(self):
        after = self.random.randint(1, 4)

        def stop(ids, scores, **_):
            return torch.full((len(ids),), ids.shape[1] >= after)

        self.turn(stopping_criteria=StoppingCriteriaList([stop]))

    def other_end(self):
        self.turn(eos_token_id=self.random.sample(range(20, 900), 200))

    def penalty(self):
        self.turn(repetition_penalty=1.3)

    def asks_and_forgets(self):
        before = list(self.pictures)
        query, given = self.query(), self.given()
        self.compare(lambda: self.model.chat(query=query, **given))
        self.pictures = before

    def leaves_a_stream(self):
        query = self.query()
        given = self.given(max_new_tokens=12, repetition_penalty=1.0)
        stream = self.model.stream_chat(query=query, **given)
        said = list(itertools.islice(stream, self.random.randint(1, 3)))
        stream.close()
        self.history = said[-1][1]
        self.turn()

    def streams(self):
        query, given = self.query(), self.given()
        _, self.history = self.compare(lambda: list(self.model.stream_chat(query=query, **given))[-1])

    def batch(self):
        """This conversation beside a text and an earlier state of itself."""
        query, given = self.query(), self.given()
        rows = [(query, given["image"], given["history"]), (self.words(), [], [])]
        if self.others:
            history, pictures = self.random.choice(self.others)
            rows.append((self.words(), list(pictures), list(history)))
        self.random.shuffle(rows)
        mine = next(i for i, row in enumerate(rows) if row[0] is query)
        queries, images, histories = (list(column) for column in zip(*rows, strict=True))
        given = {k: v for k, v in given.items() if k not in ("image", "history")}
        given["num_beams"] = self.random.choice([1, 1, 2])
        _, new = self.compare(lambda: self.model.batch_chat(None, queries, images, histories, **given))
        self.history = new[mine]

    # Steps that change what answers depend on.

    def edits_history(self):
        if self.history:
            at = self.random.randrange(len(self.history))
            asked, said = self.history[at]
            part = self.random.choice(["query", "answer", "cut"])
            if part == "cut":
                asked_since = " ".join(query for query, _ in self.history[at:])
                del self.history[at:]
                del self.pictures[len(self.pictures) - asked_since.count(MARK) :]
            elif part == "query":
                self.history[at] = (f"{asked} {self.words(1, 2)}", said)
            else:
                self.history[at] = (asked, self.words())
        self.turn()

    def changes_a_picture(self):
        if self.pictures:
            self.pictures[self.random.randrange(len(self.pictures))] = picture(self.random.randrange(8))
        self.turn()

    def swaps_pictures(self):
        self.random.shuffle(self.pictures)
        self.turn()

    def other_tiles(self):
        self.hd_num = self.random.choice([1, 2, 4, 6])
        self.turn()

    def other_system(self):
        self.use_meta = not self.use_meta
        self.turn()

    def other_adapter(self):
        self.mode = self.random.choice(["base", "web", "write"])
        self.turn()

    def goes_back(self):
        if self.others:
            self.history, self.pictures = (list(part) for part in self.random.choice(self.others))
        self.turn()

    def weights_by_data(self):
        layer = self.random.choice(self.model.model.language_model.layers)
        part = self.random.choice([layer.feed_forward.w2.linear, layer.attention.wqkv.Plora_B, layer.attention_norm])
        part.weight.data.mul_(1.5)
        self.turn()

    def vision_weights_by_data(self):
        self.random.choice(list(self.model.model.vision_proj.parameters())).data.mul_(1.5)
        self.turn()

    def weights_by_state_dict(self):
        state = {
            name: value * 1.5 if name.endswith(("wo.linear.weight", "vision_proj.2.weight")) else value.clone()
            for name, value in self.model.state_dict().items()
        }
        self.model.load_state_dict(state)
        self.turn()

    def head_by_data(self):
        self.model.lm_head.weight.data.mul_(-1)
        self.turn()

    def adapter_weights(self):
        self.model.load_task_adapters(["web"])
        self.model.model.language_model.layers[0].attention.wo.task_B["web"].weight.data.mul_(2)
        self.mode = "web"
        self.turn()

    def merged(self):
        if self.mode != "base":
            with self.model.merged_task_adapter(self.mode):
                self.turn()
        self.turn()

    def other_dtype(self):
        self.model.to(torch.float64 if self.model.dtype == torch.float32 else torch.float32)
        self.turn()

    def other_attention(self):
        self.model.set_attn_implementation("eager" if self.model.config._attn_implementation == "sdpa" else "sdpa")
        self.turn()

    def clears(self):
        self.model.reuse.clear()
        assert self.model.reuse.nbytes() == 0
        self.turn()

    def switches_off_and_on(self):
        store = self.model.reuse
        limits = store.prefix_bytes, store.picture_bytes
        store.disable()
        self.turn()
        assert store.nbytes() == 0 and not store.enabled
        store.prefix_bytes, store.picture_bytes = limits
        self.turn()

    def small_limits(self):
        self.model.reuse.prefix_bytes = self.random.choice([1 << 14, 1 << 17, 1 << 20])
        self.model.reuse.picture_bytes = self.random.choice([1 << 10, 1 << 13, 1 << 20])
        self.turn()

    STEPS = (
        turn, turn, turn, turn, beams, stops, other_end, penalty, asks_and_forgets, leaves_a_stream, streams, batch,
        batch, edits_history, edits_history, changes_a_picture, swaps_pictures, other_tiles, other_system,
        goes_back, weights_by_data, vision_weights_by_data, weights_by_state_dict, head_by_data, adapter_weights,
        other_adapter, merged, other_dtype, other_attention, clears, switches_off_and_on, small_limits,
    )  # fmt: skip

    def step(self, act):
        act(self)
        self.others.append((list(self.history), list(self.pictures)))


@pytest.mark.parametrize("kind", ["long range", "short range"])
@pytest.mark.parametrize("seed", range(4))
def test_reuse_is_recompute(folders, tiny_tokenizer, kind, seed):
    talk = Talk(fresh(folders[kind], tiny_tokenizer), seed)
    talk.turn()
    steps = list(Talk.STEPS)
    talk.random.shuffle(steps)
    for act in steps:
        if len(talk.history) > 6:
            talk.history, talk.pictures = [], []
        talk.step(act)


# ------------------------------------------------------------------------------------------------ what reuse is worth


def ask(model, query, history=(), **kwargs):
    settings = {"image": [picture(0)], "do_sample": False, "max_new_tokens": 5, "hd_num": 4, **kwargs}
    return model.chat(query=query, history=history, **settings)[1]


def prompt_tokens(model, query, history, image=None):
    past = "".join(f"{OPEN}user\n{q}{CLOSE}\n{OPEN}assistant\n{a}{CLOSE}\n" for q, a in history)
    images = [picture(0)] if image is None else image
    whole = f"{past}{OPEN}user\n{query}{CLOSE}\n{OPEN}assistant\n"
    return len(model._open(model.tokenizer, whole, images, 4).prompt.input_ids)


def test_the_second_turn_runs_what_is_new(model):
    with counting(model) as first:
        history = ask(model, "what is on the sign ?")
    length = prompt_tokens(model, "what is on the sign ?", [])
    assert first["vision"] == 1
    assert first["tokens"] == length + first["calls"] - 1  # the prompt at once, then a token a step
    with counting(model) as second:
        ask(model, "and the title ?", history)
    longer = prompt_tokens(model, "and the title ?", history)
    assert second["vision"] == 0
    assert second["tokens"] - second["calls"] < longer - length
    with recomputing(model), counting(model) as again:
        ask(model, "and the title ?", history)
    assert again["vision"] == 1
    assert again["tokens"] == longer + again["calls"] - 1


def test_the_same_question_again_runs_one_position(model):
    ask(model, "what is on the sign ?")
    with counting(model) as seen:
        ask(model, "what is on the sign ?")
    assert seen["vision"] == 0
    assert seen["tokens"] == seen["calls"]


def test_a_picture_is_kept_where_the_text_before_it_changes(model):
    ask(model, f"look {MARK} here")
    with counting(model) as seen:
        ask(model, f"see {MARK} here")
    assert seen["vision"] == 0
    with counting(model) as seen:
        ask(model, f"see {MARK} here", image=[picture(1)])
    assert seen["vision"] == 1


def test_a_picture_is_known_by_content(model, tmp_path):
    picture(0).save(tmp_path / "a.png")
    ask(model, "look", image=[str(tmp_path / "a.png")])
    with counting(model) as seen:
        ask(model, "look", image=[picture(0)])
    assert seen["vision"] == 0
    picture(1).save(tmp_path / "a.png")  # another content under the same name
    with counting(model) as seen:
        ask(model, "look", image=[str(tmp_path / "a.png")])
    assert seen["vision"] == 1


def test_beams_and_batches_leave_their_prompt(model):
    history = ask(model, "what is on the sign ?", num_beams=3)
    with counting(model) as seen:
        ask(model, "and the title ?", history)
    assert seen["vision"] == 0
    assert seen["tokens"] < prompt_tokens(model, "and the title ?", history)
    model.reuse.clear()
    queries, images = ["what is it ?", "red or small ?"], [[picture(0)], [picture(1)]]
    settings = {"do_sample": False, "max_new_tokens": 5, "hd_num": 4}
    _, histories = model.batch_chat(None, queries, images, **settings)
    with counting(model) as seen:
        model.batch_chat(None, ["and then ?", "why ?"], images, histories, **settings)
    assert seen["vision"] == 0


def test_beams_run_the_prompt_once(model):
    model.reuse.disable()
    rows = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    ask(model, "what is on the sign ?", num_beams=3)
    hook.remove()
    assert rows[0] == (1, prompt_tokens(model, "what is on the sign ?", []))
    assert set(rows[1:]) == {(3, 1)}


@pytest.mark.parametrize("way", ["chat", "beams", "generate", "later turn"])
def test_a_long_prompt_is_never_embedded_whole(model, monkeypatch, way):
    """Nor are keys repeated for the queries that share them."""
    monkeypatch.setattr(model, "prefill_chunk", 8)
    monkeypatch.setattr(model, "embedded_whole", 30)
    history = ask(model, "what is it ?") if way == "later turn" else []
    heads = {model.config.num_key_value_heads}
    embedded, attended = [], []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: embedded.append(args[0].shape[1]))
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, *args, **kwargs):
        if kwargs.get("attn_mask") is not None:  # not in the vision tower, nor in the first chunk
            attended.append(key.shape[1])
        return attention(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    if way == "generate":
        model.generate(torch.randint(5, 50, (2, 90)), max_new_tokens=2, do_sample=False)
    else:
        ask(model, "red or small ?", history, num_beams=3 if way == "beams" else 1, max_new_tokens=2)
    hook.remove()
    assert 0 < max(embedded) <= 8
    assert set(attended) == heads


def test_adapters_do_not_share(model):
    ask(model, "what is on the sign ?")
    with counting(model) as seen:
        ask(model, "what is on the sign ?", infer_mode="web")
    assert seen["vision"] == 0  # pictures know no adapter
    assert seen["tokens"] == prompt_tokens(model, "what is on the sign ?", []) + seen["calls"] - 1


# ------------------------------------------------------------------------------------------------------------- limits


def test_the_oldest_conversation_goes_first(model):
    ask(model, "first")
    model.reuse.prefix_bytes = int(1.5 * bytes_held(model.reuse))
    ask(model, "second night of rain", image=[picture(1)])
    assert len(model.reuse._prefixes) == 1 and within_limits(model.reuse)
    with counting(model) as seen:
        ask(model, "second night of rain", image=[picture(1)])
    assert seen["tokens"] == seen["calls"]
    with counting(model) as seen:
        ask(model, "first")
    assert seen["tokens"] > seen["calls"]


def test_a_limit_counts_the_room_of_a_cache(model):
    """A long conversation, edited at its beginning, leaves a short one: its memory goes with it."""
    long = " ".join(WORDS * 20)
    ask(model, long)
    limit = model.reuse.prefix_bytes = bytes_held(model.reuse) // 2
    ask(model, "short")
    assert within_limits(model.reuse)
    assert limit >= bytes_held(model.reuse) - sum(t.nbytes for t in model.reuse._pictures.values())


def test_what_alone_is_over_the_limit_is_not_kept(model):
    model.reuse.prefix_bytes, model.reuse.picture_bytes = 1 << 10, 1 << 8
    ask(model, "what is on the sign ?")
    assert model.reuse.nbytes() == 0


def test_nothing_is_kept_when_disabled(model):
    ask(model, "what is on the sign ?")
    assert model.reuse.nbytes() > 0
    model.reuse.disable()
    assert model.reuse.nbytes() == bytes_held(model.reuse) == 0
    for _ in range(2):
        with counting(model) as seen:
            ask(model, "what is on the sign ?")
        assert seen["vision"] == 1
        assert seen["tokens"] == prompt_tokens(model, "what is on the sign ?", []) + seen["calls"] - 1
    assert model.reuse.nbytes() == bytes_held(model.reuse) == 0


def test_nothing_is_kept_of_a_call_that_fails(model):
    history = ask(model, "what is on the sign ?")

    def fail(ids, scores, **_):
        raise RuntimeError("stopped in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        ask(model, "and the title ?", history, stopping_criteria=StoppingCriteriaList([fail]))
    with recomputing(model):
        expected = ask(model, "and the title ?", history)
    assert ask(model, "and the title ?", history) == expected


# ------------------------------------------------------------------------------------------------------------- golden

SWITCHES = {
    "prefill in small chunks": lambda model: (model, "prefill_chunk", 7),
    "prompts run ahead of generate": lambda model: (model, "embedded_whole", 0),
    "prefill at once": lambda model: (model, "prefill_chunk", 0),
    "every beam runs the prompt": lambda model: (model, "share_prefill", False),
    "dense partial LoRA": lambda model: (model.model.language_model, "dense_partial_lora", True),
    "one tile at once": lambda model: (model.model, "tiles_at_once", 1),
    "reuse off": lambda model: (model.reuse, "prefix_bytes", 0),
    "all as it is": lambda model: (model, "prefill_chunk", model.prefill_chunk),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_golden_chats(golden_model, golden_tokenizer, monkeypatch, switch):
    monkeypatch.setattr(*SWITCHES[switch](golden_model))
    golden_model.reuse.clear()
    for _ in range(2):  # the second time, everything there is to reuse is there
        for case in CASES:
            answer, _ = golden_model.chat(
                golden_tokenizer,
                case["query"],
                [str(GOLDEN / name) for name in case["images"]],
                do_sample=False,
                max_new_tokens=len(case["output_ids"]),
                infer_mode=case["mode"],
                **case["kwargs"],
            )
            assert golden_tokenizer.decoded[-1] == case["output_ids"], case["name"]
            assert answer == case["response"]


def test_a_cache_of_the_callers_is_used(tiny_model, tiny_tokenizer):
    """An empty one is no reason to bring another."""
    cache = DynamicCache(config=tiny_model.config)
    ids = tiny_tokenizer("hello", return_tensors="pt").input_ids
    tiny_model.generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False, eos_token_id=-1)
    assert cache.get_seq_length() == ids.shape[1] + 2
    assert type(cache) is DynamicCache


def test_limits_suit_the_model(folders, tiny_tokenizer):
    """Eight of its longest conversations; of the 7B release's, one of 16 k tokens in 16 bits."""
    model = fresh(folders["long range"], tiny_tokenizer)
    text = model.config.text_config
    row = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4
    longest = row * (model.config.context_length + 256)
    assert model.reuse.prefix_bytes == 8 * longest < 2 << 30
    released = type(model.config)()
    assert default_limits(released) == (2 << 30, 512 << 20)


def test_commands_leave_room_on_the_machine(model, monkeypatch):
    """A quarter of what is free, once the weights are loaded."""
    free = 4 * 1000
    monkeypatch.setattr(loading, "free_bytes", lambda device: free)
    loading.bound_reuse(model)
    assert model.reuse.prefix_bytes + model.reuse.picture_bytes == free // 4
    before, free = (model.reuse.prefix_bytes, model.reuse.picture_bytes), 1 << 50
    loading.bound_reuse(model)
    assert (model.reuse.prefix_bytes, model.reuse.picture_bytes) == before  # a lower limit stays


def test_many_conversations_stay_within_the_limits(model):
    model.reuse.prefix_bytes, model.reuse.picture_bytes = 1 << 20, 1 << 16
    for number in range(12):
        model.chat(query=f"{WORDS[number]} ?", image=picture(number), do_sample=False, max_new_tokens=2, hd_num=4)
        assert within_limits(model.reuse)
    assert len(model.reuse._prefixes) < 12


@pytest.mark.parametrize("given, wanted", [({}, {"8"}), ({name: "5" for name in ONEDNN}, {"5"})], ids=["unset", "set"])
def test_commands_bound_the_kernels_that_onednn_keeps(monkeypatch, given, wanted):
    """In their own process, and a number that is set stays."""
    others = {name: value for name, value in os.environ.items() if name not in ONEDNN}
    monkeypatch.setattr(os, "environ", {**others, **given})
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--help"])
    assert {os.environ[name] for name in ONEDNN} == wanted

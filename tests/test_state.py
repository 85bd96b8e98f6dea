"""What one call leaves behind does no harm to another: modes, conversations, threads, changed weights, copies."""

import copy
import gc
import io
import math
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import transformers
from conftest import MARK, load
from test_reuse import bytes_held, counting, fresh, picture, prompt_tokens, recomputing, recording

from xcomposer.checkpoints import tiny
from xcomposer.model.fingerprint_internlm_xcomposer2 import content_of

GREEDY = {"do_sample": False, "max_new_tokens": 5, "hd_num": 4}
SYSTEM = {"use_meta": True, "meta_instruction": "answer in short words " * 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("state") / "long", {"max_position_embeddings": 4096})


@pytest.fixture
def model(folder, tiny_tokenizer):
    return fresh(folder, tiny_tokenizer)


# ----------------------------------------------------------------------------------------------------- inference mode

ASK = {
    "chat": lambda model, history: model.chat(query="and why ?", image=picture(0), history=history, **GREEDY),
    "stream_chat": lambda model, history: list(
        model.stream_chat(query="and why ?", image=picture(0), history=history, **GREEDY)
    )[-1],
    "batch_chat": lambda model, history: model.batch_chat(
        None, ["and why ?"] * 2, [[picture(0)]] * 2, [history] * 2, **GREEDY
    ),
}


@pytest.mark.parametrize("method", ASK)
def test_a_call_in_inference_mode_is_no_trap_for_the_next(model, method):
    with torch.inference_mode():
        _, history = model.chat(query="what is it ?", image=picture(0), **GREEDY)
        model.interleav_wrap_chat("what ?", picture(1))
    again = ASK[method](model, history)
    with recomputing(model):
        assert ASK[method](model, history) == again
    with torch.inference_mode():
        assert ASK[method](model, history) == again


def test_adapters_first_loaded_in_inference_mode_can_be_trained(model):
    with torch.inference_mode():
        model.write_artical("write", do_sample=False, max_new_tokens=2)
        model.state_dict()  # parts what the write mode has joined
    model.train()
    ids = torch.randint(5, 50, (1, 8))
    model(input_ids=ids, labels=ids, infer_mode="write").loss.backward()
    pairs = model.model.language_model.layers[0].attention.wo.task_B
    for name in ("sft", "dpo"):
        assert not pairs[name].weight.is_inference() and pairs[name].weight.grad is not None
    torch.optim.SGD(model.parameters(), lr=0.1).step()


# ------------------------------------------------------------------------------------------------------ conversations


def rows_of_turns(model, conversations, turns=3, **settings):
    """Positions that the prompts of several conversations run, turn by turn: lists of numbers, one a conversation."""
    histories = [[] for _ in conversations]
    rows = [[] for _ in conversations]
    for turn in range(turns):
        for number, (image, words) in enumerate(conversations):
            with counting(model) as seen:
                _, histories[number] = model.chat(
                    query=f"{words} {turn} ?", image=image, history=histories[number], **{**GREEDY, **settings}
                )
            rows[number].append(seen["tokens"] - seen["calls"] + 1)
    return rows


@pytest.mark.parametrize("settings", [{}, SYSTEM], ids=["plain", "system turn"])
def test_conversations_in_turns_pay_for_what_is_new(model, settings):
    talks = [(picture(0), "what is on the sign"), (picture(1), "red or small"), (None, "paper and rain")]
    alone = []
    for talk in talks:
        model.reuse.clear()
        alone += rows_of_turns(model, [talk], **settings)
    model.reuse.clear()
    together = rows_of_turns(model, talks, **settings)
    for mine, shared in zip(alone, together, strict=True):
        assert shared[0] <= mine[0]  # the opening may be another's
        assert shared[1:] == mine[1:]


def test_a_shared_opening_is_shared(model):
    """The same picture and system turn: the second conversation runs its words alone, and the first loses nothing."""
    talks = [(picture(0), "what is on the sign"), (picture(0), "what is red or small")]
    alone = []
    for talk in talks:
        model.reuse.clear()
        alone += rows_of_turns(model, [talk], **SYSTEM)
    model.reuse.clear()
    first, second = rows_of_turns(model, talks, **SYSTEM)
    assert first == alone[0]
    assert second[0] < 40 < alone[1][0] and second[1:] == alone[1][1:]


def test_a_continued_conversation_is_not_copied(model):
    _, history = model.chat(query="what is it ?", image=picture(0), **GREEDY)
    (before,) = model.reuse._prefixes
    model.chat(query="and why ?", image=picture(0), history=history, **GREEDY)
    (after,) = model.reuse._prefixes
    assert before.cache is after.cache


def test_rows_of_a_batch_are_kept_to_where_each_stopped(model):
    queries, images = ["what is it ?", "red or small ?"], [[picture(0)], [picture(1)]]
    with recording(model) as rows:
        model.batch_chat(None, queries, images, **GREEDY)
    first, second = rows[0]
    stop = next(token for token in first if token not in second)
    model.reuse.clear()
    model.batch_chat(None, queries, images, eos_token_id=stop, **GREEDY)
    prompts = [prompt_tokens(model, query, [], image) for query, image in zip(queries, images, strict=True)]
    kept = [len(prefix.key) for prefix in model.reuse._prefixes]
    assert kept == [prompts[0] + first.index(stop), prompts[1] + len(second) - 1]


def test_room_for_one_is_not_room_for_two(model):
    """Where a copy does not fit beside its origin, the one conversation becomes the other."""
    model.chat(query="what is it ?", image=picture(0), **GREEDY)
    held = bytes_held(model.reuse) - sum(t.nbytes for t in model.reuse._pictures.values())
    model.reuse.prefix_bytes = int(1.2 * held)
    with counting(model) as seen:
        model.chat(query="where is it ?", image=picture(0), **GREEDY)
    assert seen["vision"] == 0 and seen["tokens"] < 30
    assert len(model.reuse._prefixes) == 1


# ------------------------------------------------------------------------------------------------------------ threads


def in_threads(calls):
    """Results of calls that start together, each in a thread of its own."""
    start = threading.Barrier(len(calls))

    def run(call):
        start.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def calls_of(model):
    """Calls of the public methods that are not alike; sampled ones by a seed."""
    seeds = {"max_new_tokens": 6, "num_beams": 1, "temperature": 2.0, "output_path": None}
    history = [("what is it ?", "rain")]
    return [
        lambda: model.chat(query="what is it ?", image=picture(0), **GREEDY),
        lambda: model.chat(query="and why ?", image=picture(0), history=history, **GREEDY),
        lambda: model.write_artical("write of rain", seed=3, max_new_tokens=8),
        lambda: model.write_artical("write of rain", seed=4, max_new_tokens=8),
        lambda: model.write_webpage("a page", seed=5, **seeds),
        lambda: model.screen_2_webpage("", [picture(1)], seed=6, **seeds),
        lambda: list(model.stream_chat(query="what is it ?", image=picture(0), **GREEDY)),
        lambda: model.batch_chat(None, ["what is it ?", "and why ?"], **GREEDY),
        lambda: model.chat(query="red", infer_mode="write", **GREEDY),
        lambda: model.generate(torch.tensor([[1, 20, 30]]), max_new_tokens=4, do_sample=False).tolist(),
    ]


def test_threads_get_what_each_gets_alone(model, folder, tiny_tokenizer):
    expected = [call() for call in calls_of(fresh(folder, tiny_tokenizer))]
    for _ in range(3):  # the first time, adapters are first used by all at once
        assert in_threads(calls_of(model)) == expected


def test_a_seed_is_deaf_to_other_threads(model):
    alone = model.write_artical("write of rain", seed=3, max_new_tokens=30)
    done = threading.Event()

    def draw():
        while not done.is_set():
            torch.rand(3)

    drawing = threading.Thread(target=draw)
    drawing.start()
    try:
        assert model.write_artical("write of rain", seed=3, max_new_tokens=30) == alone
    finally:
        done.set()
        drawing.join()


def streaming():
    return [thread for thread in threading.enumerate() if thread.name == "stream_chat"]


def endless(model):
    return model.stream_chat(query="go on", do_sample=False, max_new_tokens=3000, eos_token_id=-1)


class Box:
    """Holds an iterator in a reference cycle, as a caller's frame or handler may."""

    def __init__(self, stream):
        self.stream, self.me = stream, self


ABANDON = {
    "closed": lambda stream: stream.close(),
    "dropped": lambda stream: None,
    "dropped in a cycle": lambda stream: Box(stream) and None,
}


@pytest.mark.parametrize("how", ABANDON)
def test_an_abandoned_stream_lets_others_on(model, how):
    stream = endless(model)
    next(stream)
    ABANDON[how](stream)
    del stream
    gc.collect()
    assert not streaming()
    model.chat(query="hi", **GREEDY)


def test_a_stream_that_waits_for_its_turn_can_be_left(model):
    """Another thread's answer is under way and takes its time."""
    begun, go_on = threading.Event(), threading.Event()

    def slow(ids, scores, **_):
        begun.set()
        go_on.wait(20)
        return torch.ones(len(ids), dtype=torch.bool)

    other = threading.Thread(target=lambda: model.chat(query="hi", stopping_criteria=[slow], **GREEDY))
    other.start()
    begun.wait(20)
    stream = endless(model)
    reader = threading.Thread(target=lambda: next(stream, None))
    reader.start()
    while not any(thread.is_alive() for thread in streaming()):
        time.sleep(0.01)
    try:
        (worker,) = streaming()
        # What closing the iterator sets, from another thread than the one that waits in it.
        stream.gi_frame.f_locals["left"].set()
        worker.join(20)
        assert not worker.is_alive() and other.is_alive()
    finally:
        go_on.set()
        other.join()
        reader.join()


def test_merging_waits_and_refuses_other_modes(model):
    web = model.chat(query="a page", infer_mode="web", **GREEDY)
    begun, go_on = threading.Event(), threading.Event()

    def slow(ids, scores, **_):
        begun.set()
        go_on.wait(20)
        return torch.ones(len(ids), dtype=torch.bool)

    answers = []
    plain = model.chat(query="hi", do_sample=False, max_new_tokens=1)
    other = threading.Thread(
        target=lambda: answers.append(
            model.chat(query="hi", do_sample=False, max_new_tokens=1, stopping_criteria=[slow])
        )
    )
    other.start()
    begun.wait(20)
    threading.Timer(0.2, go_on.set).start()
    with model.merged_task_adapter("web"):
        assert not other.is_alive() or answers
        assert in_threads([lambda: model.chat(query="a page", infer_mode="web", **GREEDY)]) == [web]
        with pytest.raises(ValueError, match="merged into the weights"):
            in_threads([lambda: model.chat(query="hi", **GREEDY)])
    other.join()
    assert answers == [plain]


# ----------------------------------------------------------------------------------------------------- nothing stale


@contextmanager
def hooked(module, register, hook):
    handle = getattr(module, register)(hook)
    try:
        yield
    finally:
        handle.remove()


def zeroed(value):
    value.last_hidden_state = torch.zeros_like(value.last_hidden_state)
    return value


def zero_in_place(module, args, output):
    output.last_hidden_state.zero_()


def after_vision(model):
    return hooked(model.model.vision_tower, "register_forward_hook", lambda module, args, output: zeroed(output))


def after_vision_in_place(model):
    return hooked(model.model.vision_tower, "register_forward_hook", zero_in_place)


def before_layer(model):
    layer = model.model.language_model.layers[0].feed_forward
    return hooked(layer, "register_forward_pre_hook", lambda module, args: (-args[0], *args[1:]))


@contextmanager
def everywhere(model):
    norm = type(model.model.language_model.norm)
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * 2 if type(module) is norm else None
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def replaced(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def other_forward(model):
    norm = model.model.language_model.layers[0].ffn_norm
    forward = norm.forward
    norm.forward = lambda x: -forward(x)
    try:
        yield
    finally:
        del norm.forward


@contextmanager
def class_forward(model):
    """The class's method is another: as if a library had patched it."""
    kind = type(model.model.language_model.norm)
    forward = kind.forward
    with replaced(kind, "forward", lambda self, x: -forward(self, x)):
        yield


def by_index(model):
    """A hook that returns nothing and writes to what it is given."""

    def write(module, args):
        args[0][..., 0] = 3.0

    return hooked(model.model.language_model.layers[0].feed_forward, "register_forward_pre_hook", write)


@contextmanager
def written(tensor, write=lambda data: data[1].mul_(-3)):
    """A part of a weight changed as PyTorch does not count it."""
    before = tensor.data.clone()
    write(tensor.data)
    try:
        yield
    finally:
        tensor.data.copy_(before)


def decoder(model):
    return model.model.language_model


CHANGES = {
    "a hook on the vision tower": after_vision,
    "a hook that changes in place": after_vision_in_place,
    "a hook before a layer": before_layer,
    "a hook on every module": everywhere,
    "a hook that writes by index": by_index,
    "another forward": other_forward,
    "another forward of a class": class_forward,
    "partial LoRA's scale": lambda model: replaced(decoder(model).layers[0].attention.wo, "plora_scale", -9.0),
    "rope's base": lambda model: replaced(decoder(model).rotary_emb, "base", 7.0),
    "rope's range": lambda model: replaced(decoder(model).rotary_emb, "max_position", 16),
    "a norm's epsilon": lambda model: replaced(decoder(model).norm, "eps", 10.0),
    "the attention's scale": lambda model: replaced(decoder(model).layers[0].attention, "scaling", 3.0),
    "a row of the embedding": lambda model: written(model.get_input_embeddings().weight),
    "a row of a linear": lambda model: written(decoder(model).layers[0].attention.wqkv.linear.weight),
    "rows that change places": lambda model: written(
        decoder(model).layers[0].attention.wo.linear.weight, lambda data: data.copy_(data[[1, 0, *range(2, 64)]])
    ),
    "columns that change places": lambda model: written(
        decoder(model).layers[0].attention.wo.linear.weight, lambda data: data.copy_(data.roll(2, 1))
    ),
    "a row of partial LoRA": lambda model: written(decoder(model).layers[0].feed_forward.w2.Plora_B.weight),
    "a row of the projector": lambda model: written(model.vision_proj[2].weight),
    "a number of the newline": lambda model: written(model.model.plora_sub_GN.view(-1, 1)),
}


def hidden(model):
    """What the decoder makes of a conversation's last position: any change of what came before shows."""
    seen = []
    lm_head = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(args[0][0, -1].clone()))
    try:
        model.chat(query=f"look {MARK} here", image=[picture(0)], **GREEDY)
    finally:
        lm_head.remove()
    return torch.stack(seen[:1])


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_stale(model, change):
    before = hidden(model)
    with CHANGES[change](model):
        changed = hidden(model)
        with recomputing(model):
            torch.testing.assert_close(changed, hidden(model))
    assert change == "rope's range" or not torch.allclose(before, changed)
    torch.testing.assert_close(hidden(model), before)


class Switch:
    """Code in a model's way that can be switched from outside, between two calls."""

    def __init__(self):
        self.on = False

    def hook(self, module, args, output):
        return -output if self.on else None

    def writing_hook(self, module, args):
        if self.on:
            args[0].neg_()

    def forward(self, forward):
        return lambda *args, **kwargs: -forward(*args, **kwargs) if self.on else forward(*args, **kwargs)


def norm_of(model):
    return decoder(model).layers[0].ffn_norm


SWITCHED = {
    "a hook": lambda model, switch: hooked(norm_of(model), "register_forward_hook", switch.hook),
    "a hook before": lambda model, switch: hooked(norm_of(model), "register_forward_pre_hook", switch.writing_hook),
    "a forward": lambda model, switch: mock.patch.object(
        norm_of(model), "forward", switch.forward(norm_of(model).forward)
    ),
    "a class's forward": lambda model, switch: mock.patch.object(
        type(norm_of(model)), "forward", switch.forward(type(norm_of(model)).forward)
    ),
}


@pytest.mark.parametrize("what", SWITCHED)
def test_what_may_change_unseen_switches_reuse_off(model, what):
    switch = Switch()
    with SWITCHED[what](model, switch):
        before = hidden(model)
        switch.on = True
        changed = hidden(model)
        with recomputing(model):
            torch.testing.assert_close(changed, hidden(model))
        assert not torch.allclose(before, changed)
        assert model.reuse.nbytes() == 0
    hidden(model)
    held = model.reuse.nbytes()
    assert held > 0
    with SWITCHED[what](model, switch):
        hidden(model)
    assert model.reuse.nbytes() == held  # good again, now that it is gone


TOTALS = {"rows": 0}
CALLS = 0


def looking_hooks():
    """Hooks of any kind that only look on."""
    rows, seen = [], {"last": None, "shapes": []}

    def note(module, args, output):
        seen["last"] = args[0].detach().clone()
        seen["shapes"].append(tuple(args[0].shape))
        TOTALS["rows"] += args[0].shape[1] if args[0].ndim > 1 else 0

    def count(module, args, output):
        global CALLS
        CALLS += len(args)
        if args and args[0].isnan().any():
            print("NaN", args[0].mean())

    return {
        "a note": note,
        "a count": count,
        "a list": lambda module, args, output: rows.append(args[0].shape[0]),
    }


@pytest.mark.parametrize("name", looking_hooks())
def test_who_only_looks_on_loses_nothing(model, name):
    _, history = model.chat(query="what is it ?", image=picture(0), **GREEDY)
    with hooked(norm_of(model), "register_forward_hook", looking_hooks()[name]), counting(model) as seen:
        model.chat(query="and why ?", image=picture(0), history=history, **GREEDY)
    assert seen["vision"] == 0 and seen["tokens"] < 40


def quantised(folder, tokenizer, **settings):
    """The checkpoint by bitsandbytes, where it is installed."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    config = transformers.BitsAndBytesConfig(**settings)
    model = load(folder, quantization_config=config)
    model.tokenizer = tokenizer
    return model


STATES = {
    "4 bits": (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        lambda linear: linear.weight.quant_state.absmax,
    ),
    "8 bits": ({"load_in_8bit": True}, lambda linear: linear.state.SCB),
}


@pytest.mark.parametrize("bits", STATES)
def test_scales_of_quantised_weights(folder, tiny_tokenizer, bits):
    settings, scales = STATES[bits]
    model = quantised(folder, tiny_tokenizer, **settings)
    hidden(model)  # bitsandbytes puts its state in order in the first call
    before = hidden(model)
    with counting(model) as seen:
        hidden(model)
    assert seen["tokens"] < 30
    scale = scales(decoder(model).layers[0].attention.wqkv.linear)
    scale.data.copy_(scale.data.flip(0) // 2 if scale.dtype == torch.uint8 else scale.data.flip(0) * 2)
    changed = hidden(model)
    with recomputing(model):
        torch.testing.assert_close(changed, hidden(model))
    assert not torch.allclose(before, changed)


def test_offloaded_weights(folder, tiny_tokenizer):
    """Accelerate fetches them from a map for each call; what is written there counts."""
    accelerate = pytest.importorskip("accelerate")
    model = fresh(folder, tiny_tokenizer)
    before = hidden(model)
    linear = decoder(model).layers[0].attention.wo.linear
    kept = {"weight": linear.weight.detach().clone()}
    hook = accelerate.hooks.AlignDevicesHook("cpu", offload=True, weights_map=kept)
    accelerate.hooks.add_hook_to_module(linear, hook)
    assert linear.weight.is_meta
    torch.testing.assert_close(hidden(model), before)
    with counting(model) as seen:
        hidden(model)
    assert seen["tokens"] < 30
    kept["weight"].data[1].mul_(-3)
    changed = hidden(model)
    with recomputing(model):
        torch.testing.assert_close(changed, hidden(model))
    assert not torch.allclose(before, changed)


def test_a_weight_that_cannot_be_read_switches_reuse_off(model):
    class Sealed(torch.Tensor):
        @property
        def data(self):
            return self

    weight = decoder(model).layers[0].ffn_norm.weight
    sealed = torch.Tensor._make_subclass(Sealed, weight.detach().clone())
    decoder(model).layers[0].ffn_norm._parameters["weight"] = sealed
    model.chat(query="hi", **GREEDY)
    assert model.reuse.nbytes() == 0


def test_scales_of_peft(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["linear"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    before = hidden(model)
    for name, change in {
        "set_scale": lambda layer: layer.set_scale("default", 20.0),
        "scale_layer": lambda layer: layer.scale_layer(5.0),
        "unscale_layer": lambda layer: layer.unscale_layer(),
    }.items():
        for layer in wrapped.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                change(layer)
        changed = hidden(model)
        with recomputing(model):
            torch.testing.assert_close(changed, hidden(model), msg=name)
        assert not torch.allclose(before, changed)
        before = changed
    with peft.helpers.rescale_adapter_scale(model, 0.1):
        changed = hidden(model)
        with recomputing(model):
            torch.testing.assert_close(changed, hidden(model))
    with wrapped.disable_adapter(), counting(model) as seen:
        hidden(model)
    assert seen["tokens"] > 30


def test_what_cannot_be_reached_is_freed(model):
    for number in range(5):
        decoder(model).layers[0].attention.wo.linear.weight.data.mul_(1.1)
        model.vision_proj[0].weight.data.mul_(1.1)
        for mode in ("base", "web"):
            model.chat(query="what is it ?", image=picture(0), infer_mode=mode, **GREEDY)
        assert len(model.reuse._prefixes) == 2 and len(model.reuse._pictures) == 1, number
    model.get_input_embeddings().weight.data[1].mul_(1.1)  # that of the first token of every prompt
    model.chat(query="what is it ?", image=picture(0), **GREEDY)
    assert len(model.reuse._prefixes) == 1
    model.to(torch.bfloat16)
    assert model.reuse.nbytes() == 0


def test_embeddings_count_where_they_are_used(model, tiny_tokenizer):
    """Rows of the table that a conversation has no token of may change; of one that it answered with, they may not."""
    table = model.get_input_embeddings().weight
    with recording(model) as rows:
        _, history = model.chat(query="what is it ?", image=picture(0), **GREEDY)
    used = {*rows[0][0], *tiny_tokenizer(" ".join(history[0]) + " and why ?").input_ids}
    with counting(model) as seen:
        table.data[next(token for token in range(20, 900) if token not in used)].mul_(2)
        model.chat(query="and why ?", image=picture(0), history=history, **GREEDY)
    assert seen["tokens"] < 40
    model.reuse.clear()
    _, history = model.chat(query="what is it ?", image=picture(0), **GREEDY)
    with counting(model) as seen:
        table.data[rows[0][0][0]].mul_(2)
        model.chat(query="and why ?", image=picture(0), history=history, **GREEDY)
    assert seen["tokens"] > 60


def test_moving_to_where_it_is_loses_nothing(model):
    model.chat(query="what is it ?", image=picture(0), **GREEDY)
    held = model.reuse.nbytes()
    model.to(torch.float32).cpu()
    assert model.reuse.nbytes() == held > 0


# ------------------------------------------------------------------------------------------------------------ privacy


def saved(model):
    """As `torch.save` writes it: the code of a checkpoint's folder has a module of its own, which pickle finds."""
    file = io.BytesIO()
    torch.save(model, file)
    return file


COPIES = {
    "torch.save": lambda model: torch.load(io.BytesIO(saved(model).getvalue()), weights_only=False),
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_hold_no_conversation(model, how):
    plain = len(saved(model).getvalue())
    model.reuse.prefix_bytes = 1 << 28
    expected, history = model.chat(query="a secret of rain", image=picture(0), **GREEDY)
    assert model.reuse.nbytes() > 0
    assert abs(len(saved(model).getvalue()) - plain) < 2000
    other = COPIES[how](model)
    assert other.reuse.nbytes() == 0 and other.reuse.prefix_bytes == 1 << 28
    assert other.chat(query="a secret of rain", image=picture(0), **GREEDY) == (expected, history)
    assert other.compute_lock is not model.compute_lock
    assert model.reuse.nbytes() > 0


# ---------------------------------------------------------------------------------------------------------- fingerprint

TYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.float8_e4m3fn)
SHAPES = ((1,), (7,), (3, 5), (64, 64), (513, 1023), (600, 1024))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("start", [0, 1], ids=["aligned", "amid a storage"])
def test_every_element_counts(dtype, shape, start):
    numbers = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 2, (start + math.prod(shape),), dtype=torch.uint8, generator=numbers)
    tensor = bits.to(dtype)[start:].view(shape)
    before = content_of([tensor])
    assert before == content_of([tensor]) == content_of([tensor.clone()])
    raw = tensor.view(-1).view(torch.uint8)
    for at in (0, len(raw) // 2, -1):
        raw[at] ^= 1
        assert content_of([tensor]) != before, at
        raw[at] ^= 1
    if tensor.ndim > 1 and len(tensor) > 3:
        other = bits.to(dtype)[start:].view(shape)
        other[[0, 1]] = other[[1, 0]]
        assert content_of([other]) != before

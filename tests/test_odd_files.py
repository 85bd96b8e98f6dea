# ruff: noqa: E501 - tables
"""Pages written where they may be; numbers of fine-tuning and tokenizers of other models refused by name."""

import stat

import pytest

from xcomposer.finetune.run import Settings
from xcomposer.model import webpage_internlm_xcomposer2 as web


def test_a_link_is_followed_and_mode_bits_stay(tmp_path):
    real, link = tmp_path / "real.html", tmp_path / "link.html"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    web.write_page("new", web.page_path("x", link))
    assert link.is_symlink() and real.read_text() == "new" and stat.S_IMODE(real.stat().st_mode) == 0o640


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_page_that_cannot_be_written_is_not_lost(tmp_path, monkeypatch, stop):
    path = web.page_path("x", tmp_path / "page.html")

    def fail(self, *args, **kwargs):
        raise stop

    monkeypatch.setattr(web.Path, "write_text", fail)
    with pytest.raises(KeyboardInterrupt if stop is KeyboardInterrupt else web.PageNotWrittenError) as caught:
        web.write_page("<p>the page</p>", path)
    assert stop is KeyboardInterrupt or (
        caught.value.html == "<p>the page</p>" and "No space left" in str(caught.value)
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("html, wanted", [
    ("a{background:url(https://source.unsplash.com/random/1600x900/?b)}</style><h1>T</h1>", "a{background:url(https://picsum.photos/1600/900)}</style><h1>T</h1>"),
    ('<img src="https://source.unsplash.com/random/30x20/?modern office">', '<img src="https://picsum.photos/30/20">'),
    ("<img src=https://source.unsplash.com/random/3x2/?cat><p>'x'</p>", "<img src=https://picsum.photos/3/2><p>'x'</p>"),
    ('<img src="https://source.unsplash.com/random/3x2/?cat><p>never closed', '<img src="https://picsum.photos/3/2><p>never closed'),
    ("https://source.unsplash.com/random/ax2/?cat", "https://source.unsplash.com/random/ax2/?cat"),
])  # fmt: skip
def test_addresses_of_pictures_end_where_they_end(html, wanted):
    assert web.real_pictures(html) == wanted


# --------------------------------------------------------------------------------------------------------- fine-tuning


@pytest.mark.parametrize("name", ["hd_num", "num_frm", "max_length", "lora_rank", "lora_alpha", "task_rank"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True, "3", float("nan")])
def test_numbers_of_a_run_are_checked_where_they_are_read(name, value):
    with pytest.raises(ValueError, match=f"--{name} is"):
        Settings(model="m", data="d", **{name: value})


@pytest.mark.parametrize("value", [-0.1, 1, 5, float("nan")])
def test_dropout_of_a_run(value):
    with pytest.raises(ValueError, match="--lora_dropout is"):
        Settings(model="m", data="d", lora_dropout=value)


# ---------------------------------------------------------------------------------------------------------- tokenizers


def other_tokenizer(**special):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "hello": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", **special)


def test_another_models_tokenizer_is_refused(tiny_model, tiny_tokenizer):
    far = other_tokenizer()
    far.add_tokens([f"word{n}" for n in range(tiny_model.config.vocab_size)])
    far.add_tokens(["[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]"])
    for tokenizer in (other_tokenizer(), far):
        with pytest.raises(ValueError, match="another model's"):
            tiny_model.chat(tokenizer, "hello", max_new_tokens=1)
    tiny_model.chat(tiny_tokenizer, "hello", max_new_tokens=1)

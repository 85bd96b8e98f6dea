"""Tokenizers of other models: refused by name."""

import pytest


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

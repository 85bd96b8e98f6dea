"""A server on the demo checkpoint for all tests of this folder."""

import pytest
from conftest import CLOSE, REPO, load
from transformers import AutoTokenizer


@pytest.fixture(scope="package")
def demo():
    folder = REPO / "demo"
    model = load(folder)
    model.tokenizer = AutoTokenizer.from_pretrained(folder)
    return model


@pytest.fixture(scope="package")
def server(demo):
    from .running import Server  # here, so that what it needs may be missing

    server = Server(demo)
    yield server
    server.close()


@pytest.fixture(scope="package")
def endless(demo):
    """Fields of a request whose answer ends at max_tokens only."""
    ids = (demo.tokenizer.eos_token_id, demo.tokenizer.convert_tokens_to_ids(CLOSE))
    return {"logit_bias": {str(token): -100 for token in ids}}

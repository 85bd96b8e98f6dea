"""What several test files share: offline caches of their own, tiny checkpoints, and the recorded golden cases."""

import atexit
import copy
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

# Before transformers is imported: no network, and neither the user's caches nor an earlier run's modules.
_CACHE = tempfile.mkdtemp(prefix="ixc-tests-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ.update(
    HF_HOME=_CACHE,
    HF_MODULES_CACHE=str(Path(_CACHE) / "modules"),
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tiny tensors lose time on more
for _name in ("TRANSFORMERS_CACHE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
    os.environ.pop(_name, None)

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModel, AutoTokenizer  # noqa: E402

REPO = Path(__file__).resolve().parents[1]
GOLDEN = REPO / "tests" / "golden"
sys.path.insert(0, str(REPO))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))  # of subprocesses

from xcomposer.checkpoints import tiny  # noqa: E402

OPEN, CLOSE, MARK = "[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]", "<ImageHere>"
BOS_ID, EOS_ID, CLOSE_ID = 1, 2, 92542

# Pieces of the mixed training batch: train_cases.json records its loss; these are their ids in the released vocabulary.
TRAIN_PIECES = {
    f"{OPEN}user\nwhat is it?{CLOSE}\n{OPEN}assistant\na picture{CLOSE}\n</s>": [
        92543, 1008, 364, 12706, 505, 563, 345, 92542, 364, 92543, 525, 11353, 364, 264, 6953, 92542, 364, 2,
    ],
    f"{OPEN}user\nImage1 ": [92543, 1008, 364, 2056, 312, 262],
    "; Image2 ": [329, 4816, 314, 262],
    f"; compare{CLOSE}\n{OPEN}assistant\nThey differ.{CLOSE}\n"
    f"{OPEN}user\nwhy?{CLOSE}\n{OPEN}assistant\ncolour{CLOSE}\n</s>": [
        329, 9557, 92542, 364, 92543, 525, 11353, 364, 7017, 1897, 281, 92542, 364, 92543, 1008, 364, 34653, 345, 92542,
        364, 92543, 525, 11353, 364, 46743, 92542, 364, 2,
    ],
}  # fmt: skip


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="of the tests named on_device")
    parser.addoption("--attention", default="sdpa", help="of the tests named on_device")
    parser.addoption("--static", action="store_true", help="a static cache in the tests named on_device")
    parser.addoption("--remote-code", action="store_true", help="load by trust_remote_code, not by the package")


def pytest_configure(config):
    if config.getoption("--remote-code"):
        sys.modules["xcomposer.register"].belongs = lambda *_: False  # the Auto classes as without the package
    config.addinivalue_line("markers", "slow: takes over 20 seconds (leave out with -m 'not slow')")


def read_golden(name):
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def golden_prompt(case):
    """The prompt of a recorded chat, written out here once more so that the code's own is measured against it."""
    past = "".join(
        f"{OPEN}user\n{asked}{CLOSE}\n{OPEN}assistant\n{said}{CLOSE}\n"
        for asked, said in case["kwargs"].get("history", [])
    )
    system = (
        f"{OPEN}system\n{read_golden('system_prompt.json')['chat']}{CLOSE}\n" if case["kwargs"].get("use_meta") else ""
    )
    return f"{system}{past}{OPEN}user\n{case['query']}{CLOSE}\n{OPEN}assistant\n"


class Encoding(dict):
    def __init__(self, input_ids):
        super().__init__(input_ids=input_ids)
        self.input_ids = input_ids


class RecordedTokenizer:
    """Stands in for the released vocabulary: knows the texts of the golden cases alone, by their recorded ids."""

    bos_token_id, eos_token_id, pad_token_id = BOS_ID, EOS_ID, EOS_ID

    def __init__(self):
        self.pieces = dict(TRAIN_PIECES)
        self.texts = {}
        self.decoded = []  # ids of each `decode`
        for case in read_golden("chat_cases.json"):
            text = golden_prompt(case)
            pieces = text.split(MARK) if MARK in text else [*[""] * len(case["images"]), text]
            for number, (piece, ids) in enumerate(zip(pieces, case["piece_ids"], strict=True)):
                assert number or ids[0] == BOS_ID
                self.pieces[piece] = ids[1:] if number == 0 else ids
            self.texts[tuple(case["output_ids"])] = case["response"]
        batch = read_golden("train_cases.json")["text"]
        for text, ids in zip(batch["texts"], batch["input_ids"], strict=True):
            self.pieces[text] = ids[1 : ids.index(EOS_ID) + 1]
        self.pieces[f"{OPEN}assistant\n"] = [92543, 525, 11353, 364]

    def __call__(self, text, add_special_tokens=True, return_tensors=None):
        ids = [BOS_ID] * add_special_tokens + (self.pieces[text] if text else [])
        return Encoding(torch.tensor([ids]) if return_tensors == "pt" else ids)

    def convert_tokens_to_ids(self, token):
        return {"<s>": BOS_ID, "</s>": EOS_ID, CLOSE: CLOSE_ID, OPEN: CLOSE_ID + 1}[token]

    def decode(self, ids, skip_special_tokens=False):
        ids = [int(token) for token in ids]
        self.decoded.append(ids)
        return self.texts.get(tuple(ids), " ".join(map(str, ids)))


def load(folder, **kwargs):
    return AutoModel.from_pretrained(folder, trust_remote_code=True, **kwargs).eval()


@pytest.fixture(scope="session")
def on_device(request, golden_checkpoint):
    """The recorded tiny model where and how the command line says; `benchmarks/gpu.py` asks for it."""
    attention = request.config.getoption("--attention")
    dtype = torch.bfloat16 if attention.startswith("flash") else torch.float32  # flash attention knows no fp32
    model = load(golden_checkpoint, attn_implementation=attention, dtype=dtype)
    if request.config.getoption("--static"):
        model.generation_config.cache_implementation = "static"
    return model.to(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def golden_checkpoint(tmp_path_factory):
    """The recorded tiny model in the released layout."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("golden") / "IXC-2.5 golden v1.0", vocab_size=92544)


@pytest.fixture(scope="session")
def golden_model(golden_checkpoint):
    return load(golden_checkpoint)


@pytest.fixture(scope="session")
def golden_tokenizer():
    return RecordedTokenizer()


@pytest.fixture(scope="session")
def released_tokenizer(golden_checkpoint, tmp_path_factory):
    """The released vocabulary through the repo's tokenizer; skips without it."""
    model = os.environ.get("IXC_TOKENIZER_MODEL")
    if not model:
        pytest.skip("IXC_TOKENIZER_MODEL does not name the released tokenizer.model")
    folder = tmp_path_factory.mktemp("released") / "tokenizer"
    folder.mkdir()
    for file in ("config.json", "tokenizer_config.json", *(path.name for path in golden_checkpoint.glob("*.py"))):
        shutil.copyfile(golden_checkpoint / file, folder / file)
    shutil.copyfile(model, folder / "tokenizer.model")
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A tiny checkpoint with a small vocabulary and the code beside it."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("tiny") / "IXC-2.5 tiny v1.0")


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_checkpoint):
    return AutoTokenizer.from_pretrained(tiny_checkpoint, trust_remote_code=True)


@pytest.fixture
def tiny_model(_tiny_model, tiny_tokenizer):
    """The tiny model as its users hold it; what a test sets on it is put back."""
    _tiny_model.tokenizer = tiny_tokenizer
    return _tiny_model.eval()


@pytest.fixture(scope="session")
def _tiny_model(tiny_checkpoint):
    return load(tiny_checkpoint)


@pytest.fixture
def model(tiny_model):
    """The tiny model with nothing kept; its generation settings are put back."""
    config = copy.deepcopy(tiny_model.generation_config)
    tiny_model.reuse.clear()
    yield tiny_model
    tiny_model.generation_config = config
    tiny_model.reuse.clear()


@pytest.fixture
def ids():
    """A prompt of text alone (1, 40)."""
    return torch.randint(300, 900, (1, 40), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def no_compute(tiny_model, monkeypatch):
    """The tiny model, where any computation is a failure."""

    def computed(*args, **kwargs):
        pytest.fail("computed something before the arguments were checked")

    for module in (tiny_model.model.vision_tower, tiny_model.model.language_model, tiny_model.model.vision_proj):
        monkeypatch.setattr(module, "forward", computed)
    monkeypatch.setattr(tiny_model, "generate", computed)
    return tiny_model

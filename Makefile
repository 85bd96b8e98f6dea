PYTHON ?= python3
TRANSFORMERS ?= 5.23.0
VENV ?= .venv
PIP = $(VENV)/bin/pip --disable-pip-version-check -q
VLLM_VENV ?= .venv-vllm
LMMS_VENV ?= .venv-lmms
MODEL ?= demo
IMAGE ?= demo/pictures/shapes.png
TEXT ?= What colour is the star?
CORE = tests/test_golden.py tests/test_loading.py tests/test_offline.py tests/test_public_clients.py tests/test_tokenizer.py
FAMILY = tests/test_family.py tests/test_kinds.py tests/test_reward.py tests/test_packed_weights.py

.PHONY: chat studio test test-compat test-vllm test-lmms test-clients test-studio gpu lint clean

# torch first, by exact version: a range would bring the CUDA build to machines without a card.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install torch==2.13.0
	$(PIP) install transformers==$(TRANSFORMERS) -e .[video]
	touch $@

$(VENV)/studio: $(VENV)/installed
	$(PIP) install -e .[studio]
	touch $@

$(VENV)/ready: $(VENV)/installed
	$(PIP) install transformers==$(TRANSFORMERS) -e .[test]
	touch $@

# What the tests of loading, of recorded cases and of the family use: not the web app's packages, nor trl's.
$(VENV)/core: $(VENV)/installed
	$(PIP) install transformers==$(TRANSFORMERS) -e .[video,train,quantise,serve] pytest
	touch $@

## Ask about a picture, then keep asking: make chat MODEL=folder IMAGE=photo.jpg TEXT="What is this?"
chat: $(VENV)/installed
	@$(VENV)/bin/xcomposer chat --model $(MODEL) --image $(IMAGE) --text "$(TEXT)" --greedy --stay

## The web app: make studio MODEL=folder
studio: $(VENV)/studio
	@$(VENV)/bin/xcomposer studio --model $(MODEL)

## All tests, on one version of transformers.
test: $(VENV)/ready
	$(VENV)/bin/python -m pytest tests

## Loading and parity on another version, by the package and by remote code: make test-compat TRANSFORMERS=5.16.1
test-compat:
	$(MAKE) VENV=.venv-$(TRANSFORMERS) TRANSFORMERS=$(TRANSFORMERS) .venv-$(TRANSFORMERS)/core
	.venv-$(TRANSFORMERS)/bin/python -m pytest $(CORE) $(FAMILY) tests/test_package.py
	.venv-$(TRANSFORMERS)/bin/python -m pytest $(CORE) $(FAMILY) --remote-code

$(VLLM_VENV)/ready: tests/on_vllm/install.py pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python tests/on_vllm/install.py
	touch $@

## vLLM gives the tokens that transformers gives; in an environment of its own, 3.5 GB.
test-vllm: $(VLLM_VENV)/ready
	$(VLLM_VENV)/bin/python -m pytest tests/on_vllm

$(LMMS_VENV)/ready: tests/on_lmms/install.py pyproject.toml
	$(PYTHON) -m venv $(LMMS_VENV)
	$(LMMS_VENV)/bin/python tests/on_lmms/install.py
	touch $@

## lmms-eval finds this model and scores the toy world as its own examination does; in an environment of its own, 1 GB.
test-lmms: $(LMMS_VENV)/ready
	$(LMMS_VENV)/bin/python -m pytest tests/on_lmms

## ms-swift, lm-eval and lmms-eval as published, on the demo; an environment each in .venv-clients, 1.7 to 2 GB.
test-clients:
	$(PYTHON) tests/clients/run.py $(CLIENTS)

## The web app in a browser (Debian's chromium; skipped with a line where there is none).
test-studio: $(VENV)/ready
	$(VENV)/bin/python -m pytest tests/studio

## Golden cases and the release's sizes on a card: make gpu (--device cpu --preset tiny goes the same way without one)
gpu: $(VENV)/ready
	$(VENV)/bin/python benchmarks/gpu.py $(GPU)

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

clean:
	rm -rf .venv .venv-* build

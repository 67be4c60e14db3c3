# Every target sets up what it needs by itself: a virtual environment in .venv with the constrained torch.
PYTHON ?= python3
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
BIN := .venv/bin

.PHONY: demo test lint validate bench bench-collect bench-examples bench-llm bench-scores oracles train train-recurrent recurrent setup clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/exegete demo --out runs/demo

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Re-make the embedded default's models (two cores: under three hours; resumes where it was stopped).
WORK := training/out
train: setup
	$(BIN)/python training/bpe.py $(WORK)/tokenizer
	$(BIN)/python training/lm.py --tokenizer $(WORK)/tokenizer --out $(WORK)/lm
	cp $(WORK)/tokenizer/tokenizer.json $(WORK)/tokenizer/tokenizer_config.json $(WORK)/lm/hf
	$(BIN)/python training/coders.py --model $(WORK)/lm/hf --out $(WORK)/coders
	$(BIN)/python training/card.py --work $(WORK) --assets src/exegete/demo/assets

# The recurrent demo's Mamba and coder, on the tokenizer that ships (two cores: an hour).
DEMO := src/exegete/demo/assets
train-recurrent: setup
	$(BIN)/python training/lm.py --architecture mamba --tokenizer $(DEMO)/model --out $(WORK)/recurrent/lm --steps 2400 --batch 4096
	cp $(DEMO)/model/tokenizer.json $(DEMO)/model/tokenizer_config.json $(WORK)/recurrent/lm/hf
	$(BIN)/python training/coders.py --model $(WORK)/recurrent/lm/hf --out $(WORK)/recurrent/coders --width 1536 --steps 1500
	$(BIN)/python training/card.py --work $(WORK)/recurrent --assets $(DEMO)/recurrent

# Every scorer on latents of known truth: the page of the documentation.
validate: setup
	$(BIN)/exegete validate --scorers all --page docs/validation.md

# What intervals cover and what judging in rounds saves, over simulated latents (half an hour on two cores).
bench-scores: setup
	$(BIN)/python -m benchmarks.coverage
	$(BIN)/python -m benchmarks.population
	$(BIN)/python -m benchmarks.sequential --save

# The studies of recurrent models and their page (two cores: under half an hour; goes on where it was stopped).
recurrent: setup
	$(BIN)/python -m studies.recurrent

bench: setup
	$(BIN)/python benchmarks/rules.py
	$(BIN)/python -m benchmarks.same_numbers

# The peer that collecting is measured beside, in an environment of its own; without it the benchmark prints the rest.
PEER := .bench/delphi
$(PEER)/ready: benchmarks/requirements-delphi.txt constraints.txt
	test -x $(PEER)/bin/python || $(PYTHON) -m venv $(PEER)
	$(PEER)/bin/python -m pip install --quiet torch
	$(PEER)/bin/python -m pip install --quiet --requirement benchmarks/requirements-delphi.txt
	$(PEER)/bin/python -m pip install --quiet --no-deps eai-delphi==0.1.3 eai-sparsify==1.3.3
	touch $@

bench-collect: setup
	-$(MAKE) $(PEER)/ready
	$(BIN)/python -m benchmarks.collect

bench-examples: setup
	-$(MAKE) $(PEER)/ready
	$(BIN)/python -m benchmarks.examples

bench-llm: setup
	-$(MAKE) $(PEER)/ready
	$(BIN)/python -m benchmarks.llm

# What libraries that cannot live beside exegete compute, written down as fixtures: each in an environment of its own.
ORACLE := .oracles/dictionary_learning
$(ORACLE)/ready: constraints.txt
	test -x $(ORACLE)/bin/python || $(PYTHON) -m venv $(ORACLE)
	$(ORACLE)/bin/python -m pip install --quiet torch numpy einops tqdm
	$(ORACLE)/bin/python -m pip install --quiet --no-deps dictionary-learning==0.1.0
	touch $@

STEERING := .oracles/steering
$(STEERING)/ready: constraints.txt
	test -x $(STEERING)/bin/python || $(PYTHON) -m venv $(STEERING)
	$(STEERING)/bin/python -m pip install --quiet torch repeng==0.4.0 steering-vectors==0.12.2
	touch $@

oracles: setup $(ORACLE)/ready $(PEER)/ready $(STEERING)/ready
	$(ORACLE)/bin/python tests/oracles/write_dictionary_learning.py
	$(BIN)/python tests/oracles/write_delphi.py $(PEER)/bin/python
	$(STEERING)/bin/python tests/oracles/write_steering.py

clean:
	rm -rf .venv runs

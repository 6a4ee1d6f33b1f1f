# Every target works on a bare machine with Python 3.11+: it makes .venv and installs pinned packages first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEER := $(VENV)/.peer
EXTRAS := train,sim,convert,ray,view,dev
# A peer in parity tests and benchmarks; the project never imports it. Where pip would fetch a build for GPUs, install the
# CPU build of this version into .venv first.
TORCH := torch==2.13.0

# Processes that share the tests out; each needs about 7 GB.
WORKERS := 2

.DEFAULT_GOAL := help
.PHONY: help install system demo test check format lint types contracts wheel-test bench soak test-next constraints clean

help:  ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(READY)  ## Make .venv with pinned dependencies

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $(READY)

$(PEER): $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH)
	@touch $(PEER)

system:  ## Install or name the system packages for rendering
	@sh tools/system_packages.sh

demo: $(READY)  ## The main job: images and words to an action chunk, and the action tokenizer, with pictures
	@mkdir -p out/demo
	$(BIN)/rdt2 infer fm --random-weights tiny --instruction "Pick up the apple." --plot out/demo/chunk.png
	$(BIN)/python examples/tokenizer_demo.py --out out/demo

test: $(PEER) system  ## Run the tests
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile -m "not slow"

check: $(READY) format lint types contracts test wheel-test  ## Format, lint, types, import contracts, tests: what CI runs

format: $(READY)
	$(BIN)/ruff format --check .

lint: $(READY)
	$(BIN)/ruff check --output-format=concise .

types: $(READY)
	$(BIN)/basedpyright

contracts: $(READY)
	$(BIN)/lint-imports --no-cache

wheel-test: $(READY)  ## Build the wheel and use it, and the editable install, from another folder
	sh tools/wheel_test.sh $(abspath $(BIN)/python)

bench: $(PEER)  ## Speed against torch, transformers and webdataset with the same work and threads
	$(BIN)/python benchmarks/action_tokenizer.py
	$(BIN)/python benchmarks/qwen2_5_vl.py
	$(BIN)/python benchmarks/policies.py
	$(BIN)/python benchmarks/data.py

soak: $(PEER)  ## Long tests, among them training the tokenizer from scratch to its stated quality
	$(BIN)/python -m pytest -q -m slow

# The first Python 3.12 or newer that runs: on the path, or installed by pyenv.
PYTHON_NEXT ?= $(shell for p in python3.12 python3.13 $(HOME)/.pyenv/versions/3.1[2-9]*/bin/python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$p && break; done)
test-next:  ## The fast suite on Python 3.12 and the newest jax
	@test -n "$(PYTHON_NEXT)" || { echo "no Python 3.12 found: make test-next PYTHON_NEXT=/path/to/python3.12"; exit 1; }
	$(PYTHON_NEXT) -m venv .venv-next
	.venv-next/bin/pip install --quiet --disable-pip-version-check --upgrade -e '.[$(EXTRAS)]'
	.venv-next/bin/python -m pytest -q -n $(WORKERS) --dist loadfile -m 'not slow and not torch_peer'

constraints: $(READY)  ## Pin what is installed now
	$(BIN)/pip freeze --exclude-editable | sed -E 's/^(torch==[0-9.]+)\+.*/\1/' | grep -vE '^(pip|setuptools)==' > constraints.txt

clean:  ## Remove what the targets made
	rm -rf $(VENV) .venv-next build dist out runs

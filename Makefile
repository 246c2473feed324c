PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test lint bench

demo: .venv/installed  ## O2SAC from a TD3+BC policy at its plateau, both of which ship, beside the naive switch
	$(BIN)/python o2sac.py --preset demo

test: .venv/developed  ## tests, side by side; those of a file share runs and stay together; a process that dies ends all
	$(BIN)/python -m pytest -q -n auto --dist loadfile --max-worker-restart 0

lint: .venv/developed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/installed  ## steps per second of every stage on this machine
	$(BIN)/python benchmarks/steps.py

.venv/installed: requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --upgrade pip
	$(BIN)/pip install -r requirements.txt -c constraints.txt
	$(BIN)/pip install --no-deps d4rl==1.1
	touch $@

.venv/developed: .venv/installed requirements-experiments.txt requirements-dev.txt
	$(BIN)/pip install -r requirements.txt -r requirements-experiments.txt -r requirements-dev.txt -c constraints.txt
	touch $@

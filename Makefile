# Two commands: `make demo` and `make test`. Both make their own virtual environment in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: demo test slow lint bench random clean

demo: $(STAMP)
	$(BIN)/python examples/minilm.py

# Two processes of one thread: two of two threads each would wait for each other's.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/pip install -q ".[bench]"
	$(BIN)/python benchmarks/linear.py

random: $(STAMP)
	$(BIN)/python benchmarks/random_models.py -o benchmarks/results/random_models.md

$(STAMP): pyproject.toml CMakeLists.txt $(wildcard native/*) examples/data.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e ".[dev]"
	$(BIN)/python -m pip install -q --no-deps -r examples/data.txt
	touch $(STAMP)

clean:
	rm -rf $(VENV) build out

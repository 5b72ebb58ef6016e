PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# a test file per core at a time, with one thread each
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile
INSTALLED := $(VENV)/.installed

.PHONY: help demo test test-slow bench clean

help:
	@echo "make demo       draw a data set, train a teacher, cache it, train a student with and without distillation"
	@echo "make test       ruff, mypy and the tests that take seconds"
	@echo "make test-slow  the tests that take minutes"
	@echo "make bench      list the benchmarks"
	@echo "make clean      delete $(VENV)"

$(INSTALLED): pyproject.toml
	.ci/setup "$(PYTHON)" "$(VENV)"
	@touch $@

demo: $(INSTALLED)
	$(BIN)/kdpipe demo

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST)

test-slow: $(INSTALLED)
	$(PYTEST) -m slow

bench:
	@for file in tests/benchmarks/*.py; do printf '%s\n    %s\n' "$$file" "$$(sed -n '1s/"""//gp' "$$file")"; done

clean:
	rm -rf "$(VENV)"

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Tests write many small files and wait for the disk to have them: a disk in memory, where there is one with room, has
# them at once. Containers often have one of 64 MB, which is left alone.
MEMORY := $(shell [ -w /dev/shm ] && [ "$$(df -Pm /dev/shm | awk 'END { print $$4 }')" -ge 4096 ] && echo /dev/shm)
# a test file per core at a time, with one thread each; files keep the fixtures that their tests share
PYTEST := $(if $(MEMORY),TMPDIR=$(MEMORY)) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile
INSTALLED := $(VENV)/.installed

.PHONY: help demo test test-slow test-gpu docs bench clean

help:
	@echo "make demo       cache a teacher that comes with kdpipe, train a student with and without it, compare, report"
	@echo "make test       ruff, mypy and the tests that take seconds"
	@echo "make test-slow  the tests that take minutes"
	@echo "make test-gpu   the tests that need a CUDA device"
	@echo "make docs       the documentation as a site, in site/; any warning is an error"
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

test-gpu: $(INSTALLED)
	$(PYTEST) -m cuda -n 4 -rs

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

bench:
	@for file in tests/benchmarks/*.py; do printf '%s\n    %s\n' "$$file" "$$(sed -n '1s/"""//gp' "$$file")"; done

clean:
	rm -rf "$(VENV)"

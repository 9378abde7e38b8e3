# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test long bench lint stubs clean

demo: .venv/demo-ready
	@$(BIN)/snapctl demo

test: .venv/test-ready lint
	$(BIN)/pytest -n 2 --dist worksteal

# The same tests with more seeds, for hours rather than minutes.
long: .venv/test-ready
	SNAPD_CRASH_SCALE=50 SNAPD_KILL_SEEDS=100 \
		$(BIN)/pytest -n 2 --dist worksteal --timeout 0 tests/crash tests/e2e/test_service_kills.py
	SNAPD_KILLS=200 $(BIN)/pytest --timeout 0 -rP tests/e2e/test_device_storms.py
	SNAPD_FUZZ_FILES=1000000 $(BIN)/pytest -n 2 --dist worksteal --timeout 0 -rP tests/fuzz/test_fuzz.py -k mutated

# Figures, in interleaved runs with their spread; both need e2fsprogs, the first fio, qemu and nbdkit too.
bench: .venv/test-ready
	$(BIN)/python tests/bench/bench_device.py
	$(BIN)/python tests/bench/bench_cow.py

lint: .venv/test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

stubs: .venv/test-ready
	$(BIN)/python protos/generate.py

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "snapd needs Python 3.11 or newer; name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' \
		|| { echo "snapd needs Python's venv module (Debian: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/demo-ready: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	@touch $@

.venv/test-ready: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

# Two commands set up everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3.11
VENV   ?= .venv
BIN     = $(VENV)/bin
# The demo and the tests run on the CPU; these keep libraries from calling home.
export RAY_USAGE_STATS_ENABLED = 0
export MLFLOW_DISABLE_TELEMETRY = true

.PHONY: demo test check unit soak install clean

demo: install
	$(BIN)/python -m jobs.demo

test: check unit

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Two at a time, since much of a test is waiting, for Ray to start or a process to end; threads that wait do not spin.
unit: install
	OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=3000 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=10

# Kills, full disks and lost servers in the midst of all stages, most of an hour; docs/faults.md tells of the log.
soak: install
	bash -o pipefail -c 'nice $(BIN)/pytest tests/soak | tee tests/soak/log.txt'

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo-workspace

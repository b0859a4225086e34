# Each target does its own set-up: a virtual environment in .venv, then `sandbox-kernel setup`, which
# finds out what is missing and does nothing when nothing is.

PYTHON ?= python3
BIN := .venv/bin
FUZZ_SECONDS ?= 60
ATTACKS := bomb or small and messages or comm and flood or SIGSTOP or stdin or wrong or panic or index or JSON
APT := DEBIAN_FRONTEND=noninteractive apt-get

.PHONY: help env setup demo test lint unit vm attacks conformance bench fuzz adversarial lab lab-tools lab-smoke \
    lab-shell lab-versions lab-bench leftovers clean

help:
	@echo "make demo         run notebooks/hello.ipynb in a micro-VM"
	@echo "make test         everything CI runs: lint, types, layers, unit, VM, quick conformance, the lab's smoke set"
	@echo "make conformance  the suites of Jupyter's own projects against the micro-VM"
	@echo "make bench        plain ipykernel and the micro-VM side by side, and how many fit (15 minutes)"
	@echo "make adversarial  attacks from inside a VM, beside a neighbour; writes docs/limits.md's table"
	@echo "make fuzz         long property runs, and a coverage-guided fuzzer, of what parses a guest's bytes"
	@echo "make lab          the tests of VMs with KVM and the kernel's vsock, in an emulated machine that has both"
	@echo "make lab-shell    a shell in there; lab-smoke, lab-versions, lab-bench: see README"

env: .venv/.installed
.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "$(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12 …"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { [ "$$(id -u)" = 0 ] && \
	    $(APT) update -q && $(APT) install -q -y --no-install-recommends python3-venv; } || \
	    { echo "Python's venv module is missing: sudo apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

setup: env
	$(BIN)/sandbox-kernel setup

demo: setup
	$(BIN)/jupyter nbconvert --to notebook --execute --ExecutePreprocessor.kernel_name=python3-microvm \
	    --output-dir .cache notebooks/hello.ipynb
	$(BIN)/python notebooks/show.py .cache/hello.ipynb

# The lab's tools come first, as a test of VMs needs one of them, too.
test: lint unit lab-tools vm attacks
	$(BIN)/python -m tests.conformance --quick
	$(MAKE) --no-print-directory leftovers
	$(MAKE) --no-print-directory lab-smoke

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: setup
	$(BIN)/python -m pytest tests/unit tests/relay tests/fuzz tests/files

vm: setup
	$(BIN)/python -m pytest tests/vm tests/network

conformance: setup
	$(BIN)/python -m tests.conformance

bench: setup
	$(BIN)/python -m bench --trace
	$(BIN)/python -m bench.density --picture docs/density.png

# A few of what `adversarial` has, without a neighbour whom everything else on this machine would disturb.
attacks: setup
	$(BIN)/python -m pytest tests/adversarial --alone -k "restored and ($(ATTACKS))"

# The table of docs/limits.md is what this has seen.
adversarial: setup
	$(BIN)/python -m pytest tests/adversarial --limits-table docs/limits.md

fuzz: env
	$(BIN)/python -m pytest -m fuzz tests/fuzz
	$(BIN)/python -m tests.fuzz all --seconds $(FUZZ_SECONDS)

lab-tools: setup
	@command -v faketime >/dev/null || { [ "$$(id -u)" = 0 ] && \
	    $(APT) install -q -y --no-install-recommends faketime; } || \
	    { echo "faketime is missing: sudo apt-get install faketime"; exit 1; }

lab: lab-tools
	$(BIN)/python -m tests.lab

lab-smoke lab-shell lab-bench: lab-tools
	$(BIN)/python -m tests.lab --suite $(@:lab-%=%)

lab-versions: lab-tools
	$(BIN)/python -m tests.lab --suite versions --debian bookworm --output .cache/lab/bookworm
	$(BIN)/python -m tests.lab --suite versions --debian trixie --output .cache/lab/trixie

# What a clean-up has missed is a failure of the suite.
leftovers:
	@if pgrep -f '[q]emu-system-x86_64 .*-sandbox'; then echo "A QEMU outlived its client."; exit 1; fi
	@$(BIN)/python -c 'from sandbox_kernel.paths import runtime_dir; import sys; \
	    left = list(runtime_dir().iterdir()); sys.exit(f"Left in the runtime directory: {left}" if left else 0)'

clean:
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

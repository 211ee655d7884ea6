# Two commands do everything on a machine with python3.11, its venv module and make:
#   make demo    sets up, then trains a small LLaMA on real text and shows the result
#   make test    sets up, then runs the tests
# and two more what takes longer, or needs more:
#   make test-slow   the long ones, and those that compare with other libraries
#   make compat      the tests on every supported pair of Python and JAX
#   make docs        the site of all pages, in out/docs
#   make notebook    runs examples/quickstart.ipynb, and stores what it shows
PYTHON ?= python3.11
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-slow compat compat-quick docs notebook lint format bench bench-quick bench-compiler bench-gpu clean

demo: .venv/examples
	$(BIN)/python examples/llama/demo.py $(ARGS)

# Two shards: on eight devices, and what may depend on it on one, as most users have.
ONE_DEVICE := tests/contract tests/test_cpu.py tests/test_projectors.py \
	tests/test_layerwise.py
test: .venv/tests
	$(BIN)/python -m pytest -n 2 -q $(ARGS)
	GALORE_OPTAX_TEST_DEVICES=1 $(BIN)/python -m pytest -n 2 -q \
		-m "one_device and not slow" $(ONE_DEVICE)

test-slow: .venv/parity
	$(BIN)/python -m pytest -n 2 -q -m slow $(ARGS)

# Every pair of Python and JAX; needs python3.11, 3.12 and 3.13.
compat:
	.ci/compat $(ARGS)

# Of the pairs that `make test` is not run on and that are here, what changes with
# versions: Flax, types, promotion.
compat-quick:
	PAIRS="3.12:0.11 3.13:0.12" .ci/compat --present tests/contract -k 8bit

# A warning is an error: a link that leads nowhere, a docstring that does not render.
docs: .venv/docs
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs out/docs
	@echo "open out/docs/index.html"

# What the notebook shows, again.
notebook: .venv/notebook
	$(BIN)/jupyter execute --inplace --kernel_name=python3 examples/quickstart.ipynb

lint: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Those with MINUTES go on where they stopped; GLUE is a folder with GLUE's tsv files.
MINUTES ?= 60
RUN := $(BIN)/python -m benchmarks
SPEED := optimizer_step family_step floor step_trace trace_time against_torch \
	training_step refresh_7b blas_threads
bench: .venv/rivals
	set -e; for name in $(SPEED); do $(RUN).speed.$$name; done
	$(RUN).memory.state_bytes
	$(RUN).memory.state_per_device
	$(RUN).memory.weak_scaling
	$(RUN).memory.plan_paper
	$(RUN).memory.never_formed wire
	$(RUN).memory.never_formed flops
	$(RUN).speed.never_formed --minutes $(MINUTES)
	$(RUN).why.why_it_works pictures
	$(RUN).why.why_it_works methods
	$(RUN).training.corpus_size
	$(RUN).training.demo table seeds 9m
	$(RUN).training.storage_bits moments
	$(RUN).training.storage_bits projectors
	$(RUN).training.storage_bits bf16 --minutes $(MINUTES)
	$(RUN).training.ablations --minutes $(MINUTES)
	$(RUN).training.pretraining --speed --model 1m
	$(RUN).training.pretraining --model 1m --minutes $(MINUTES)
	$(RUN).training.finetuning --speed
	$(RUN).training.finetuning --minutes $(MINUTES) $(if $(GLUE),--glue-dir $(GLUE))
	$(RUN).lib.report

# The small ones, in ten minutes; they print and record nothing.
QUICK := optimizer_step family_step floor step_trace refresh_7b against_torch training_step
bench-quick: .venv/rivals
	set -e; for name in $(QUICK); do $(RUN).speed.$$name --quick; done

# Compiles for a GPU that need not be there, in an environment of its own.
bench-compiler: .venv-cuda .venv-tpu
	.venv-cuda/bin/python -m benchmarks.memory.plan_vs_compiler
	.venv-cuda/bin/python -m benchmarks.memory.plan_vs_compiler_tied
	.venv-cuda/bin/python -m benchmarks.memory.compiled_step bytes
	.venv-cuda/bin/python -m benchmarks.memory.compiled_step kernels
	.venv-cuda/bin/python -m benchmarks.memory.never_formed bytes
	.venv-cuda/bin/python -m benchmarks.memory.step_7b
	.venv-tpu/bin/python -m benchmarks.memory.many_devices

# On the card at hand, under eight minutes; with jax for it in .venv, as jax[cuda12].
bench-gpu: .venv/examples
	$(RUN).speed.gpu $(ARGS)

.venv-cuda .venv-tpu: .venv-%: pyproject.toml
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install --quiet --disable-pip-version-check -e ".[aot-$*]"
	@touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/%: pyproject.toml | .venv/bin/python
	@echo "setting up: installing the extra '$*' into .venv"
	$(PIP) -e ".[$*]"
	@touch $@

clean:
	rm -rf .venv .venv-cuda .venv-tpu .venv-compat-* out

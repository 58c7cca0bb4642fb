# make demo         train a small expert-parallel DiffMoE on digits, and look at its samples
# make demo-text    the same for text to image: drawn shapes, sampled from prompts; measures how many are followed
# make test         every test, on CPU
# make test-fast    those that are neither marked slow nor slurm, under three minutes on two cores
# make lint         formatting, lint rules, types, pages and their links
# make site         the pages as a site in build/site; a broken link or a page outside its contents is an error
# make bench        measure layer, training step and scaling, for under ten minutes on two cores, and write the results
#                   into docs/performance.md
# make gpu          on a machine with a GPU: the tests of what only happens there, then its numbers beside the planner's
# make venv         only the environment in .venv, with this package in it
#
# Each target makes what it needs. PYTHON chooses the interpreter of the environment (3.10 or newer).
PYTHON ?= python3
BIN := .venv/bin
DEMO_STEPS ?= 1000
GPU_OUT ?= runs/gpu

# One thread for each process: the processes share the cores, and spinning threads of two of them stand in each
# other's way.
export OMP_NUM_THREADS = 1

.PHONY: venv demo demo-text test test-fast bench gpu lint site

venv: .venv/ready

# torch comes first and pinned: anything that merely wants "torch" would fetch its newest CUDA build.
.venv/ready: requirements.txt requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$$(grep '^torch==' requirements.txt)"
	$(BIN)/pip install --quiet -r requirements.txt -r requirements-dev.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable . # setuptools is there: torch needs it
	touch $@

demo: .venv/ready
	$(BIN)/python -m data_tools pack digits shards/digits
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed --num_gpus 2 --module diffmoe_dist.train --config configs/digits.yaml \
		data.shards=shards/digits device=cpu parallel.expert=2 train.steps=$(DEMO_STEPS)
	rm -rf samples/demo # of a demo with other DEMO_STEPS, whose folder would be refused
	$(BIN)/python -m diffmoe_dist.sample --checkpoint runs/demo --out samples/demo --num 100 --cfg-scale 2 \
		--device cpu
	$(BIN)/python -m diffmoe_dist.report --run runs/demo --samples samples/demo --device cpu

demo-text: .venv/ready
	$(BIN)/python -m data_tools pack shapes shards/shapes
	test -d models/random-clip || $(BIN)/python -m data_tools random-encoder shards/shapes models/random-clip
	$(BIN)/python -m data_tools encode-text shards/shapes shards/shapes-text --encoder models/random-clip --max-length 10
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed --num_gpus 2 --module diffmoe_dist.train --config configs/t2i/debug.yaml \
		device=cpu parallel.expert=2
	rm -rf samples/shapes
	$(BIN)/python -m diffmoe_dist.sample --checkpoint runs/shapes --out samples/shapes --device cpu --cfg-scale 2 \
		--prompts configs/t2i/shapes_prompts.txt --encoder models/random-clip
	$(BIN)/python -m diffmoe_dist.report --run runs/shapes --samples samples/shapes --device cpu
	$(BIN)/python -m benchmarks.prompt_following samples/shapes --at-least 0.8

# Three files of tests at a time on two cores, for many wait: for Slurm, for a kill, for other ranks. In their order, so
# that none of the long ones comes last.
test: .venv/ready
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder $(PYTEST_OPTIONS)

test-fast: .venv/ready
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not slow and not slurm" $(PYTEST_OPTIONS)

# Ratios of process time on one thread: the machine need not be quiet, but its memory must be free (21 GB).
bench: .venv/ready
	rm -rf build/bench && mkdir -p build/bench
	$(BIN)/python -m benchmarks.train_step --device cpu --tokens 1024 2048 --rounds 4 --models dense ours published \
		deepspeed ours,train.recompute=mlp --json build/bench/step.json
	$(BIN)/python -m benchmarks.train_step --device cpu --tokens 8192 --rounds 3 --models dense ours published \
		--json build/bench/step_8k.json # each of the three holds 7 GB
	$(BIN)/python -m benchmarks.moe_layer --device cpu --sizes 384x8192x16 --json build/bench/layer.json
	$(BIN)/python -m benchmarks.scaling --rounds 5 --json build/bench/scaling.json
	$(BIN)/python -m benchmarks.page docs/performance.md build/bench/*.json

# With PYTHON itself, whose torch is one for CUDA, and without network; under ten minutes. GPU_OUT gets gpu.md, gpu.json
# and tests.xml.
gpu:
	mkdir -p $(GPU_OUT)
	failed=0; \
	$(PYTHON) -m pytest -m gpu tests/gpu --junitxml=$(GPU_OUT)/tests.xml $(PYTEST_OPTIONS) || failed=1; \
	$(PYTHON) -m benchmarks.gpu --out $(GPU_OUT) $(GPU_OPTIONS) || failed=1; \
	exit $$failed

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/rumdl check --quiet .
	$(BIN)/mypy

# MkDocs wants the pages below a folder of their own: the links there keep theirs to each other and to sources.
site: .venv/ready
	rm -rf build/site-source && mkdir -p build/site-source
	ln -s $(addprefix $(CURDIR)/,README.md CONTRIBUTING.md CHANGELOG.md CITATION.cff LICENSE Dockerfile diffmoe.def \
		docs slurm diffmoe_dist) build/site-source
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

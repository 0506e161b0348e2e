.PHONY: help test avx2 bounds slow fuzz gpu-check lint bench kills

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

test: ## run the test suite
	python -m pytest

avx2: ## run what trains as if on a CPU without AVX-512, which has other kernels
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python -m pytest \
	  tests/startup/test_launchers.py tests/test_ranks.py tests/test_cnn_model.py tests/training

bounds: ## run the codecs' tests and 300,000 damaged payloads with every index checked
	NUMBA_BOUNDSCHECK=1 python -m pytest tests/wire tests/compressors tests/test_compiled.py \
	  tests/test_compression.py tests/test_compression_golden.py
	NUMBA_BOUNDSCHECK=1 PYTHONPATH=.:tests python tests/test_fuzz.py 300000

slow: ## run the tests that take too long for the suite
	python -m pytest -m slow

fuzz: ## decode four million damaged payloads of all codecs (several minutes)
	PYTHONPATH=.:tests python tests/test_fuzz.py 4000000

gpu-check: ## run what a GPU must show: tests, speed, equal runs, DeepSpeed, a profile (8 minutes; FOLDER=, for logs)
	python benchmarks/gpu_check.py $(if $(FOLDER),--folder $(FOLDER))

lint: ## check the code with ruff
	ruff check . && ruff format --check .

bench: ## run four benchmarks (needs CIFAR-10 in ../shared/data, 50 GB of disk, an hour)
	python benchmarks/engine.py --json
	python benchmarks/codec.py --json
	python benchmarks/server_step.py --json
	python benchmarks/memory.py --json

kills: ## kill a run of two ranks a hundred times (a quarter of an hour)
	python benchmarks/kills.py --json

.PHONY: help test slow fuzz gpu-check lint bench kills

help: ## list what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

test: ## the whole suite
	python -m pytest

slow: ## the tests that take too long for the suite
	python -m pytest -m slow

fuzz: ## four million wounded payloads of every codec, several minutes
	PYTHONPATH=.:tests python tests/test_fuzz.py 4000000

gpu-check: ## the tests and the engine benchmark on a CUDA device, where there is one
	@if python -c "import torch; raise SystemExit(not torch.cuda.is_available())"; then \
	  python -m pytest -m gpu && python benchmarks/engine.py --json; \
	else echo "gpu-check did NOT run: torch sees no CUDA device here"; fi

lint: ## ruff
	ruff check . && ruff format --check .

bench: ## engine, codecs and memory (needs CIFAR-10 in ../shared/data, 50 GB of disk, an hour)
	python benchmarks/engine.py --json
	python benchmarks/codec.py --json
	python benchmarks/server_step.py --json
	python benchmarks/memory.py --json

kills: ## a hundred kills of a run of two ranks, a quarter of an hour
	python benchmarks/kills.py --json

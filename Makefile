# make demo: from a fresh clone to a finished run. make test: to a passed suite. Both install into .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint

demo: .venv/installed
	$(BIN)/python demo/demo.py

test: .venv/installed
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check

.venv/installed: requirements.txt demo/requirements.txt tests/requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.txt -r demo/requirements.txt -r tests/requirements.txt
	touch $@

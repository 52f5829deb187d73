# make test   sets everything up in .venv and runs the tests      make lint   ruff      make clean   throws .venv away
PYTHON ?= python3
VENV := .venv

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf $(VENV)

.PHONY: test lint clean

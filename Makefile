# make demo      installs into .venv and cuts the edges of figures 3-5 in the bundled model: out/knockout
# make test      installs into .venv and runs all tests; python -m pytest -m "not slow" runs the quick ones
# make lint      ruff
# make notebook  writes docs/tour.md as a notebook, for Jupyter and Colab: out/tour.ipynb
# make clean     deletes .venv
# make retrain   trains both bundled models again, into out/retrain: two to three hours on 2 CPU cores
PYTHON ?= python3
VENV := .venv
INSTALL := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r

demo: $(VENV)/installed
	$(VENV)/bin/python knockout.py

test: $(VENV)/installed-test
	$(VENV)/bin/python -m pytest -n auto --dist loadfile

retrain: $(VENV)/installed
	$(VENV)/bin/python -m tiny.train out/retrain/first
	$(VENV)/bin/python -m tiny.train out/retrain/llava-tiny --start out/retrain/first
	$(VENV)/bin/python -m tiny.train out/retrain/llava-tiny-anyres --anyres --start out/retrain/llava-tiny

notebook: $(VENV)/installed-test
	$(VENV)/bin/python tests/tour.py --notebook out/tour.ipynb

lint: $(VENV)/installed-test
	$(VENV)/bin/ruff check .

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(INSTALL) requirements.txt
	touch $@

$(VENV)/installed-test: requirements-test.txt $(VENV)/installed
	$(INSTALL) requirements-test.txt
	touch $@

clean:
	rm -rf $(VENV)

.PHONY: demo test retrain notebook lint clean

# Needs make and Python 3.10 or newer; everything else goes into $(VENV), once.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint readme docs-check clean
.NOTPARALLEL:

help: ## list these commands
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/make \1|\2/p' Makefile | awk -F'|' '{ printf "%-16s %s\n", $$1, $$2 }'

demo: $(INSTALLED) ## train on 8gaussians (about a minute), draw the flow, print the distances
	$(BIN)/nsgf demo

# The result notebooks, 20 to 26, are run by pytest, which compares what they print with what is committed.
test: $(INSTALLED) ## run every notebook, then pytest
	@$(BIN)/python -c "from nbdev.doclinks import nbglob; import sys; sys.exit(None if nbglob() else 'nbdev finds no notebook to test.')"
	MPLBACKEND=agg OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --do_print --timing --skip_file_re '^([_.]|2[0-6]_)'
	MPLBACKEND=agg OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(INSTALLED) ## check the style of notebooks, tests and tools
	$(BIN)/ruff check .

readme: $(INSTALLED) ## make README.md from nbs/index.ipynb; add or remove Colab links
	$(BIN)/python tools/publish.py
	$(BIN)/python tools/readme.py

docs-check: $(INSTALLED) ## make the package, clean notebooks and README.md again; fail if git sees a change
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python tools/publish.py
	$(BIN)/python tools/readme.py
	@changed=$$(git status --porcelain -- nsgf_nb nbs README.md README_files) && test -z "$$changed" \
	|| { echo "These files are out of step with the notebooks, or not committed:"; echo "$$changed"; exit 1; } >&2

clean: ## remove the environment, builds and caches (not runs/)
	rm -rf $(VENV) build dist *.egg-info _proc _docs nbs/sidebar.yml nbs/nbdev.yml .pytest_cache .hypothesis
	find nsgf_nb nbs tests tools -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

$(INSTALLED): settings.ini setup.py pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" 2>/dev/null \
	|| { echo "nsgf_nb needs Python 3.10 or newer, which '$(PYTHON)' is not: name one with 'make PYTHON=/path/to/python3'." >&2; exit 1; }
	@echo "Installing nsgf_nb and what it needs into $(VENV): once, and some minutes, as PyTorch is a large download."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

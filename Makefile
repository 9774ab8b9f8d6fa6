# Two commands to know: `make reproduce` and `make test`. Everything they need goes into .venv.
PYTHON ?= python3
SYSTEM ?=
BIN    := .venv/bin
READY  := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help reproduce test docs readme lab clean

help: ## show this list
	@echo "pgolf: the annotated Parameter Golf"; echo
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo; echo "  make PYTHON=python3.12 ...  uses another Python (3.11 or newer) for .venv"

# pip runs when .venv is missing or when what it installs has changed; otherwise the environment is reused.
$(READY): settings.ini constraints.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3,11))' || { \
	  echo "pgolf needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { \
	  rm -rf .venv; echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu it needs the package python3-venv."; exit 1; }
	@echo "Installing what constraints.txt pins into .venv (minutes the first time, once) ..."
	@$(BIN)/python -m pip --disable-pip-version-check install -qq -c constraints.txt -e '.[dev]'
	@touch $@

reproduce: $(READY) ## run every system at pocket scale and print the scoreboard (SYSTEM=pr610 runs one)
	@$(BIN)/pgolf reproduce $(SYSTEM)

# One thread per notebook: nbdev already runs one notebook per core. Run notebooks (6x, 7x) are left to `make reproduce`.
test: $(READY) ## test all chapters with nbdev_test, then tests/ with pytest
	@echo "== chapters (nbdev_test)"
	@OMP_NUM_THREADS=1 $(BIN)/nbdev_test --skip_file_re '^([_.]|[67][0-9]_)' --do_print --timing
	@echo "== tests (pytest)"
	@$(BIN)/python -m pytest

docs: $(READY) ## build the site into _docs/ (Quarto if installed, else pure Python; no network)
	@$(BIN)/python .ci/docs.py site

readme: $(READY) ## write README.md from nbs/index.ipynb
	@$(BIN)/python .ci/docs.py readme

lab: $(READY) ## open the chapters in JupyterLab
	@$(BIN)/jupyter lab nbs

clean: ## remove .venv and everything generated; data/ and runs/ stay
	rm -rf .venv _docs _proc build dist *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

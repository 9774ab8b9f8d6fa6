# Two commands to know: `make reproduce` and `make test`. Everything they need goes into .venv.
PYTHON ?= python3
SYSTEM ?=
CALL   ?= all
SIZE   ?= full
OUT    ?= .card/out
HASHES ?=
HOURS  ?= 1
# A Python that is named gets an environment of its own: .venv-python3.12.
VENV   := .venv$(if $(filter command environment,$(firstword $(origin PYTHON))),-$(notdir $(PYTHON)))
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help reproduce test test-all test-busy campaign card card-wheels docs readme boxes lab lock clean bin

help: ## show this list
	@echo "pgolf: the annotated Parameter Golf"; echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo; echo "  make PYTHON=python3.12 ...  uses another Python (3.11 or newer), in an environment of its own"
	@echo "  make HASHES=1 ...           installs nothing whose SHA-256 is not in requirements.lock (torch for CUDA)"

# pip runs when .venv is missing or when what it installs has changed; otherwise the environment is reused.
$(READY): settings.ini constraints.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3,11))' || { \
	  echo "pgolf needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  rm -rf $(VENV); echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu it needs the package python3-venv."; exit 1; }
	@echo "Installing what constraints.txt pins into $(VENV) (minutes the first time, once) ..."
	@$(BIN)/python -m pip --disable-pip-version-check install -qq \
	  $(if $(HASHES),--require-hashes -r requirements.lock,-c constraints.txt -e '.[dev]')
	@$(if $(HASHES),$(BIN)/python -m pip --disable-pip-version-check install -qq --no-deps -e .,:)
	@touch $@

reproduce: $(READY) ## run the five systems and PR #1855 at pocket scale, print the scoreboard (SYSTEM=pr610 runs one)
	@$(BIN)/pgolf reproduce $(SYSTEM)

test: $(READY) ## all chapters and tests/ but the slow ones, on all cores; a summary ends it
	@$(BIN)/python .ci/test.py $(ARGS)

test-all: $(READY) ## everything, the slow ones too (ARGS='-k muon' chooses, here and in test)
	@$(BIN)/python .ci/test.py --all $(ARGS)

test-busy: $(READY) ## `make test` beside four busy loops, which it starts and ends
	@$(BIN)/python .ci/test.py --beside 4 $(ARGS)

campaign: $(READY) ## kill and mutate for HOURS=1; counts add up in nbs/results/campaign.json
	@nice -n 19 $(BIN)/python tests/campaign --hours $(HOURS) $(ARGS)

card: ## ask a GPU everything in two calls, CALL=A and CALL=B (SIZE=tiny asks a CPU); answers in OUT
	@$$(test -x $(BIN)/python && echo $(BIN)/python || echo $(PYTHON)) .ci/card.py $(CALL) --size $(SIZE) --out $(OUT) $(ARGS)

card-wheels: $(READY) ## packages and data that a card's machine lacks, into .card/, to be carried there
	@$(BIN)/python .ci/card.py collect

docs: $(READY) ## build the site into _docs/ (Quarto if installed, else pure Python; no network)
	@$(BIN)/python .ci/docs.py site

readme: $(READY) ## write README.md from nbs/index.ipynb
	@$(BIN)/python .ci/docs.py readme

boxes: $(READY) ## renew the box at the top of every chapter, from the results
	@$(BIN)/python .ci/boxes.py write

lock: ## write requirements.lock from settings.ini and constraints.txt (needs uv)
	@uv pip compile pyproject.toml --extra dev -c constraints.txt --generate-hashes --universal \
	  --python-version 3.11 --custom-compile-command 'make lock' -q -o requirements.lock

lab: $(READY) ## open the chapters in JupyterLab, first the page that says where to go
	@$(BIN)/jupyter lab nbs/index.ipynb

bin: # where the commands of the environment are
	@echo $(BIN)

clean: ## remove the environments and everything generated; data/ and runs/ stay
	rm -rf .venv .venv-* _docs _proc build dist *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

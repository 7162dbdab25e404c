# make            what there is
# Every target first makes .venv, the locked environment, if it is not there or if settings.ini, setup.py or constraints.txt changed.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do $$p .ci/python.py 2>/dev/null && echo $$p && break; done)
PY3 = $(or $(PYTHON),python3)
EXTRAS ?= dev
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help install radiomics tour test docs bench notebooks export readme hooks clean
help:
	@echo "make tour                        the main job, from nothing to _tour/index.html"
	@echo "make test                        the guards, every notebook, pytest"
	@echo "make docs                        the site, in _docs (needs Quarto)"
	@echo "make bench NAME=x [SEED=n]       one benchmark, appended to benchmarks/results/x.csv"
	@echo "make notebooks [NB=nbs/a/b.ipynb]  run notebooks again and store their outputs"
	@echo "make export                      notebooks -> mammo_nb (nbdev_clean, nbdev_export) and README.md"
	@echo "make hooks                       the git and Jupyter hooks of nbdev, once a clone"
	@echo "make install                     only the environment, .venv"
	@echo "make radiomics                   the extra radiomics, if install found no C compiler before"
	@echo "make clean                       removes what the other targets made, not .venv"

install: $(STAMP)

$(STAMP): settings.ini setup.py constraints.txt
	@command -v $(PY3) >/dev/null || { echo "make: no $(PY3) found; mammo_nb needs Python 3.11 or newer"; exit 1; }
	@$(PY3) .ci/python.py
	@echo "Installing the locked set in .venv (about 7 GB on Linux, 3 to 10 minutes; only when it changed)"
	@$(BIN)/python -c "import pip" 2>/dev/null || $(PY3) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e ".[$(EXTRAS)]"
	@$(BIN)/python .ci/install_radiomics.py
	@touch $@

radiomics: $(STAMP)
	@$(BIN)/python .ci/install_radiomics.py

tour: $(STAMP)
	@$(BIN)/mammo_tour

test: $(STAMP)
	@$(BIN)/python .ci/test.py

docs: $(STAMP)
	@command -v quarto >/dev/null || { echo "make docs: Quarto is not installed. Install it from https://quarto.org/docs/get-started and run make docs again."; exit 1; }
	@$(BIN)/python .ci/readme.py
	@$(BIN)/python .ci/docs.py
	@test -f _docs/index.html || { echo "make docs: Quarto made no _docs/index.html"; exit 1; }

bench: $(STAMP)
	@$(BIN)/python .ci/bench.py "$(NAME)" "$(SEED)"

notebooks: $(STAMP)
	@$(BIN)/python .ci/notebooks.py $(NB)

export: $(STAMP)
	@$(BIN)/nbdev_clean
	@$(BIN)/nbdev_export
	@$(BIN)/python .ci/readme.py

readme: $(STAMP)
	@$(BIN)/python .ci/readme.py

hooks: $(STAMP)
	@$(BIN)/python .ci/hooks.py

clean:
	rm -rf _tour _docs _proc build *.egg-info

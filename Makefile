# make book   run every chapter and build the site
# make test   check everything: style, types, tests, and every chapter's outputs
# make lab    open the first chapter in JupyterLab
# make course write the chapters for students and for instructors: course/
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
# Chapters are committed without progress bars; one thread is fastest for small models.
RUN := TQDM_DISABLE=1 OMP_NUM_THREADS=1 PYDEVD_DISABLE_FILE_VALIDATION=1

.PHONY: book test nbval lab course lint chapters study trials benchmark readme clean help

help:
	@sed -n 's/^# //p' Makefile

book: $(VENV)/.ready
	$(RUN) $(BIN)/jupyter-book build . --config book/_config.yml --toc book/_toc.yml --path-output book -W -n --keep-going
	@$(BIN)/python tools/show_book.py

test: $(VENV)/.ready lint
	$(RUN) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile tests mergekit_lite
	$(MAKE) nbval

# Run the chapters and compare every output with the committed one.
nbval: $(VENV)/.ready
	$(RUN) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --nbval --nbval-current-env \
		--nbval-sanitize-with tools/nbval_sanitize.cfg -p no:warnings notebooks

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pylint --disable=all --enable=duplicate-code --min-similarity-lines=6 mergekit_lite tests tools benchmarks

lab: $(VENV)/.ready
	$(BIN)/jupyter lab notebooks/11_first_merge.ipynb

course: $(VENV)/.ready
	$(BIN)/python tools/course.py

# Run the chapters in place, to commit them with their outputs.
chapters: $(VENV)/.ready
	$(RUN) $(BIN)/python tools/run_chapters.py

# The tables of figures: the suite, its variants, edits and orthogonality (an hour and a half); what was tried (an hour).
study: $(VENV)/.ready
	$(BIN)/python -m mergekit_lite.lab.study figures
	$(BIN)/python -m mergekit_lite.lab.study variants
	$(BIN)/python -m mergekit_lite.lab.study analogies
	$(BIN)/python -m mergekit_lite.lab.study edits
	$(BIN)/python -m mergekit_lite.lab.study orthogonality

trials: $(VENV)/.ready
	$(BIN)/python -m mergekit_lite.lab.study trials

benchmark: $(VENV)/.ready
	$(BIN)/python benchmarks/merge_files.py
	$(BIN)/python benchmarks/disentangle.py

# Rewrite what is made from the registry: the README's table and the book's method index.
readme: $(VENV)/.ready
	$(BIN)/python tools/generate.py

$(VENV)/.ready: pyproject.toml constraints.txt tools/setup_env.py
	@$(PYTHON) tools/setup_env.py $(VENV)
	@touch $@

clean:
	rm -rf $(VENV) book/_build build dist *.egg-info

# make book   run every chapter and build the site
# make test   check everything: style, types, tests, and every chapter's outputs
# make parity compare the methods with mergekit and fusion-bench, K-FAC with curvlinops
# make fuzz   ten thousand hostile inputs and a hundred killed merges (make test runs some of each)
# make lab    open the first chapter in JupyterLab
# make course write the chapters for students and for instructors: course/
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The packages that the methods are compared with have an environment of their own.
PARITY := .venv-parity
# What curvlinops needs and the others do not bring. It also asks for torchvision, which only its examples use; without
# it there is no build that may not fit torch.
CURVLINOPS := curvlinops-for-pytorch backpack-for-pytorch einconv einops linear_operator opt_einsum unfoldNd
JOBS ?= 2
# Chapters are committed without progress bars; one thread is fastest for small models.
RUN := TQDM_DISABLE=1 OMP_NUM_THREADS=1 PYDEVD_DISABLE_FILE_VALIDATION=1

.PHONY: book test nbval parity fuzz lab course lint chapters study trials benchmark benchmark-peers readme clean help

help:
	@sed -n 's/^# //p' Makefile

book: $(VENV)/.ready
	$(RUN) $(BIN)/jupyter-book build . --config book/_config.yml --toc book/_toc.yml --path-output book -W -n --keep-going
	@$(BIN)/python tools/show_book.py

test: $(VENV)/.ready lint
	$(RUN) $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup tests mergekit_lite
	$(MAKE) nbval

# Run the chapters and compare every output with the committed one.
nbval: $(VENV)/.ready
	$(RUN) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --nbval --nbval-current-env \
		--nbval-sanitize-with tools/nbval_sanitize.cfg -p no:warnings notebooks

parity: $(PARITY)/.ready
	$(RUN) $(PARITY)/bin/python -m pytest tests/parity

fuzz: $(VENV)/.ready
	FUZZ_CASES=10000 FUZZ_FIRST=1000 KILLS=100 $(RUN) $(BIN)/python -m pytest tests/test_fuzz.py tests/test_file_merging.py -s

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

# The tables of figures: the suite, its variants, edits, orthogonality, all methods (two hours); what was tried (an hour).
study: $(VENV)/.ready
	$(BIN)/python -m mergekit_lite.lab.study figures
	$(BIN)/python -m mergekit_lite.lab.study variants
	$(BIN)/python -m mergekit_lite.lab.study analogies
	$(BIN)/python -m mergekit_lite.lab.study edits
	$(BIN)/python -m mergekit_lite.lab.study orthogonality
	$(BIN)/python -m mergekit_lite.lab.study signs
	$(BIN)/python -m mergekit_lite.lab.study data-free

trials: $(VENV)/.ready
	$(BIN)/python -m mergekit_lite.lab.study trials

benchmark: $(VENV)/.ready
	$(BIN)/python benchmarks/merge_files.py
	$(BIN)/python benchmarks/disentangle.py
	$(BIN)/python benchmarks/vit.py
	$(BIN)/python benchmarks/conjugate_gradient.py --write

# The same, beside mergekit and fusion-bench.
benchmark-peers: $(VENV)/.ready $(PARITY)/.ready
	$(BIN)/python benchmarks/vit.py --peers $(PARITY)/bin/python

# Rewrite what is made from the registry: the README's table and the book's method index.
readme: $(VENV)/.ready
	$(BIN)/python tools/generate.py

$(VENV)/.ready: pyproject.toml constraints.txt tools/setup_env.py
	@$(PYTHON) tools/setup_env.py $(VENV)
	@touch $@

$(PARITY)/.ready: constraints.txt tests/parity/constraints.txt tools/setup_env.py
	@$(PYTHON) tools/setup_env.py $(PARITY) --constraint tests/parity/constraints.txt fusion-bench mergekit pytest
	@$(PARITY)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--constraint tests/parity/constraints.txt $(CURVLINOPS)
	@touch $@

clean:
	rm -rf $(VENV) $(PARITY) book/_build build dist *.egg-info

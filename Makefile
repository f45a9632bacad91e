# make table1   the quick suite's Table 1 from nothing: environment, data, training, LaTeX
# make test     environment, lint, types, all tests, and the workflow on the smoke suite
SHELL := /bin/bash
PYTHON ?= python3
CORES ?= all
VENV := .venv
# Let Python keep its compiled bytecode: start-up takes three times as long without.
unexport PYTHONDONTWRITEBYTECODE
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
LATEX := $(shell command -v pdflatex)
SNAKEMAKE := snakemake --cores $(CORES) --quiet rules host reason

.PHONY: table1 table5 table6 report test lint unit smoke slurm oldest environment requirements docs pretrain clean

table1: environment
	$(SNAKEMAKE) -- results/table1.tex $(if $(LATEX),results/table1.pdf)
	$(if $(LATEX),,@echo "No LaTeX here: results/table1.pdf is left out.")
	@snella show table1

# Quick segmentation: Table 5 and its examples, Figure 8
table5: environment
	$(SNAKEMAKE) -- results/table5.tex results/figure8.pdf
	@snella show table5

# Quick generation: Table 6, its sample grid and trade-offs
table6: environment
	$(SNAKEMAKE) -- results/table6.tex results/s2ft_table3.tex \
	  results/figure9.pdf results/figure14.pdf results/tradeoff_text.pdf results/tradeoff_drift.pdf
	@snella show table6

# All results so far as one page, results/report.html, which any browser opens without a network
report: environment
	@snella report

# The tests on SLURM wait for it most of their time; the others need the cores meanwhile.
test: lint
	$(MAKE) --jobs 2 unit slurm
	$(MAKE) smoke

lint: environment
	ruff check .
	ruff format --check .
	mypy
	snakefmt --check Snakefile workflow/rules
	snakemake --lint

unit: environment
	pytest -n auto --dist worksteal --ignore tests/slurm

# The workflow on a SLURM of one node with pretended GPUs; skipped where there are no packages of it.
slurm: environment
	pytest -n 3 -rs tests/slurm

# The tuner under the oldest torch that pyproject.toml allows, in an environment of its own.
oldest:
	uv venv --quiet --clear --python $(PYTHON) build/oldest
	grep -vE '^(torch|triton|nvidia|cuda)' envs/requirements.txt | \
	  uv pip install --quiet --python build/oldest/bin/python --requirement - --editable . 'torch==2.8.*'
	build/oldest/bin/python -m pytest -n auto $(wildcard tests/test_tuner*.py)

# The same Snakefile on a suite of seconds; a second call has nothing to do.
smoke: environment
	rm -rf results/smoke
	$(SNAKEMAKE) --config suite=smoke results=results/smoke -- results/smoke/table1.tex
	snakemake --cores 1 --config suite=smoke results=results/smoke \
	  --quiet host -- results/smoke/table1.tex 2>&1 | grep "Nothing to be done"
	$(if $(LATEX),$(SNAKEMAKE) --config suite=smoke results=results/smoke -- results/smoke/table1.pdf)
	$(SNAKEMAKE) --config suite=smoke_segmentation results=results/smoke \
	  -- results/smoke/table5.tex results/smoke/figure8.pdf
	@snella show table1 --config suite=smoke results=results/smoke
	$(SNAKEMAKE) --config suite=smoke_generation results=results/smoke \
	  -- results/smoke/table6.tex results/smoke/samples.pdf

environment: $(VENV)/.ready

$(VENV)/.ready: envs/requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; call make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check uv
	uv pip install --quiet --python $(VENV)/bin/python -r envs/requirements.txt
	uv pip install --quiet --python $(VENV)/bin/python --no-deps -e .
	touch $@

# Resolve the ranges of pyproject.toml again to the newest versions.
requirements:
	uv pip compile --quiet pyproject.toml --extra dev --python-version 3.11 --upgrade \
	  --no-emit-index-url --no-annotate --custom-compile-command "make requirements" \
	  --output-file envs/requirements.txt
	python envs/environments.py

# The documentation as a site, below site/.
docs: environment
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet

pretrain: environment
	$(SNAKEMAKE) -- results/pretrain/vit_quick.safetensors

clean:
	find results -mindepth 1 ! -path results/README.md -delete
	rm -rf logs

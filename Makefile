SHELL := bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
BIN := .venv/bin
NOTEBOOKS := 01_data 02_models 03_training 04_ablation
PAGES := $(NOTEBOOKS) appendix_why solutions
WORKERS ?= 1
# One dependency still comes without a wheel: built the modern way, it needs no warning.
INSTALL := $(BIN)/pip install --disable-pip-version-check --progress-bar off --use-pep517 \
	-c requirements.lock
# Runs one notebook and shows what its cells print; copy and messages are in build/.
PAPERMILL := $(BIN)/papermill --cwd notebooks -k python3 --log-level ERROR --no-progress-bar \
	--stdout-file /dev/stdout
# Memory that one step frees is kept for the next (glibc's malloc, read when a process starts).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4000000000:glibc.malloc.trim_threshold=4000000000:glibc.malloc.top_pad=268435456
# What TensorFlow prints when it is loaded goes there and not into a notebook's output.
export IPYTHONDIR := $(CURDIR)/build/ipython
KERNEL := $(IPYTHONDIR)/profile_default/ipython_kernel_config.py
ASIDE := 2>> build/messages.txt
FAILED := || { [ $$stopped ] \
	&& echo "Stopped. Finished epochs are kept: the same command goes on from there." \
	|| tail -n 25 build/messages.txt; exit 1; }
# Notebooks run in another folder: folders are handed on as absolute paths.
START := set -e; trap 'stopped=1' INT; \
	[ ! -d "$$RESNET_DATASET" ] || \
		export RESNET_DATASET="$$(CDPATH= cd -- "$$RESNET_DATASET" && pwd)"; \
	for name in RESNET_RESULTS RESNET_DATA; do \
		case "$${!name}" in ""|[/~]*) ;; *) export "$$name=$$PWD/$${!name}";; esac; done
# Of all that is printed, only how far the training is, and the lines that begin with $(1).
SHOWN := \[[0-9]+/|!!!|Decoding |[a-z]+[0-9]+.*: loaded
PROGRESS = { grep --line-buffered -E '^($(SHOWN)$(1))' || [ $$? = 1 ]; }

# Messages start anew; the executed copies show pictures that lie in ../results.
LINK := ln -sfn ../results build/results 2> build/messages.txt || true

.PHONY: help run full render test clean
.DEFAULT_GOAL := help

help:
	@echo "make run     all four notebooks, quick profile: a smoke run of some minutes with a table"
	@echo "make test    all tests"
	@echo "make full    train what is missing of results/plan.csv: hours; WORKERS=2: two at a time"
	@echo "make render  execute the committed notebooks again, from the committed runs"
	@echo "make clean   remove the virtual environment and what make run has made"
	@echo "Other pictures: RESNET_DATASET=folder make run, with a subfolder of pictures per class,"
	@echo "or a name that TensorFlow Datasets knows; the same for make full."

# The committed notebooks stay as they are. Two short runs side by side take less time than one
# after the other, and so do notebooks 1 and 2, of which only the first needs images. (Without its
# own trap Ctrl-C would not reach it.)
run: .venv/installed $(KERNEL)
	@$(LINK)
	@$(START); export RESNET_PROFILE=quick; \
	execute() { \
		local start=$$SECONDS; echo "[$$1/4] notebooks/$$2.ipynb ..."; \
		$(PAPERMILL) notebooks/$$2.ipynb build/notebooks/$$2.ipynb $$3 $(ASIDE) \
			| $(PROGRESS) $(FAILED); \
		echo "[$$1/4] notebooks/$$2.ipynb: $$((SECONDS - start)) s"; }; \
	{ trap 'exit 1' INT; execute 1 01_data; } & execute 2 02_models; wait $$!; \
	execute 3 03_training "-p workers 2"; \
	execute 4 04_ablation; \
	$(BIN)/python -c "import resnet_helpers as rh; \
		name = rh.prepare_dataset('quick'); \
		folder = rh.results_folder('quick', name); \
		labels = rh.load_data(name).val_labels; \
		guess = rh.np.bincount(labels).max() / len(labels); \
		print(f'\nValidation accuracy in percent, a smoke run on {name} (no evidence):\n'); \
		print((folder / 'ablation.md').read_text()); \
		print('The two networks of a row differ in their shortcuts alone.'); \
		print(f'Guessing, always the same class, scores {100 * guess:.1f}.'); \
		print('One seed and a few epochs are no more than a first look.\n'); \
		print('Runs and figures:', folder)" $(ASIDE) $(FAILED); \
	echo "Executed notebooks: build/notebooks. Open them: $(BIN)/jupyter lab build/notebooks"; \
	echo "The full results on cats and dogs: README.md and notebooks/04_ablation.ipynb."; \
	echo "Runs of full length on this machine: make full"

# In the order of the plan; what is there is not trained again, what was cut off goes on.
full: .venv/installed $(KERNEL)
	@$(LINK)
	@$(START); $(PAPERMILL) notebooks/03_training.ipynb build/notebooks/03_training-full.ipynb \
		-y "{profile: full, plan: true, workers: $(WORKERS)}" $(ASIDE) \
		| $(call PROGRESS,|The plan) $(FAILED)
	@echo "Tables and figures: open notebooks/04_ablation.ipynb with the same settings."

render: .venv/installed $(KERNEL)
	@$(START); for name in $(PAGES); do \
		echo "notebooks/$$name.ipynb"; \
		RESNET_PROFILE=full $(BIN)/jupyter execute --inplace notebooks/$$name.ipynb \
			$(ASIDE) $(FAILED); \
	done

$(KERNEL):
	@mkdir -p $(@D) build/notebooks
	@echo "c.IPKernelApp.capture_fd_output = False" > $@

test: .venv/installed-tests
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -rs -n 2 --dist worksteal

.venv/installed: requirements.txt requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
		sys.exit(0 if (3, 11) <= v[:2] <= (3, 13) else f"Python 3.11, 3.12 or 3.13 is needed; " \
			f"this is {v[0]}.{v[1]}. Name another: make run PYTHON=python3.12")'
	@[ -w . ] || { echo "This folder cannot be written to. Clone the repository into another."; \
		exit 1; }
	@$(PYTHON) -m venv .venv || { \
		echo "Python has no venv here. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "Installing TensorFlow, Jupyter and what they need into .venv (2.5 GB, some minutes) ..."
	@$(INSTALL) -r requirements.txt \
		| grep --line-buffered -E '^(Collecting|Installing|ERROR)' | cut -c 1-100
	@touch $@

.venv/installed-tests: .venv/installed tests/requirements.txt
	@$(INSTALL) --quiet -r tests/requirements.txt
	@touch $@

clean:
	rm -rf build .venv results/quick results/test

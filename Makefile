SHELL := bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
BIN := .venv/bin
NOTEBOOKS := 01_data 02_models 03_training 04_ablation
PAGES := $(NOTEBOOKS) appendix_why
SEEDS ?= 0 1 2
NETWORKS ?= plain34, resnet34, plain50, resnet50, plain18, resnet18
WORKERS ?= 1
INSTALL := $(BIN)/pip install --disable-pip-version-check --progress-bar off -c requirements.lock
# Runs one notebook and shows what its cells print; the executed copy and all messages are kept in build/.
PAPERMILL := $(BIN)/papermill --cwd notebooks -k python3 --log-level ERROR --no-progress-bar --stdout-file /dev/stdout
# What TensorFlow prints when it is loaded goes into build/messages.txt and not into a notebook's output.
export IPYTHONDIR := $(CURDIR)/build/ipython
KERNEL := $(IPYTHONDIR)/profile_default/ipython_kernel_config.py
ASIDE := 2>> build/messages.txt
FAILED := || { [ $$stopped ] && echo "Stopped. Finished epochs are kept: the same command goes on from there." \
	|| tail -n 25 build/messages.txt; exit 1; }
START := set -e; trap 'stopped=1' INT
# Of all that is printed, only how far the training is.
PROGRESS := { grep --line-buffered -E '^(\[[0-9]+/|!!!|Decoding |[a-z]+[0-9]+.*: loaded)' || [ $$? = 1 ]; }

.PHONY: help run full sweeps render test clean
.DEFAULT_GOAL := help

help:
	@echo "make run     all four notebooks in the quick profile: a smoke run of some minutes, ends in the table"
	@echo "make test    all tests"
	@echo "make full    train what is missing of the committed grid (hours); WORKERS=2 trains two runs side by side"
	@echo "make sweeps  the same for other learning rates and for shortcuts without parameters"
	@echo "make render  execute the committed notebooks again, from the committed runs"
	@echo "make clean   remove the virtual environment and what make run has made"

# The committed notebooks stay as they are. Two short runs side by side take less time than one after the other, and so
# do notebooks 1 and 2, of which only the first needs images. (Without its own trap Ctrl-C would not reach it.)
run: .venv/installed $(KERNEL)
	@: > build/messages.txt
	@$(START); export RESNET_PROFILE=quick; \
	execute() { \
		local start=$$SECONDS; echo "[$$1/4] notebooks/$$2.ipynb ..."; \
		$(PAPERMILL) notebooks/$$2.ipynb build/notebooks/$$2.ipynb $$3 $(ASIDE) | $(PROGRESS) $(FAILED); \
		echo "[$$1/4] notebooks/$$2.ipynb: $$((SECONDS - start)) s"; }; \
	{ trap 'exit 1' INT; execute 1 01_data; } & execute 2 02_models; wait $$!; \
	execute 3 03_training "-p workers 2"; \
	execute 4 04_ablation; \
	$(BIN)/python -c "import resnet_helpers as rh; \
		folder = rh.RESULTS / 'quick' / rh.prepare_dataset('quick'); \
		print('\nValidation accuracy in percent, a smoke run on', folder.name, '(no evidence):\n'); \
		print((folder / 'ablation.md').read_text()); \
		points = 100 * rh.pd.read_csv('results/ablation.csv', index_col=0).difference; \
		print('The two networks of a row differ in their shortcuts alone; guessing scores about 50 (digits: 10).'); \
		print('With one seed and 4 epochs that is no more than a first look: in the committed runs, three seeds of'); \
		print('15 epochs, each network at its own learning rate, shortcuts are worth', \
			' and '.join(f'{points[row]:+.1f} points at {row}' for row in points.index[1:]) + '.\n'); \
		print('Runs and figures:', folder)" $(ASIDE); \
	echo "Executed notebooks: build/notebooks. Open them: $(BIN)/jupyter lab build/notebooks"; \
	echo "The full results: README.md and notebooks/04_ablation.ipynb. Runs of full length on this machine: make full"

# Seed by seed; what is there is not trained again, what was cut off goes on.
full: .venv/installed $(KERNEL)
	@$(START); for seed in $(SEEDS); do \
		$(PAPERMILL) notebooks/03_training.ipynb build/notebooks/03_training-seed$$seed.ipynb -p profile full \
			-y "{seeds: [$$seed], networks: [$(NETWORKS)], workers: $(WORKERS)}" $(ASIDE) $(FAILED); \
	done

sweeps: .venv/installed $(KERNEL)
	@$(START); train="$(PAPERMILL) notebooks/03_training.ipynb build/notebooks/03_training"; \
	for rate in 0.0003 0.003; do \
		$$train-rate$$rate.ipynb -p profile full \
			-y "{networks: [plain34, resnet34, plain50, resnet50], changes: {learning_rate: $$rate}, workers: $(WORKERS)}" \
			$(ASIDE) $(FAILED); \
	done; \
	$$train-zero_pad.ipynb -p profile full \
		-y "{networks: [resnet34, resnet50], changes: {shortcut: zero_pad}, workers: $(WORKERS)}" $(ASIDE) $(FAILED)

render: .venv/installed $(KERNEL)
	@$(START); for name in $(PAGES); do \
		echo "notebooks/$$name.ipynb"; \
		RESNET_PROFILE=full $(BIN)/jupyter execute --inplace notebooks/$$name.ipynb $(ASIDE) $(FAILED); \
	done

$(KERNEL):
	@mkdir -p $(@D) build/notebooks
	@echo "c.IPKernelApp.capture_fd_output = False" > $@

test: .venv/installed-tests
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -rs -n 2 --dist worksteal

.venv/installed: requirements.txt requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v[:2] <= (3, 13) else \
		f"Python 3.11, 3.12 or 3.13 is needed; this is {v[0]}.{v[1]}. Name another: make run PYTHON=python3.12")'
	@[ -w . ] || { echo "This folder cannot be written to. Clone the repository into one of your own."; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "Python has no venv here. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "Installing TensorFlow, Jupyter and what they need into .venv (about 2.5 GB, some minutes) ..."
	@$(INSTALL) -r requirements.txt | grep --line-buffered -E '^(Collecting|Installing|ERROR)' | cut -c 1-100
	@touch $@

.venv/installed-tests: .venv/installed tests/requirements.txt
	@$(INSTALL) --quiet -r tests/requirements.txt
	@touch $@

clean:
	rm -rf build .venv results/quick results/test

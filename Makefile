SHELL := bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
BIN := .venv/bin
NOTEBOOKS := 01_data 02_models 03_training 04_ablation
SEEDS ?= 0 1 2
NETWORKS ?= plain34, resnet34, plain50, resnet50, plain18, resnet18
# Runs one notebook, prints what its cells print while they run, and keeps the executed copy in build/.
PAPERMILL := $(BIN)/papermill --cwd notebooks -k python3 --log-level ERROR --no-progress-bar --stdout-file /dev/stdout
# Every kernel says that it is not encrypted; on one's own machine nobody needs to read that four times.
CALM := 2>&1 | grep --line-buffered -v IPKernelApp

.PHONY: run full checks test render clean

# All four notebooks in the quick profile; the committed ones stay as they are.
run: .venv/installed
	@mkdir -p build/notebooks
	@set -e; export RESNET_PROFILE=quick; n=0; \
	$(BIN)/python -c "import resnet_helpers as rh; rh.load_data(rh.prepare_dataset())"; \
	for name in $(NOTEBOOKS); do \
		n=$$((n + 1)); echo; echo "=== [$$n/4] notebooks/$$name.ipynb ==="; \
		$(PAPERMILL) notebooks/$$name.ipynb build/notebooks/$$name.ipynb $(CALM); \
	done; \
	$(BIN)/python -c "import resnet_helpers as rh; folder = rh.results_folder(); \
		print('\nValidation accuracy in percent, a smoke run on', folder.name, '(no evidence):\n'); \
		print((folder / 'ablation.md').read_text()); print('Runs and figures:', folder)"; \
	echo "Executed notebooks: $(CURDIR)/build/notebooks"

# The full grid, seed by seed; what is there is not trained again, what was cut off goes on.
full: .venv/installed
	@mkdir -p build/notebooks
	@set -e; for seed in $(SEEDS); do \
		$(PAPERMILL) notebooks/03_training.ipynb build/notebooks/03_training-seed$$seed.ipynb \
			-p profile full -y "{seeds: [$$seed], networks: [$(NETWORKS)]}" $(CALM); \
	done

# Beside the grid, one seed: other learning rates, and shortcuts without parameters. Notebook 4 shows both.
checks: .venv/installed
	@mkdir -p build/notebooks
	@set -e; train="$(PAPERMILL) notebooks/03_training.ipynb build/notebooks/03_training"; \
	for rate in 0.0003 0.003; do \
		$$train-rate$$rate.ipynb -p profile full \
			-y "{networks: [plain34, resnet34, plain50, resnet50], changes: {learning_rate: $$rate}}" $(CALM); \
	done; \
	$$train-zero_pad.ipynb -p profile full -y "{networks: [resnet34, resnet50], changes: {shortcut: zero_pad}}" $(CALM)

# The committed notebooks, anew from the full results.
render: .venv/installed
	@set -e; cd notebooks; for name in $(NOTEBOOKS); do \
		echo "notebooks/$$name.ipynb"; RESNET_PROFILE=full ../$(BIN)/jupyter execute --inplace $$name.ipynb $(CALM); \
	done

test: .venv/installed-tests
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-tests: .venv/installed tests/requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	@touch $@

clean:
	rm -rf build .venv results/quick results/test

# make demo      from nothing to a trained detector
# make format    rewrite the code as the linter wants it
# make quick     the short unit tests: a minute and a half
# make test      what CI runs: lint, and every test but the slow ones
# make test_all  lint and every test; before a release
# make gpu       what only a GPU can answer, in 8 minutes; DRY=1: at toy size on the CPU
# make fuzz      damaged and hostile files by the thousand: an hour or so; FUZZ_EXAMPLES=1000: less
# make wheel     the installable package, in dist/
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo

.PHONY: demo format lint quick test test_all fuzz gpu wheel env env-test sanitize clean-demo

env: $(VENV)/.installed
env-test: $(VENV)/.installed-test

$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or later is needed, this is %d.%d: make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 10) else 0)'
	@echo "making $(VENV): a few minutes and about 5 GB, once"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed tests/requirements.txt
	$(BIN)/python -m pip install --quiet --requirement tests/requirements.txt
	@touch $@

# An interrupted demo continues from its last checkpoint.
demo: env
	$(BIN)/python -m datasets.shapes --output_dir data/shapes
	@if [ -f $(DEMO)/last.pth ]; then \
		$(BIN)/python main.py train --resume $(DEMO)/last.pth; \
	else \
		$(BIN)/python main.py train --config configs/shapes_tiny.yaml --output_dir $(DEMO); \
	fi
	$(BIN)/python main.py eval --checkpoint $(DEMO)/last.pth
	$(BIN)/python main.py predict --checkpoint $(DEMO)/last.pth \
		--input 'data/shapes/val2017/50000?.jpg' --output_dir $(DEMO)/predictions
	@echo "images with boxes: $(DEMO)/predictions and, beside the truth, $(DEMO)/pictures"
	@echo "loss and AP over epochs: $(DEMO)/curves.png"

lint: env-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .

format: env-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A process per core, each with one thread; the tests of a file share what they prepare.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

quick: env-test
	$(PYTEST) tests/unit -m "not slow and not long"

test: lint
	$(PYTEST) -m "not slow"

test_all: lint
	$(PYTEST)

# Whatever these files hold, a reader that takes more than 16 GB fails, too.
FUZZ_EXAMPLES ?= 5000
fuzz: env-test
	ulimit -v 16000000; FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -n auto --dist load tests/fuzz

# Makes no environment: a machine with a GPU comes with a PyTorch that fits it.
gpu:
	$(firstword $(wildcard $(BIN)/python) $(PYTHON)) -m tests.gpu $(if $(DRY),--dry)

wheel: env
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

# The CPU kernel under AddressSanitizer with UndefinedBehaviorSanitizer, then under ThreadSanitizer.
SANITIZE := $(CXX) -std=c++17 -O1 -g -pthread -mavx2 -mfma tests/sanitizers/cpu_kernel.cpp
sanitize:
	mkdir -p runs
	$(SANITIZE) -fsanitize=address,undefined -fno-sanitize-recover=all -o runs/sanitize && runs/sanitize
	$(SANITIZE) -fsanitize=thread -o runs/sanitize && runs/sanitize

clean-demo:
	rm -rf $(DEMO)

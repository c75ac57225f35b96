# make demo      fresh machine to certified network: environment, training, ONNX, certificates, plot
# make quick     the first case of each short test, for the inner loop: under 90 s on two cores
# make test      environment, then the test suite
# make test-slow the slow part of it: the shipped configurations, real ONNX networks, more fuzzing of files
# make fuzz      random networks, their bounds attacked (SECONDS=60, SEED=, GRAPHS=, METHODS="bcp CROWN", JSON=file)
# make check     ruff, mypy and the docs
# make reproduce the long training runs, against published figures
# make env       only the environment .venv that all of them use
# With AUTO_LIRPA=PATH each of them uses a checkout of auto_LiRPA 0.7.x in place of the registry's 0.3.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
RUN := $(if $(AUTO_LIRPA),PYTHONPATH=$(abspath $(AUTO_LIRPA))$(if $(PYTHONPATH),:$(PYTHONPATH)),) $(BIN)/
PYTEST_ARGS ?= -n 2
SECONDS ?= 60

.PHONY: env demo quick test test-slow fuzz reproduce check docs benchmark benchmark-slopes benchmark-graddiv benchmark-trainer clean

env: $(STAMP)

# --no-deps: auto-LiRPA 0.3 pins a torch of 2022, onnx2torch and torchvision would replace the torch installed here.
$(STAMP): setup.cfg setup.py Makefile
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --no-deps auto-LiRPA==0.3 onnx2torch==1.5.15 torchvision==0.28.0
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

demo: env
	$(RUN)python examples/demo.py

quick: env
	OMP_NUM_THREADS=1 $(RUN)python -m pytest $(PYTEST_ARGS) --quick tests

test: env
	OMP_NUM_THREADS=1 $(RUN)python -m pytest $(PYTEST_ARGS) tests

test-slow: env
	OMP_NUM_THREADS=1 $(RUN)python -m pytest $(PYTEST_ARGS) -m slow tests

fuzz: env
	OMP_NUM_THREADS=1 $(RUN)python tests/run_fuzz.py --seconds $(SECONDS) $(if $(SEED),--seed $(SEED)) \
		$(if $(GRAPHS),--graphs $(GRAPHS)) $(if $(METHODS),--methods "$(METHODS)") $(if $(JSON),--json $(JSON))

reproduce: env
	OMP_NUM_THREADS=2 $(RUN)python -m pytest -m reproduction tests

check: env docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: env
	$(BIN)/python -m sphinx -W -q -b html docs docs/_build

benchmark: env
	OMP_NUM_THREADS=1 $(RUN)python benchmarks/bcp.py

benchmark-slopes: env
	OMP_NUM_THREADS=1 $(RUN)python benchmarks/slopes.py

benchmark-graddiv: env
	OMP_NUM_THREADS=1 $(RUN)python benchmarks/graddiv_step.py

benchmark-trainer: env
	OMP_NUM_THREADS=1 $(RUN)python benchmarks/trainer.py

clean:
	rm -rf $(VENV) build docs/_build demo_results runs sweeps *.egg-info

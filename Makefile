# The index of commands: `make` alone lists them. Every target sets itself up.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
# huge pages for large temporaries save a tenth of the training time on a CPU; waiting threads give way, as in the program
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
export GOMP_SPINCOUNT ?= 20000
export PIP_QUIET := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# commands and tests start many processes, which need not compile the same modules again
unexport PYTHONDONTWRITEBYTECODE
LAB := $(BIN)/diffusion-lab
# where training runs, studies too: LAUNCHER=slurm submits it, as conf/hydra/launcher/slurm.yaml says
ELSEWHERE := $(if $(LAUNCHER),hydra/launcher=$(LAUNCHER))
TRAIN := $(LAB) train $(ELSEWHERE) 'logger=[wandb,tensorboard]'
FIRST ?= outputs/fashion_mnist_kl/first
NAME :=  # a file of conf/study; not that of the environment, which may name the machine
JOBS ?= 2

.PHONY: help setup train train-unet train-dit train-latent sample toy study demo dashboard dashboard-mlflow test \
	test-long test-slow test-gpu test-simulated-gpu bench-gpu test-slurm lint format pages docs docs-serve tutorial build clean

help:        ### list the commands
	@for marks in '## ' '### '; do \
		awk -F":.* $$marks" "/^[a-z0-9-]+:.* $$marks/"'{printf "  make %-21s %s\n", $$1, $$2}' $(MAKEFILE_LIST); echo; done

setup: .venv/installed  ### make .venv with everything the commands and the tests need

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; write make PYTHON=python3.12 ..."; exit 1; }
	@# of 17,000 modules, those that are used are compiled when they are first imported
	@if command -v uv >/dev/null; then \
		uv venv --quiet --clear --seed --python $(PYTHON) .venv && uv sync --quiet --frozen --inexact --extra dev; \
	else $(PYTHON) -m venv .venv && $(BIN)/pip install --no-compile -e '.[dev]'; fi
	@touch $@

train: setup  ## train a small model on FashionMNIST to a picture and a FID, in minutes on a CPU
	$(TRAIN) experiment=quickstart $(ARGS)

train-unet: setup  ## train the FashionMNIST U-Net on all GPUs, or the CPU: ARGS="seed=1 ..."
	$(TRAIN) experiment=fashion_mnist/unet $(ARGS)

train-dit: setup  ## train the FashionMNIST DiT on all GPUs, or the CPU; on a cluster: LAUNCHER=slurm
	$(TRAIN) experiment=fashion_mnist/dit $(ARGS)

train-latent: setup  ### train a KL autoencoder of FashionMNIST, then a DiT in its latents: ARGS="seed=1 ..."
	test -f $(FIRST)/first_stage.safetensors || $(LAB) train-autoencoder $(ELSEWHERE) \
		$$(test -f $(FIRST)/checkpoints/last.ckpt && echo resume=$(FIRST) || echo experiment=fashion_mnist/kl run_dir=$(FIRST))
	$(TRAIN) experiment=fashion_mnist/latent_dit first_stage.run=$(FIRST) $(ARGS)

sample: setup  ## draw clothes with a U-Net that ships with the package, without any training
	$(LAB) sample run=pretrained:fashion_mnist_unet $(ARGS)

toy: setup  ### diffusion in the plane: train on two moons, draw the samplers' paths
	run=outputs/two_moons/$$(date +%Y-%m-%d_%H-%M-%S) && \
	$(LAB) train experiment=toy/two_moons run_dir=$$run $(ARGS) && \
	$(BIN)/python experiments/theory/figures.py $$run

study: setup  ## run a study to its page, or list the studies: NAME=unet_vs_dit JOBS=2 ARGS="seeds=0,1"; LAUNCHER=slurm
	$(LAB) study $(if $(NAME),$(NAME) $(or $(ELSEWHERE),jobs=$(JOBS))) $(ARGS)

demo: setup  ## watch two models draw step by step, on a page: the shipped one and the newest of `make train`, or RUN="... ..."
	$(LAB) demo $(or $(RUN),pretrained:fashion_mnist_unet $$(ls -dt outputs/quickstart/*/ 2>/dev/null | head -1)) $(ARGS)

dashboard: setup  ## show the runs in outputs/ in TensorBoard, at http://localhost:6006
	$(BIN)/tensorboard --logdir outputs $(ARGS)

# MLflow's server wants SQLAlchemy 2, and Optuna's sweeper 1
.venv/mlflow/installed: .venv/installed
	$(BIN)/pip install -e '.[mlflow]'
	$(PYTHON) -m venv .venv/mlflow
	.venv/mlflow/bin/pip install "mlflow==$$($(BIN)/python -c 'from importlib.metadata import version; print(version("mlflow"))')"
	@touch $@

dashboard-mlflow: .venv/mlflow/installed  ### show the runs logged to MLflow, at http://localhost:5000
	.venv/mlflow/bin/mlflow server --backend-store-uri sqlite:///outputs/mlflow/mlflow.db --workers 1 $(ARGS)

test: setup  ## run the tests of less than a third of a second each: two minutes on two idle cores
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m "not long and not slow and not gpu and not slurm" $(ARGS)

test-long: setup  ### run the others of a few seconds, such as whole runs, which continuous integration runs, too
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m "long and not slow and not gpu and not slurm" $(ARGS)

test-slow: .venv/mlflow/installed  ### run the other tests: more cases, several processes, a browser, compilation
	$(BIN)/pip install -e '.[browser,docs]'
	$(BIN)/python -m pytest -q -m "slow and not gpu and not slurm" $(ARGS)

test-gpu: setup  ### run the tests that need a GPU, or two; without one: GPU_TESTS_ON=simulated GPUS=2, or cpu
	DIFFUSION_LAB_GPU_TESTS_ON=$(or $(GPU_TESTS_ON),cuda) DIFFUSION_LAB_SIMULATED_GPUS=$(GPUS) $(BIN)/python -m pytest -q -rs -m gpu $(ARGS)

# the PyTorch whose internals the simulated GPU knows
.venv/simulated/installed: .venv/installed
	$(PYTHON) -m venv .venv/simulated
	.venv/simulated/bin/pip install --no-compile -e '.[dev]' 'torch==2.13.*' 'torchvision==0.28.*'
	PYTHONPATH=tests .venv/simulated/bin/python -c 'from helpers import simulated_gpu; exit(simulated_gpu.missing() or None)' && touch $@

test-simulated-gpu: .venv/simulated/installed  ### run the GPU tests, and each option by itself, on a simulated GPU, and some on two
	$(MAKE) test-gpu BIN=.venv/simulated/bin GPU_TESTS_ON=simulated ARGS='-n auto --dist worksteal $(ARGS)'
	$(MAKE) test-gpu BIN=.venv/simulated/bin GPU_TESTS_ON=simulated GPUS=2 ARGS='-k two_devices $(ARGS)'

bench-gpu: setup  ### speed of U-Net and DiT on a GPU beside diffusers, images/s and share of peak, in outputs/bench-gpu
	$(BIN)/python experiments/benchmarks/backbones.py --device cuda --batch 256 --precision bf16 --layout channels_last --only unet_2m unet_ddpm dit_small_32 dit_s_2 --out outputs/bench-gpu $(ARGS)

test-slurm: setup  ### eleven tests on a SLURM of two nodes on this machine, as root; installs Debian's slurm-wlm and munge
	@tests/compute/slurm/install.sh
	$(BIN)/python -m pytest -q -m slurm $(ARGS)

lint: setup  ### check format, style and types
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

format: setup  ### format the code
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

.venv/docs: pyproject.toml | setup
	@$(BIN)/pip install -e '.[docs]'
	@touch $@

pages: .venv/docs
	$(BIN)/python docs/options.py && $(BIN)/python docs/api.py && $(BIN)/python docs/tutorial.py
	rm -rf docs/pages/experiments docs/pages/diffusion_lab && cp -r experiments docs/pages/
	mkdir -p docs/pages/diffusion_lab/runs && cp -r diffusion_lab/runs/models docs/pages/diffusion_lab/runs/

docs: pages  ### build the documentation in docs/site; a broken link is an error
	PYTHONPATH=docs $(BIN)/python -m zensical build --clean --strict -f docs/zensical.toml

docs-serve: pages  ## read the documentation at http://localhost:8000, rebuilt when a page changes
	PYTHONPATH=docs $(BIN)/python -m zensical serve -f docs/zensical.toml

tutorial: .venv/docs  ## run the notebook docs/tutorial.ipynb, and keep its outputs in it
	rm -rf docs/outputs/tutorial && $(BIN)/python docs/run_tutorial.py

build: setup  ### build the wheel in dist/
	$(BIN)/python -m build --wheel

clean:       ### remove caches and builds; keeps .venv, data and outputs
	rm -rf dist docs/.cache docs/site docs/pages/api docs/pages/options docs/pages/tutorial docs/pages/experiments .pytest_cache .ruff_cache .mypy_cache *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# The index of commands: `make` alone lists them. Every target sets itself up.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
# huge pages for large temporaries: a tenth of the training time on a CPU
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
# commands and tests start many processes, which need not compile the same modules again
unexport PYTHONDONTWRITEBYTECODE
LAB := $(BIN)/diffusion-lab
ARGS ?=
# where training runs, studies too: LAUNCHER=slurm submits it, as conf/hydra/launcher/slurm.yaml says
LAUNCHER ?=
export LAUNCHER  # for the scripts of studies
ELSEWHERE := $(if $(LAUNCHER),hydra/launcher=$(LAUNCHER))
TRAIN := $(LAB) train $(ELSEWHERE)
FIRST ?= outputs/fashion_mnist_kl/first
# the studies: runs at once, each on one thread; SIZE=_cifar10 are those for GPUs, one run on all;
# NAME is of folders in outputs/, for one with other budgets
SIZE ?=
NAME ?=
JOBS ?= $(if $(SIZE),1,2)
IMAGES ?=
BUDGET = $(if $(IMAGES),budget.images=$(IMAGES))
TIME ?=
SAMPLES ?=
THREAD := $(if $(or $(SIZE),$(LAUNCHER)),,OMP_NUM_THREADS=1)
SWEEP := $(THREAD) $(LAB) train -m $(or $(ELSEWHERE),hydra/launcher=joblib hydra.launcher.n_jobs=$(JOBS))
# the commands of a loop, several at once: if they only wait for SLURM, they take memory but no core
EACH := $(THREAD) xargs -P $(if $(filter slurm,$(LAUNCHER)),8,$(JOBS))
comma := ,
CLASSIFIER := $(or $(DIFFUSION_LAB_DATA),data)/extractors/fashion_mnist.safetensors
ONE := outputs/one_model/seed-0
MODEL ?= $(ONE)

.PHONY: help setup train train-unet train-dit train-latent speedrun toy \
	study-unet-vs-dit study-write-up study-cifar10-small study-additions study-scaling study-low-data study-conditioning \
	study-latent study-families study-few-steps study-optimizers study-samplers study-guidance one-model \
	dashboard dashboard-mlflow test test-slow test-gpu bench-gpu test-slurm lint format pages docs docs-serve tutorial build clean

help:        ## list the commands
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/installed  ## make .venv with everything the commands and the tests need

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; write make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	@# of 17,000 modules, those that are used are compiled when they are first imported
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -e '.[dev]'
	@touch $@

train: setup  ## train a small model on FashionMNIST to a picture and a FID, in minutes on a CPU
	$(TRAIN) experiment=quickstart $(ARGS)

train-unet: setup  ## train the FashionMNIST U-Net on all GPUs, or the CPU: ARGS="seed=1 ..."
	$(TRAIN) experiment=fashion_mnist/unet $(ARGS)

train-dit: setup  ## train the FashionMNIST DiT on all GPUs, or the CPU; on a cluster: LAUNCHER=slurm
	$(TRAIN) experiment=fashion_mnist/dit $(ARGS)

train-latent: setup  ## train a KL autoencoder of FashionMNIST, then a DiT in its latents: ARGS="seed=1 ..."
	test -f $(FIRST)/first_stage.safetensors || $(LAB) train-autoencoder $(ELSEWHERE) \
		$$(if test -f $(FIRST)/checkpoints/last.ckpt; then echo resume=$(FIRST); \
		else echo experiment=fashion_mnist/kl run_dir=$(FIRST); fi)
	$(TRAIN) experiment=fashion_mnist/latent_dit first_stage.run=$(FIRST) $(ARGS)

# a trial of the quickstart: NAME and CHANGE describe it, ARGS are its overrides
speedrun: setup  ## train the quickstart for three seeds and add it to experiments/speedrun: NAME=... CHANGE="..." ARGS="..."
	$(BIN)/python experiments/speedrun/speedrun.py $(or $(NAME),$$(git rev-parse --short HEAD)) \
		"$(or $(CHANGE),the quickstart of this commit)" $(ARGS)

toy: setup  ## diffusion in the plane: train on two moons, draw the samplers' paths
	run=outputs/two_moons/$$(date +%Y-%m-%d_%H-%M-%S) && \
	$(LAB) train experiment=toy/two_moons run_dir=$$run $(ARGS) && \
	$(BIN)/python experiments/theory/figures.py $$run

$(dir $(CLASSIFIER))%.safetensors: | setup
	$(LAB) train-extractor $(ELSEWHERE) data=$* output=$@

# $(1): file in conf/study, $(2): its folder, $(3): more overrides, $(4): those that ARGS does not change
define train_study
$(SWEEP) +study=$(1) study_name=$(2) $(3) $(ARGS) $(4)
endef
# the runs $(1) in several ways; the name of the sweep and its overrides follow
define sweep_each
ls -d $(1) | $(EACH) -I{} experiments/sweep.sh $(LAB) {}
endef
define compare_study
$(LAB) compare outputs/$(1) output=outputs/$(1)/comparison
endef

study-unet-vs-dit: IN_IMAGES = $(or $(NAME),unet_vs_dit$(SIZE))
study-unet-vs-dit: IN_TIME = $(if $(NAME),$(NAME)_seconds,unet_vs_dit_seconds$(SIZE))
study-unet-vs-dit: IN_SECONDS = tuning.study=$(IN_IMAGES) $(if $(TIME),budget.seconds=$(TIME))
study-unet-vs-dit: setup $(if $(SIZE),,$(CLASSIFIER))  ## U-Net, DiT and Mamba-2 at equal MACs and images, in equal time, and a DiT on smaller patches: IMAGES=300_000 TIME=300 ARGS="seed=0,1"
	$(call train_study,unet_vs_dit$(SIZE),$(IN_IMAGES),$(BUDGET))
	$(call train_study,unet_vs_dit_seconds$(SIZE),$(IN_TIME),$(IN_SECONDS))
	$(if $(SIZE),,$(call train_study,unet_vs_dit,$(IN_IMAGES)_patches,$(BUDGET) backbone=dit backbone.patch=2))
	$(call compare_study,$(IN_IMAGES))
	$(if $(SIZE),,$(LAB) compare outputs/$(IN_IMAGES) outputs/$(IN_IMAGES)_patches output=outputs/$(IN_IMAGES)_patches/comparison)
	$(call compare_study,$(IN_TIME))

study-write-up: STUDY = $(or $(NAME),write_up)
study-write-up: DRAWN = guidance.clip=1 metrics.reference_size=10_000 metrics.num_samples=$(or $(SAMPLES),500)
study-write-up: setup $(CLASSIFIER)  ## a U-Net and a DiT as DDPMs: steps of DDIM, ancestral sampling, guidance: IMAGES=200_000 SAMPLES=500
	$(call train_study,write_up,$(STUDY),$(BUDGET))
	$(call sweep_each,outputs/$(STUDY)/*_seed-*) steps $(DRAWN) sampler=ddim steps=10,20,50,100,250
	$(call sweep_each,outputs/$(STUDY)/*_seed-*) guidance $(DRAWN) sampler=ddim steps=50 guidance.scale=1,1.5,2,3
	$(call sweep_each,outputs/$(STUDY)/*_seed-*) ancestral $(DRAWN) sampler=ddpm steps=1000
	$(call compare_study,$(STUDY))

study-cifar10-small: STUDY = $(or $(NAME),cifar10_small)
study-cifar10-small: setup $(dir $(CLASSIFIER))cifar10_zip.safetensors  ## U-Net, DiT and Mamba-2 on CIFAR-10 in JPEG pixels, on two cores: IMAGES=160_000
	$(call train_study,cifar10_small,$(STUDY),$(BUDGET))
	$(call compare_study,$(STUDY))

# each addition is tuned as its network without it: $(1): its name, $(2): its overrides
define train_addition
$(call train_study,additions,$(STUDY)_$(1),$(IN_SECONDS) $(2))
endef
# the additions $(2) beside the networks $(3) without them, as $(1)
define compare_additions
$(LAB) compare $(foreach network,$(3),outputs/$(STUDY)/backbone-$(network)_seed-*) $(foreach each,$(2),outputs/$(STUDY)_$(each)) \
	output=outputs/$(STUDY)/comparison_$(1)
endef
study-additions: STUDY = $(or $(NAME),additions)
study-additions: IN_SECONDS = $(if $(TIME),budget.seconds=$(TIME))
study-additions: PATCHES = backbone.patch=7 metrics.patch=7
study-additions: X0 = objective/prediction=x0 objective/weighting=velocity
# EDM2's own optimiser and rate; its channels go up in fours, so that 14.5 % is as near as it comes
study-additions: EDM2 = optimizer=adam optimizer.betas=[0.9,0.99] lr_schedule=inverse_sqrt lr_schedule.warmup_images=2_000 \
	lr_schedule.reference_images=10_000 budget.tolerance=0.16 "tuning.values={optimizer.lr:[5e-3,1e-2,2e-2]}"
# as many images as the DiT saw with alignment, at the rate that was best after nearly as many
study-additions: FEWER = backbone=dit protocol=null tuning=none optimizer.lr=8e-3 budget.seconds=null \
	budget.images=$(or $(IMAGES),33_800)
study-additions: setup $(CLASSIFIER)  ## EDM2's U-Net, blocks of later transformers, x0-prediction, alignment, coupling and a Huber loss, in equal time: TIME=240
	$(call train_study,additions,$(STUDY),$(IN_SECONDS))
	$(call train_addition,edm2,backbone=edm2 backbone.head_channels=12 $(EDM2))
	$(call train_addition,coupling,backbone=unet_small coupling=optimal_transport)
	$(call train_addition,huber,backbone=unet_small objective.huber=5.4e-4)
	$(call train_addition,alignment,backbone=dit alignment=efficientnet_lite0)
	$(call train_addition,x0,backbone=dit $(X0))
	$(call train_addition,patches,backbone=dit $(PATCHES))
	$(call train_addition,patches_x0,backbone=dit $(PATCHES) $(X0))
	$(call train_study,additions,$(STUDY)_fewer,$(FEWER))
	$(call compare_additions,unet,edm2 coupling huber,unet_small)
	$(call compare_additions,dit,alignment x0,dit dit_modern)
	$(call compare_additions,patches,patches patches_x0)
	$(call compare_additions,mamba2,,mamba2 mamba2_modern)
	$(call compare_additions,images,alignment fewer)

study-scaling: STUDY = $(or $(NAME),scaling)
study-scaling: setup $(CLASSIFIER)  ## U-Net and DiT in four sizes and three budgets, and their scaling laws: ARGS="seed=0,1,2"
	$(call train_study,scaling,$(STUDY))
	$(call compare_study,$(STUDY))

study-low-data: STUDY = $(or $(NAME),low_data$(SIZE))
study-low-data: setup $(if $(SIZE),,$(CLASSIFIER))  ## U-Net, DiT and Mamba-2 on 0.1, 1, 10 and 100 % of the data, and what they copy: IMAGES=60_000 ARGS="seed=0,1"
	$(call train_study,low_data$(SIZE),$(STUDY),$(BUDGET))
	ls -d outputs/$(STUDY)/*_seed-* | $(EACH) -n 1 experiments/low_data/copies.sh $(LAB) $(or $(SAMPLES),1000)
	$(call compare_study,$(STUDY))

study-conditioning: STUDY = $(or $(NAME),conditioning)
# S6 takes too long on a CPU to be tuned, for more than a seed, or for as many images
study-conditioning: TRY_OUT = backbone=mamba seed=0 protocol=null tuning=none optimizer.lr=0.008
study-conditioning: setup $(CLASSIFIER)  ## four conditionings of DiT and Mamba-2 at equal parameters, and of Mamba as a try-out: IMAGES=80_000
	$(call train_study,conditioning,$(STUDY),$(BUDGET))
	$(call train_study,conditioning,$(STUDY)_mamba,$(or $(BUDGET),budget.images=20_000) $(TRY_OUT))
	for network in dit mamba2; do $(LAB) compare outputs/$(STUDY)/backbone-$${network}_* \
		output=outputs/$(STUDY)/comparison_$$network || exit; done
	$(call compare_study,$(STUDY)_mamba)

# Muon's images are those of AdamW over the ratio of their steps (experiments/optimizers)
study-optimizers: STUDY = $(or $(NAME),optimizers)
study-optimizers: setup  ## AdamW or Muon for U-Net, DiT and Mamba-2, in equal time, each at its best rate
	printf '%s\n' "unet_small adamw 64_000 32_000" "unet_small muon 57_600 28_800" "dit adamw 64_000 32_000" \
		"dit muon 51_200 25_600" "mamba2 adamw 64_000 32_000" "mamba2 muon 56_960 28_480" | \
	$(EACH) -L 1 sh -c '$(LAB) train -m $(ELSEWHERE) +study=optimizers study_name=$(STUDY) \
		backbone=$$0 optimizer=$$1 budget.images=$(or $(IMAGES),$$2) tuning.images=$(or $(IMAGES),$$3) $(ARGS)'
	$(call compare_study,$(STUDY))

# an autoencoder has no budget of seconds
define for_seconds
trainer.max_steps=1_000_000 trainer.max_time=$(shell printf 00:%02d:%02d:%02d \
	$$(($(1) / 3600)) $$(($(1) / 60 % 60)) $$(($(1) % 60)))
endef
study-latent: STUDY = $(or $(NAME),latent)
study-latent: STAGE = outputs/$(STUDY)_stages/kl
study-latent: IN_LATENTS = first_stage=kl first_stage.run=$(STAGE) backbone.multipliers=[1,2] backbone.attention=[1] \
	budget.reference=null denoiser.clip=null
study-latent: IN_SECONDS = $(if $(TIME),budget.seconds=$(TIME))
study-latent: STAGE_SECONDS = $(or $(firstword $(subst $(comma), ,$(TIME))),300)
study-latent: setup $(CLASSIFIER)  ## a U-Net on pixels and in latents, with the time of the first stage counted: TIME=300,600
	$(THREAD) $(LAB) train-autoencoder $(ELSEWHERE) experiment=fashion_mnist/kl reconstruction=perceptual_adversarial \
		study_name=$(STUDY)_stages run_dir=$(STAGE) $(call for_seconds,$(STAGE_SECONDS))
	$(call train_study,latent,$(STUDY),$(IN_SECONDS))
	$(call train_study,latent,$(STUDY),$(IN_LATENTS) $(IN_SECONDS))
	$(call compare_study,$(STUDY))

study-families: STUDY = $(or $(NAME),families)
study-families: STAGES = outputs/$(STUDY)_stages
study-families: IN_SECONDS = $(if $(TIME),budget.seconds=$(TIME))
# the first stages take a third of the time
study-families: ALL = $(or $(TIME),600)
study-families: AFTER = budget.seconds=$(call of_all,* 2 / 3)
study-families: MEASURED = $(if $(SAMPLES),metrics.num_samples=$(SAMPLES))
study-families: DENOISE = optimizer=muon objective=flow_matching_short sampler=unipc sampler.steps=10 backbone.blocks=1
study-families: IN_LATENTS = backbone=unet backbone.channels=48 backbone.multipliers=[1,2] backbone.attention=[1] \
	first_stage=kl first_stage.run=$(STAGES)/kl
# a transformer of codes takes larger steps than the denoisers
study-families: RATES = "tuning.values={optimizer.lr:[16e-3,32e-3,64e-3]}"
study-families: setup $(CLASSIFIER)  ## diffusion, latent diffusion, an autoregressive model, a GAN and a VAE in equal time: TIME=600 SAMPLES=5000
	printf '%s\n' kl vq | $(EACH) -I{} $(LAB) train-autoencoder $(ELSEWHERE) experiment=fashion_mnist/{} \
		study_name=$(STUDY)_stages run_dir=$(STAGES)/{} $(call for_seconds,$(call of_all,/ 3))
	$(call train_study,families,$(STUDY),$(DENOISE) denoiser.clip=1 backbone.channels=36 $(IN_SECONDS) $(MEASURED))
	$(call train_study,families,$(STUDY),$(DENOISE) $(IN_LATENTS) $(AFTER) $(MEASURED))
	$(call train_study,families,$(STUDY),family=autoregressive backbone=code_transformer optimizer=muon \
		backbone.width=136 backbone.heads=4 first_stage.run=$(STAGES)/vq $(RATES) $(AFTER) $(MEASURED))
	@# one that collapses ends with an error; the comparison then says which seeds are missing
	-$(call train_study,families,$(STUDY),family=gan backbone=generator $(IN_SECONDS) $(MEASURED))
	experiments/families/vae.sh $(LAB) $(STUDY) $(JOBS) "$(call for_seconds,120)" \
		"$(call for_seconds,$(or $(TIME),600))" $(or $(SAMPLES),5000) $(CLASSIFIER)
	$(call compare_study,$(STUDY))

# a step of training is a forward and, as two, a backward pass: 3 forward passes. MeanFlow's is 4 with
# its derivative, a shortcut's 3.5 on average, ECT's 4, and that of distillation 6. The models that
# the last three start from are trained for half of the FLOPs; reflow draws 10 calls for each pair.
# A tuning run has a quarter of the images; its seed needs models to start from, too.
of_all = $(shell echo $$(($(ALL) $(1))))
for_images = budget.images=$(call of_all,$(1)) tuning.images=$(call of_all,$(1) / 4)
study-few-steps: STUDY = $(or $(NAME),few_steps)
study-few-steps: ALL = $(subst _,,$(or $(IMAGES),72000))
study-few-steps: HALF = $(call of_all,/ 2)
study-few-steps: PAIRS = $(call of_all,/ 24)
study-few-steps: NETWORK = $${hydra:runtime.choices.backbone}-$${seed}
study-few-steps: CALLS = callbacks.evaluation.also_steps=[1,2,4,8]
study-few-steps: TEACHER = objective=flow_matching_short denoiser.clip=1 sampler=unipc sampler.steps=10
study-few-steps: STAGE = protocol=null tuning=none optimizer.lr=8e-3 callbacks.evaluation=null budget.images=$(HALF)
study-few-steps: FLOW = $(STAGE) $(TEACHER) 'run_dir=outputs/$(STUDY)_stages/flow-$(NETWORK)'
study-few-steps: EDM = $(STAGE) objective=edm schedule=edm 'run_dir=outputs/$(STUDY)_stages/edm-$(NETWORK)'
study-few-steps: setup $(CLASSIFIER)  ## 1 to 8 network calls: a teacher, MeanFlow, shortcuts, consistency and reflow: IMAGES=72000
	$(call train_study,few_steps,$(STUDY),$(TEACHER) $(CALLS) $(call for_images,))
	$(call train_study,few_steps,$(STUDY),objective=mean_flow $(call for_images,* 3 / 4))
	$(call train_study,few_steps,$(STUDY),objective=shortcut $(call for_images,* 6 / 7))
	$(call train_study,few_steps,$(STUDY)_stages,$(FLOW))
	$(call train_study,few_steps,$(STUDY)_stages,$(EDM))
	$(call train_study,few_steps,$(STUDY)_stages,$(FLOW),backbone=unet_small seed=100)
	$(call train_study,few_steps,$(STUDY)_stages,$(EDM),backbone=unet_small seed=100)
	$(call train_study,few_steps,$(STUDY),objective=reflow $(call for_images,* 26 / 72) \
		objective.teacher.count=$(PAIRS) objective.teacher.steps=10 \
		'objective.teacher.run=outputs/$(STUDY)_stages/flow-$(NETWORK)' \
		'init_from=outputs/$(STUDY)_stages/flow-$(NETWORK)')
	$(call train_study,few_steps,$(STUDY),objective=ect schedule=edm $(call for_images,* 3 / 8) \
		objective.jump_loss.stage_images=$(call of_all,/ 16) \
		'tuning.overrides=["backbone=unet_small"$(comma)"objective.jump_loss.stage_images=$(call of_all,/ 64)"]' \
		'init_from=outputs/$(STUDY)_stages/edm-$(NETWORK)')
	$(call train_study,few_steps,$(STUDY),objective=consistency_distillation schedule=edm $(call for_images,/ 4) \
		'objective.teacher.run=outputs/$(STUDY)_stages/edm-$(NETWORK)' \
		'init_from=outputs/$(STUDY)_stages/edm-$(NETWORK)')
	for network in unet_small dit; do \
		$(LAB) compare outputs/$(STUDY)/backbone-$${network}_* output=outputs/$(STUDY)/comparison_$$network && \
		$(BIN)/python experiments/sampled.py outputs/$(STUDY)/calls_$$network.csv outputs/$(STUDY)/backbone-$${network}_* || exit; done
	$(BIN)/python experiments/lines.py $(addprefix outputs/$(STUDY)/,by_calls.png calls_unet_small.csv calls_dit.csv)

# the sweep $(1) of all models in one file and figure
define sweeps_of_all
$(BIN)/python experiments/sampled.py outputs/$(1).csv $(MODEL)
$(BIN)/python experiments/lines.py outputs/$(1).png outputs/$(1).csv --sweep $(1)
endef
# the model of the next two, if it is not one of yours
one-model: setup
	$(if $(filter $(ONE),$(MODEL)),$(TRAIN) experiment=quickstart study_name=one_model run_dir=$(ONE) \
		guidance=none budget=images budget.images=192_000)

study-samplers: one-model  ## thirteen samplers at 5 to 50 steps, and ten of them on three grids: MODEL="outputs/... outputs/..." for some of yours
	$(call sweep_each,$(MODEL)) $(or $(NAME),samplers) guidance=none steps=5,10,20,50 metrics.num_samples=1000 \
		sampler=ddim,ddpm,heun,dpm_solver,dpm_solver_3m,sde_dpm_solver,dpm_solver_2s_ancestral,unipc,deis,ipndm,restart,reverse_sde,predictor_corrector $(ARGS)
	$(call sweep_each,$(MODEL)) $(or $(NAME),samplers)_grids guidance=none steps=10 metrics.num_samples=1000 \
		sampler=ddim,ddpm,heun,dpm_solver,sde_dpm_solver,unipc,deis,ipndm,reverse_sde,predictor_corrector \
		sampler/time_grid=uniform,karras,uniform_logsnr sampler.time_grid.sigma_min=0.002,0.1 $(ARGS)
	$(call sweeps_of_all,$(or $(NAME),samplers)) --x calls --by sampler

# a model of yours may be of other data: ARGS="metrics.classifier=..." names its classifier
study-guidance: STEPS = 10,20
study-guidance: one-model $(if $(filter $(ONE),$(MODEL)),$(CLASSIFIER))  ## FID and conditional accuracy against the scale of guidance: MODEL="outputs/... outputs/..." STEPS=10,20
	$(call sweep_each,$(MODEL)) $(or $(NAME),guidance) guidance=classifier_free steps=$(STEPS) \
		guidance.scale=0,1,1.25,1.5,2,3,4,6 metrics.num_samples=2000 \
		$(if $(filter $(ONE),$(MODEL)),metrics.classifier=$(CLASSIFIER)) $(ARGS)
	$(call sweeps_of_all,$(or $(NAME),guidance)) --x guidance.scale --by network --linear --y fid,accuracy,recall

dashboard: setup  ## show the runs in outputs/ in TensorBoard, at http://localhost:6006
	$(BIN)/tensorboard --logdir outputs $(ARGS)

# MLflow's server wants SQLAlchemy 2, and Optuna's sweeper 1
.venv/mlflow/installed: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[mlflow]'
	$(PYTHON) -m venv .venv/mlflow
	.venv/mlflow/bin/pip install --quiet --disable-pip-version-check \
		"mlflow==$$($(BIN)/python -c 'from importlib.metadata import version; print(version("mlflow"))')"
	@touch $@

dashboard-mlflow: .venv/mlflow/installed  ## show the runs logged to MLflow, at http://localhost:5000
	.venv/mlflow/bin/mlflow server --backend-store-uri sqlite:///outputs/mlflow/mlflow.db --workers 1 $(ARGS)

test: setup  ## run the default tests, about three minutes on two idle cores
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m "not slow and not gpu and not slurm" $(ARGS)

test-slow: .venv/mlflow/installed  ## run the other tests: more cases, several processes, a browser, compilation
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[browser,docs]'
	$(BIN)/python -m pytest -q -m "slow and not gpu and not slurm" $(ARGS)

# GPU_TESTS_ON=cpu tries the tests themselves where there is no GPU
test-gpu: setup  ## run the tests that need a GPU, or two; on other machines they skip
	DIFFUSION_LAB_GPU_TESTS_ON=$(or $(GPU_TESTS_ON),cuda) $(BIN)/python -m pytest -q -rs -m gpu $(ARGS)

bench-gpu: setup  ## speed of U-Net and DiT on a GPU beside diffusers, images/s and share of peak, in outputs/bench-gpu
	$(BIN)/python experiments/benchmarks/backbones.py --device cuda --batch 256 --precision bf16 \
		--layout channels_last --only unet_2m unet_ddpm dit_small_32 dit_s_2 --out outputs/bench-gpu $(ARGS)

test-slurm: setup  ## eleven tests on a SLURM of two nodes on this machine, as root; installs Debian's slurm-wlm and munge
	@tests/compute/slurm/install.sh
	$(BIN)/python -m pytest -q -m slurm $(ARGS)

lint: setup  ## check format, style and types
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

format: setup  ## format the code
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

.venv/docs: pyproject.toml | setup
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[docs]'
	@touch $@

# pages that are made: of options from conf/, of the API from docstrings, of the notebook, experiments/
pages: .venv/docs
	$(BIN)/python docs/options.py && $(BIN)/python docs/api.py && $(BIN)/python docs/tutorial.py
	rm -rf docs/pages/experiments && cp -r experiments docs/pages/

docs: pages  ## build the documentation in docs/site; a broken link is an error
	PYTHONPATH=docs $(BIN)/python -m zensical build --clean --strict -f docs/zensical.toml

docs-serve: pages  ## read the documentation at http://localhost:8000, rebuilt when a page changes
	PYTHONPATH=docs $(BIN)/python -m zensical serve -f docs/zensical.toml

tutorial: .venv/docs  ## run the notebook docs/tutorial.ipynb, and keep its outputs in it
	rm -rf docs/outputs/tutorial
	$(BIN)/python docs/run_tutorial.py

build: setup  ## build the wheel in dist/
	$(BIN)/python -m build --wheel

clean:       ## remove caches and builds; keeps .venv, data and outputs
	rm -rf dist build docs/.cache docs/site docs/pages/api docs/pages/options docs/pages/tutorial docs/pages/experiments .pytest_cache .ruff_cache .mypy_cache *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

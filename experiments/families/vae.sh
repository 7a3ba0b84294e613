#!/bin/sh
# Tunes the learning rate of the study's VAE by FID to validation images, as the other families' are, trains
# it for three seeds, and measures their samples; what is finished is not repeated:
#   vae.sh diffusion-lab STUDY JOBS "TUNING LIMITS" "LIMITS" SAMPLES CLASSIFIER
set -e
lab=$1 study=$2 jobs=$3 for_tuning=$4 for_training=$5 samples=$6 classifier=$7
tuned=outputs/${study}_vae_tuning
launcher=${LAUNCHER:+"hydra/launcher=$LAUNCHER"}
train() {
	OMP_NUM_THREADS=1 "$lab" train-autoencoder -m ${launcher:-hydra/launcher=joblib "hydra.launcher.n_jobs=$jobs"} \
		experiment=fashion_mnist/vae "$@"
}
# evaluate RUN OVERRIDES: unless the run was evaluated
evaluate() {
	run=$1
	shift
	test -n "$(ls "$run/evaluations" 2>/dev/null)" || OMP_NUM_THREADS=1 "$lab" evaluate $launcher run="$run" "$@"
}

# shellcheck disable=SC2086 # limits are several words
train study_name="${study}_vae_tuning" "run_dir='$tuned/lr-\${optimizer.lr}'" seed=100 \
	optimizer.lr=1e-3,2e-3,4e-3,8e-3,16e-3 $for_tuning
for run in "$tuned"/lr-*; do # one whose prior cannot be sampled is refused, and is not the best
	evaluate "$run" seed=100 metrics.reference=validation metrics.num_samples=1000 || test $? = 2
done
best=$("${lab%diffusion-lab}python" experiments/families/best_rate.py "$tuned"/lr-*)
# shellcheck disable=SC2086
train study_name="$study" "run_dir='outputs/$study/vae_seed-\${seed}'" seed=0,1,2 optimizer.lr="$best" $for_training
for run in "outputs/$study"/vae_seed-*; do
	evaluate "$run" seed="${run##*-}" metrics.reference_size=10_000 metrics.num_samples="$samples" metrics.classifier="$classifier"
done

#!/bin/sh
# Measures the samples of a VAE as the study measures those of the others, with its training seed,
# unless that is done:
#   measure.sh CLASSIFIER diffusion-lab outputs/families/vae_seed-0
set -e
classifier=$1 lab=$2 run=$3
test -n "$(ls "$run/evaluations" 2>/dev/null)" && exit
"$lab" evaluate run="$run" seed="${run##*-}" metrics.reference_size=10_000 \
	metrics.num_samples=5000 metrics.classifier="$classifier"

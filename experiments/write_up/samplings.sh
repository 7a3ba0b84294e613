#!/bin/sh
# Samples a run of the study in the ways that its page compares; what was measured is kept:
#   samplings.sh diffusion-lab SAMPLES outputs/write_up/RUN
set -e
lab=$1 samples=$2 run=$3
sweep() {
	folder=$1
	shift
	"$lab" sample-sweep ${LAUNCHER:+"hydra/launcher=$LAUNCHER"} run="$run" \
		output="$run/sweeps/$folder" seed="${run##*-}" guidance.clip=1 \
		metrics.reference_size=10_000 metrics.num_samples="$samples" "$@"
}
sweep steps sampler=ddim steps=10,20,50,100,250
sweep guidance sampler=ddim steps=50 guidance.scale=1,1.5,2,3
sweep ancestral sampler=ddpm steps=1000

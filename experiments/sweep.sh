#!/bin/sh
# Measures a run in several ways, with its own training seed; what was measured before is kept:
#   sweep.sh diffusion-lab RUN FOLDER sampler=ddim steps=10,20
# The results are in RUN/sweeps/FOLDER. experiments/sampled.py puts those of several runs together.
set -e
lab=$1 run=$2 folder=$3
shift 3
seed=$(sed -n 's/^seed: //p' "$run/config.yaml")
exec "$lab" sample-sweep ${LAUNCHER:+"hydra/launcher=$LAUNCHER"} run="$run" \
	output="$run/sweeps/$folder" seed="$seed" "$@"

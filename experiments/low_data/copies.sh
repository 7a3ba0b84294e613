#!/bin/sh
# Measures what a run of the study copies, unless that is done:
#   copies.sh diffusion-lab SAMPLES outputs/low_data/RUN
# A run of the same network on other images of the same number is the control, if there is one.
lab=$1 samples=$2 run=$3
test -f "$run/memorization/report.json" && exit
control=
case $run in
*fraction-1.0*) ;; # all images: no run has others
*) control=$(ls -d "${run%seed-*}"seed-* | grep -vx "$run" | head -1) ;;
esac
"$lab" memorization ${LAUNCHER:+"hydra/launcher=$LAUNCHER"} run="$run" \
	num_samples="$samples" ${control:+"control=$control"}

#!/bin/sh
# Measures what a run of the study copies, unless that is done, with as many samples and with a control:
#   copies.sh diffusion-lab SAMPLES outputs/low_data/RUN
# A run of the same network on other images of the same number is the control, if there is one.
lab=$1 samples=$2 run=$3
control=
case $run in
*fraction-1.0*) ;; # all images: no run has others
*) control=$(ls -d "${run%seed-*}"seed-* | grep -vx "$run" | head -1) ;;
esac
report="$run/memorization/report.json"
if grep -qs "\"num_samples\": $samples," "$report"; then
	test -n "$control" && ! grep -q '"control_limit"' "$report" || exit 0
fi
"$lab" memorization ${LAUNCHER:+"hydra/launcher=$LAUNCHER"} run="$run" \
	num_samples="$samples" ${control:+"control=$control"}

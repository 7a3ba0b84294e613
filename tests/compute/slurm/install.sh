#!/usr/bin/env bash
# What a SLURM cluster on this machine needs: Debian's packages slurm-wlm and munge, and root.
set -euo pipefail
say_need() {
    echo "SLURM's own tests need $1." >&2
    exit 1
}
[ "$(id -u)" = 0 ] || say_need "root, for SLURM's daemons; write sudo make test-slurm"
for program in sbatch slurmctld slurmd munged; do
    if ! command -v $program > /dev/null; then
        command -v apt-get > /dev/null || say_need "$program; install SLURM and munge"
        apt-get -qq update
        DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends slurm-wlm munge
        break
    fi
done

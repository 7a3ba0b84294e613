#!/usr/bin/env bash
# Stops exactly what start.sh has started in FOLDER.
folder=$(realpath -m "$1")
for file in "$folder"/slurmd.*.pid "$folder"/slurmctld.pid "$folder"/munge/munged.pid; do
    [ -s "$file" ] || continue
    pid=$(cat "$file")
    # a daemon that died has left its file, and its number may be another's by now
    case $(ps -o args= -p "$pid") in slurmctld* | "slurmd "* | munged*) kill "$pid" ;; esac
done
exit 0

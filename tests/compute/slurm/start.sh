#!/usr/bin/env bash
# A small SLURM cluster on this machine for tests: loopback only, nothing outside FOLDER is touched.
#   tests/compute/slurm/start.sh FOLDER; export SLURM_CONF=FOLDER/slurm.conf; ...; tests/compute/slurm/stop.sh FOLDER
# Needs root, and Debian's packages slurm-wlm and munge.
set -euo pipefail
folder=$(realpath -m "$1") nodes=2 port=${SLURM_TEST_PORT:-16917}
mkdir -p "$folder"/{state,spool,log,munge}
chmod 755 "$folder/munge"

# a key and a socket of its own
head -c 1024 /dev/urandom > "$folder/munge/key"
chmod 400 "$folder/munge/key"
munged --force --socket="$folder/munge/socket" \
    --key-file="$folder/munge/key" --pid-file="$folder/munge/munged.pid" \
    --log-file="$folder/munge/log" --seed-file="$folder/munge/seed" 2>> "$folder/log/munged.log"

cat > "$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthInfo=socket=$folder/munge/socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
# a job in "urgent" takes the nodes of those in "normal", which get SIGTERM and go back to the queue
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=30
ReturnToService=2
PropagateResourceLimits=NONE
CONF
for i in $(seq $nodes); do  # more processors than there are: tests are about processes, not speed
    echo "NodeName=node$i NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$((port + i)) CPUs=4"
done >> "$folder/slurm.conf"
cat >> "$folder/slurm.conf" <<CONF
PartitionName=normal Nodes=ALL Default=YES PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL PriorityTier=2
CONF
echo CgroupPlugin=disabled > "$folder/cgroup.conf"

export SLURM_CONF=$folder/slurm.conf
slurmctld -c
for i in $(seq $nodes); do
    mkdir -p "$folder/spool/node$i"
    slurmd -N "node$i"
done
for _ in $(seq 100); do
    [ "$(sinfo -h -p normal -t idle -o %D)" = $nodes ] && exit
    sleep 0.2
done
echo "SLURM did not start; see $folder/log" >&2
exit 1

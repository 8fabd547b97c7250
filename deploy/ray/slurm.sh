#!/usr/bin/env bash
# A prelay deployment as a Slurm job: the first node is head and router, then PREFILL nodes read and the rest write.
#
#   PREFILL=1 sbatch --nodes=3 deploy/ray/slurm.sh MODEL_DIR [OPTION of prelay serve...]
#
# To be submitted where prelay is checked out and installed (.venv), on a file system that all nodes see.
#SBATCH --job-name=prelay
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
set -euo pipefail

model=${1:?give the checkpoint: sbatch --nodes=3 deploy/ray/slurm.sh MODEL_DIR}
shift
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
prefill=${PREFILL:-1}
if ((prefill < 1 || ${#nodes[@]} < prefill + 2)); then
    echo "slurm.sh: ${#nodes[@]} nodes: a head, $prefill that read (PREFILL) and one at least that writes are needed" >&2
    exit 2
fi
here=$PWD/deploy/ray
export PATH=$PWD/.venv/bin:$PATH
# The job's own, so that no other job of this user joins.
RAY_AUTH_TOKEN=$(head --bytes=32 /dev/urandom | od -An -tx1 | tr -d ' \n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
address=$(srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" hostname --ip-address | awk '{print $1}')

on() { # NODE COMMAND...: in the background, until the job ends
    local node=$1
    shift
    srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" --export=ALL "$@" &
}

on "${nodes[0]}" "$here/launch.sh" head -- --node-ip-address="$address" --block
sleep 10
for ((i = 1; i < ${#nodes[@]}; i++)); do
    role=decode
    ((i <= prefill)) && role=prefill
    on "${nodes[i]}" "$here/launch.sh" "$role" "$address:6379" -- --block
done
sleep 10
srun --overlap --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" --export=ALL \
    prelay serve "$here/serve.yaml" --ray-address "$address:6379" --model "$model" \
    --prefill "$prefill" --decode $((${#nodes[@]} - 1 - prefill)) "$@"

#!/usr/bin/env bash
# Trains on GPUs of a Slurm cluster: submits slurm_job.sh.
set -euo pipefail
source "$(dirname "$0")/launcher.sh"
source "$(dirname "$0")/common.sh"

usage() {
  cat <<'END'
Trains on GPUs of a Slurm cluster, one process a GPU: installs into .venv what is not there yet, on
the machine it is called on, and submits a job that runs `aavs train`. The project's folder, the
data and the work folder must be on a disk that the nodes share; relative paths start at the
project's folder. At the time limit the job saves, ends and queues again by itself; after any other
end, the same command goes on with the training.

  bash launch/slurm.sh --nodes N --gpus-per-node N [FLAGS] -- ARGUMENTS OF aavs train

  --nodes N            machines (NODES)
  --gpus-per-node N    of each, all of them if others must not share it (GPUS_PER_NODE)
  --cpus-per-gpu N     for reading data (CPUS_PER_GPU, 8)
  --time LIMIT         time limit, as 24:00:00 (SBATCH_TIMELIMIT, the cluster's)
  --partition NAME     (SBATCH_PARTITION, the cluster's)
  --account NAME       (SBATCH_ACCOUNT, the cluster's)
  --sbatch-flag FLAG   one more flag for sbatch, as --qos=long; can be repeated
  --dry-run            print the commands and run none

example, 16 GPUs with 5 frames each a step:
  bash launch/slurm.sh --nodes 2 --gpus-per-node 8 --partition gpu --time 24:00:00 -- \
    --config configs/avss_stage1.py --data data --workdir runs/stage1 \
    --config.data.item_frames=5 --config.data.batch_items=16
END
}

nodes=${NODES:-} gpus=${GPUS_PER_NODE:-} cpus=${CPUS_PER_GPU:-8}
cluster=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in
    --dry-run) dry_run=yes ;;
    --help | -h) usage && exit ;;
    --nodes) need_value "$@" && nodes=$2 && shift ;;
    --gpus-per-node) need_value "$@" && gpus=$2 && shift ;;
    --cpus-per-gpu) need_value "$@" && cpus=$2 && shift ;;
    --time | --partition | --account) need_value "$@" && cluster+=("$1=$2") && shift ;;
    --sbatch-flag) need_value "$@" && cluster+=("$2") && shift ;;
    *) fail "$1 is unknown: arguments of aavs train follow --, see --help" ;;
  esac
  shift
done
[ $# -eq 0 ] || shift
need "$nodes" --nodes NODES 2
need "$gpus" --gpus-per-node GPUS_PER_NODE 8
need_number "$nodes" --nodes 2
need_number "$gpus" --gpus-per-node 8
need_number "$cpus" --cpus-per-gpu 8
need_training runs/stage1 "$@"

submit=(
  sbatch
  --job-name=aavs
  --nodes="$nodes"
  --gpus-per-node="$gpus"
  # JAX gives the i-th task of a node its i-th GPU, so there is one for each, and all see all GPUs.
  --ntasks-per-node="$gpus"
  --cpus-per-task="$cpus"
  # A job that starts again goes on writing where it was.
  --requeue
  --open-mode=append
  # Five minutes before the time limit, to the batch script alone: it saves and queues again.
  --signal=B:USR1@300
)
submit+=(${cluster[@]+"${cluster[@]}"} launch/slurm_job.sh "$@")

step make_environment "[cuda]"
step "${submit[@]}"
if [ -n "$dry_run" ]; then
  echo '# the job then runs, on each node once for each GPU:'
  bash launch/slurm_job.sh --dry-run "$@"
else
  echo 'follow it with: tail -F slurm-JOBID.out'
fi

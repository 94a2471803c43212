#!/usr/bin/env bash
# Trains on all GPUs of this machine, with one process.
set -euo pipefail
source "$(dirname "$0")/launcher.sh"
source "$(dirname "$0")/common.sh"

usage() {
  cat <<'END'
Trains on all GPUs of this machine, with one process: installs into .venv what is not there yet,
then runs `aavs train`. Relative paths start at the project's folder. The same command goes on with
a training that was interrupted. CUDA_VISIBLE_DEVICES=0,1 leaves the other GPUs alone.

  bash launch/multi_gpu.sh [--dry-run] -- ARGUMENTS OF aavs train

  --dry-run    print the commands and run none

example, 8 GPUs with 5 frames each a step:
  bash launch/multi_gpu.sh -- --config configs/avss_stage1.py --data data --workdir runs/stage1 \
    --config.data.item_frames=5 --config.data.batch_items=8
END
}

while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in
    --dry-run) dry_run=yes ;;
    --help | -h) usage && exit ;;
    *) fail "$1 is unknown: arguments of aavs train follow --, see --help" ;;
  esac
  shift
done
[ $# -eq 0 ] || shift
need_training runs/stage1 "$@"

step make_environment "[cuda]"
# Without a GPU that works this ends with an error, instead of training on the CPU.
train=(env JAX_PLATFORMS='cuda,cpu' .venv/bin/aavs train "$@")
if [ -z "$dry_run" ]; then exec "${train[@]}"; fi
step "${train[@]}"

#!/usr/bin/env bash
# The batch script that slurm.sh submits; its arguments are those of `aavs train`. Slurm runs a copy
# of this file, in the folder it was submitted from, so it sources nothing.
set -euo pipefail

train=(srun --kill-on-bad-exit=1 --gpu-bind=none .venv/bin/aavs train --distributed)
if [ "${1:-}" = --dry-run ]; then
  shift
  source "$(dirname "$0")/launcher.sh"
  quoted "${train[@]}" "$@"
  echo
  exit
fi

export PYTHONUNBUFFERED=1
# Without a GPU that works this ends with an error, instead of training on the CPU.
export JAX_PLATFORMS=cuda,cpu
# srun does not take it over from sbatch.
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"

patiently() { # a command of Slurm, whose controller may not answer for a while
  local i
  for i in 1 5 20 60 0; do
    "$@" && return
    sleep $i
  done
  return 1
}

requeue=
# Near the time limit: SIGTERM to the tasks, not to this script; they save and end.
trap 'requeue=yes; patiently scancel --signal=TERM "$SLURM_JOB_ID" || :' USR1
# scancel and preemption reach the tasks by themselves; this script waits for them.
trap : TERM

"${train[@]}" "$@" &
status=0
wait $! || status=$?
while kill -0 $! 2>/dev/null; do # a signal ended the wait, not the training
  status=0
  wait $! || status=$?
done
if [ -n "$requeue" ] && [ "$status" -ne 2 ]; then # 2 is bad input, which stays bad
  patiently scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

#!/usr/bin/env bash
# Trains on a Cloud TPU VM or pod slice, from its creation to its deletion.
set -euo pipefail
source "$(dirname "$0")/launcher.sh"

usage() {
  cat <<'END'
Trains on a Cloud TPU VM or pod slice. Steps run in the order in which they are named:

  bash launch/tpu_vm.sh STEP... [FLAGS] [-- ARGUMENTS OF aavs train, or the command of exec]

  create     make the slice; with --queued, ask for it and return
  wait       wait until a slice asked for with --queued is there
  copy       copy the code to all workers, into ~/aavs_jax
  install    install it there, into ~/aavs_jax/.venv
  data       copy --data-from to all workers, into ~/aavs_jax/data
  run        start `aavs train --distributed` on all workers, in the background
  logs       follow the log of one worker, or of all (Ctrl-C ends the following, not the training)
  stop       have the training save and end, and wait for it
  exec       run a command on all workers
  delete     delete the slice, and with --queued its request

While a training runs, copy, install, data and run change nothing and fail.

  --project NAME          (PROJECT)
  --zone ZONE             (ZONE)
  --name NAME             of the slice (TPU_NAME)
  --type TYPE             v4-16, v5litepod-16, v5p-64, v6e-256 ... (ACCELERATOR_TYPE)
  --runtime VERSION       (RUNTIME_VERSION; follows from --type for v3, v4, v5e, v5p and v6e)
  --data-from gs://...    folder with the data set (DATA_FROM)
  --worker N|all          whose log (0)
  --queued                create a queued resource; give it to wait and delete as well
  --spot                  create a slice that is cheaper and can be taken away
  --create-flag FLAG      one more flag for create, as --network=NAME; can be repeated
  --dry-run               print the commands and run none

Relative paths of the training start at ~/aavs_jax on each worker. The work folder must be one that
all workers share, such as gs://BUCKET/runs/stage1. After a preemption the same command goes on with
the training: a new slice, then run.

example, 16 chips with 5 frames each a step:
  export PROJECT=my-project ZONE=us-west4-a TPU_NAME=aavs ACCELERATOR_TYPE=v5litepod-16
  bash launch/tpu_vm.sh create copy install data run logs --data-from gs://BUCKET/avsbench -- \
    --config configs/avss_stage1.py --data data --workdir gs://BUCKET/runs/stage1 \
    --config.data.item_frames=5 --config.data.batch_items=16
  bash launch/tpu_vm.sh delete
END
}

project=${PROJECT:-} zone=${ZONE:-} name=${TPU_NAME:-}
type=${ACCELERATOR_TYPE:-} runtime=${RUNTIME_VERSION:-} data_from=${DATA_FROM:-}
worker=0 queued='' spot=''
steps=() create_flags=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in
    create | wait | copy | install | data | run | logs | stop | exec | delete) steps+=("$1") ;;
    --dry-run) dry_run=yes ;;
    --help | -h) usage && exit ;;
    --queued) queued=yes ;;
    --spot) spot=yes ;;
    --project) need_value "$@" && project=$2 && shift ;;
    --zone) need_value "$@" && zone=$2 && shift ;;
    --name) need_value "$@" && name=$2 && shift ;;
    --type) need_value "$@" && type=$2 && shift ;;
    --runtime) need_value "$@" && runtime=$2 && shift ;;
    --data-from) need_value "$@" && data_from=$2 && shift ;;
    --worker) need_value "$@" && worker=$2 && shift ;;
    --create-flag) need_value "$@" && create_flags+=("$2") && shift ;;
    *) fail "$1 is unknown: arguments of aavs train follow --, see --help" ;;
  esac
  shift
done
[ $# -eq 0 ] || shift
[ ${#steps[@]} -gt 0 ] || fail 'no step is named: name some, such as create copy install run logs'

has() { # step
  case " ${steps[*]} " in *" $1 "*) ;; *) false ;; esac
}

need "$project" --project PROJECT my-project
need "$zone" --zone ZONE us-west4-a
need "$name" --name TPU_NAME aavs
if has create; then
  need "$type" --type ACCELERATOR_TYPE v5litepod-16
  if [ -z "$runtime" ]; then
    case $type in
      v3-* | v4-*) runtime=tpu-ubuntu2204-base ;;
      v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
      v5p-*) runtime=v2-alpha-tpuv5 ;;
      v6e-*) runtime=v2-alpha-tpuv6e ;;
      *)
        versions="gcloud compute tpus tpu-vm versions list --project=$project --zone=$zone"
        fail "no runtime version is known for $type: give --runtime one that \`$versions\` names"
        ;;
    esac
  fi
fi
if has data; then need "$data_from" --data-from DATA_FROM gs://my-bucket/avsbench; fi
if has run && has exec; then fail 'run and exec both take what follows --: name one of them'; fi
if has run; then need_training gs://my-bucket/runs/stage1 "$@"; fi
if has exec && [ $# -eq 0 ]; then
  fail 'exec has no command: write it after --, such as exec -- df -h'
fi

where=(--project="$project" --zone="$zone")

remote() { # worker, shell line
  step gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$1" --command="$2"
}

create() {
  local make
  if [ -n "$queued" ]; then
    make=(queued-resources create "$name" --node-id="$name" --runtime-version="$runtime")
  else
    make=(tpu-vm create "$name" --version="$runtime")
  fi
  make+=("${where[@]}" --accelerator-type="$type")
  if [ -n "$spot" ]; then make+=(--spot); fi
  step gcloud compute tpus "${make[@]}" ${create_flags[@]+"${create_flags[@]}"}
}

wait_until_active() {
  local state describe
  describe=(gcloud compute tpus queued-resources describe "$name" "${where[@]}")
  describe+=('--format=value(state.state)')
  if [ -n "$dry_run" ]; then
    step "${describe[@]}"
    return
  fi
  local unanswered=0
  while true; do
    if state=$("${describe[@]}"); then
      unanswered=0
    elif [ $((unanswered += 1)) -lt 5 ]; then # for a moment; the queue takes hours
      state='not known now'
    else
      fail "the state of $name cannot be had, see above"
    fi
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING)
        fail "the request $name is $state: run delete with --queued, then create again"
        ;;
    esac
    echo "$name is $state, looking again in 30 s"
    sleep 30
  done
}

copy() {
  cd "$(dirname "$0")/.."
  step mkdir -p build
  step tar --exclude=__pycache__ -czf build/aavs_jax.tgz \
    pyproject.toml README.md LICENSE aavs_jax configs input_pipeline tests/goldens
  step gcloud compute tpus tpu-vm scp build/aavs_jax.tgz "$name:aavs_jax.tgz" "${where[@]}" \
    --worker=all
  local line='mkdir -p aavs_jax && cd aavs_jax && rm -rf aavs_jax configs input_pipeline tests'
  line+=' && tar -xzf ../aavs_jax.tgz'
  remote all "$line"
}

install() {
  # The images have Python 3.10, the project needs 3.11: uv brings one along.
  local line='cd aavs_jax'
  line+=' && PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user --upgrade uv'
  line+=' && { [ -x .venv/bin/python ] || python3 -m uv venv --quiet --python 3.11 .venv; }'
  line+=' && python3 -m uv pip install --quiet --python .venv/bin/python -e ".[tpu]"'
  remote all "$line"
}

# shellcheck disable=SC2016 # expands on the worker
running='[ -f train.pid ] && grep -qs aavs "/proc/$(cat train.pid)/cmdline"'

looked=
look() { # fails if a training runs: its code and libraries must stay, and none may start beside it
  [ -z "$looked" ] || return 0
  looked=yes
  # On all workers before anything changes on one: those of different starts do not train together.
  # A new slice does not have the folder yet.
  local line="if cd aavs_jax 2>/dev/null && $running; then"
  line+=" echo 'the training runs already: stop it first' >&2; exit 1; fi"
  remote all "$line"
}

run() {
  # Without a TPU that works this ends with an error, instead of training on the CPU.
  local line='set -e; cd aavs_jax; export JAX_PLATFORMS=tpu,cpu PYTHONUNBUFFERED=1;'
  line+=" nohup .venv/bin/aavs train --distributed $(quoted "$@")"
  line+=' >> train.log 2>&1 < /dev/null & echo $! > train.pid'
  remote all "$line"
  looked= # what else is named after this meets a training
}

stop() {
  local line="cd aavs_jax || exit 1; if $running; then kill -TERM \"\$(cat train.pid)\"; fi;"
  line+=" while $running; do sleep 1; done"
  remote all "$line"
}

delete() {
  if [ -n "$queued" ]; then
    step gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force
  else
    step gcloud compute tpus tpu-vm delete "$name" "${where[@]}"
  fi
}

for word in "${steps[@]}"; do
  case $word in copy | install | data | run) look ;; esac
  case $word in
    wait) wait_until_active ;;
    data) remote all "cd aavs_jax && gcloud storage rsync --recursive $(quoted "$data_from") data" ;;
    logs) remote "$worker" 'tail -n 100 -F aavs_jax/train.log' ;;
    exec) remote all "$(quoted "$@")" ;;
    *) "$word" "$@" ;;
  esac
done

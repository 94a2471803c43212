#!/usr/bin/env bash
# Trains on a TPU slice of a GKE cluster, as a JobSet.
set -euo pipefail
source "$(dirname "$0")/launcher.sh"

usage() {
  cat <<'END'
Trains on a TPU slice of a GKE cluster, as a JobSet of one pod a host. Steps run in the order in
which they are named:

  bash launch/gke.sh STEP... [FLAGS] [-- ARGUMENTS OF aavs train]

  image      build the image of the project and push it (Docker)
  apply      start the training: fill in launch/gke/jobset.yaml and apply it
  logs       follow the log of one host, or of all (Ctrl-C ends the following, not the training)
  delete     delete the JobSet, which ends the training

  --name NAME               of the JobSet (JOBSET_NAME)
  --image IMAGE             with registry and tag (IMAGE)
  --accelerator LABEL       tpu-v4-podslice, tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice
                            (ACCELERATOR)
  --topology AxB[xC]        of the slice, as 4x4 (TOPOLOGY)
  --chips-per-host N        4, or all chips of a smaller slice; 8 for machine types that end in -8t
  --bucket BUCKET           mounted at /gcs (BUCKET)
  --service-account NAME    of Kubernetes, which may read and write the bucket (SERVICE_ACCOUNT,
                            default)
  --context NAME            of kubectl (KUBE_CONTEXT, the current one)
  --worker N|all            whose log (0)
  --dry-run                 print the commands and run none

A host that fails or is preempted restarts the JobSet, and the training goes on from its work
folder; exit status 2, bad input, ends it. To start again by hand: delete apply.

example, 16 chips with 5 frames each a step:
  export JOBSET_NAME=aavs IMAGE=us-docker.pkg.dev/my-project/aavs/train:1 BUCKET=my-bucket
  bash launch/gke.sh image apply logs --accelerator tpu-v5-lite-podslice --topology 4x4 \
    --service-account aavs -- --config configs/avss_stage1.py --data /gcs/avsbench \
    --workdir gs://my-bucket/runs/stage1 \
    --config.data.item_frames=5 --config.data.batch_items=16
  bash launch/gke.sh delete
END
}

name=${JOBSET_NAME:-} image=${IMAGE:-} accelerator=${ACCELERATOR:-} topology=${TOPOLOGY:-}
bucket=${BUCKET:-} service_account=${SERVICE_ACCOUNT:-default} context=${KUBE_CONTEXT:-}
chips='' worker=0
steps=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in
    image | apply | logs | delete) steps+=("$1") ;;
    --dry-run) dry_run=yes ;;
    --help | -h) usage && exit ;;
    --name) need_value "$@" && name=$2 && shift ;;
    --image) need_value "$@" && image=$2 && shift ;;
    --accelerator) need_value "$@" && accelerator=$2 && shift ;;
    --topology) need_value "$@" && topology=$2 && shift ;;
    --chips-per-host) need_value "$@" && chips=$2 && shift ;;
    --bucket) need_value "$@" && bucket=$2 && shift ;;
    --service-account) need_value "$@" && service_account=$2 && shift ;;
    --context) need_value "$@" && context=$2 && shift ;;
    --worker) need_value "$@" && worker=$2 && shift ;;
    *) fail "$1 is unknown: arguments of aavs train follow --, see --help" ;;
  esac
  shift
done
[ $# -eq 0 ] || shift
[ ${#steps[@]} -gt 0 ] || fail 'no step is named: name some, such as image apply logs'

has() { # step
  case " ${steps[*]} " in *" $1 "*) ;; *) false ;; esac
}

if has apply || has logs || has delete; then
  need "$name" --name JOBSET_NAME aavs
  [[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] ||
    fail "--name is $name: use small letters, digits and - inside, such as aavs"
fi
if has image || has apply; then
  need "$image" --image IMAGE us-docker.pkg.dev/my-project/aavs/train:1
fi
if has apply; then
  need "$accelerator" --accelerator ACCELERATOR tpu-v5-lite-podslice
  need "$topology" --topology TOPOLOGY 4x4
  need "$bucket" --bucket BUCKET my-bucket
  case $bucket in
    gs://* | */*) fail "--bucket is $bucket: give the bucket's name alone, such as my-bucket" ;;
  esac
  [[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] ||
    fail "--topology is $topology: write chips along each axis, such as 4x4 or 2x2x4"
  total=$((${topology//x/*}))
  [ -n "$chips" ] || chips=$((total < 4 ? total : 4))
  need_number "$chips" --chips-per-host 4
  hosts=$((total / chips))
  [ $((hosts * chips)) -eq "$total" ] ||
    fail "--chips-per-host is $chips, which does not divide the $total chips of $topology: use 4"
  example=gs://$bucket/runs/stage1
  need_training "$example" "$@"
  # Through the mount hosts do not see each other's locks, and files cannot be appended to; any
  # other folder ends with its pod, after which the training would begin at step 0.
  case $workdir in
    gs://[!/]*) ;;
    /gcs/*) fail "the work folder is $workdir: name it as gs://$bucket/${workdir#/gcs/}" ;;
    *) fail "the work folder is $workdir, and only gs://... outlives pods: name one as $example" ;;
  esac
  for word in "$image" "$accelerator" "$bucket" "$service_account" "$@"; do
    case $word in *[[:cntrl:]]*) fail "'$word' has a line break or tab: write it without" ;; esac
  done
fi

kubectl=(kubectl)
if [ -n "$context" ]; then kubectl+=(--context="$context"); fi

json() { # a string in the quotes of JSON, which YAML reads too
  local text=${1//\\/\\\\}
  printf '"%s"' "${text//\"/\\\"}"
}

arguments() { # the list of the container's arguments
  local word list
  list=$(json train)
  # One host is one process, for which JAX finds no cluster to connect to.
  if [ "$hosts" -gt 1 ]; then list+=", $(json --distributed)"; fi
  for word in "$@"; do
    list+=", $(json "${word//\$/\$\$}")" # Kubernetes reads $$ as $, and would expand $(NAME)
  done
  printf '[%s]' "$list"
}

jobset() { # the manifest
  local text
  text=$(<"$(dirname "$0")/gke/jobset.yaml")
  put() { text=${text//"\${$1}"/"$2"}; }
  put NAME "$(json "$name")"
  put IMAGE "$(json "$image")"
  put ACCELERATOR "$(json "$accelerator")"
  put TOPOLOGY "$(json "$topology")"
  put SERVICE_ACCOUNT "$(json "$service_account")"
  put BUCKET "$(json "$bucket")"
  put HOSTS "$hosts"
  put CHIPS "$chips"
  put ARGUMENTS "$(arguments "$@")"
  printf '%s\n' "$text"
}

image() {
  local root
  root=$(cd "$(dirname "$0")/.." && pwd)
  step docker build --platform=linux/amd64 --file="$root/launch/gke/Dockerfile" --tag="$image" \
    "$root"
  step docker push "$image"
}

apply() {
  local manifest
  manifest=$(jobset "$@")
  if [ -n "$dry_run" ]; then
    printf "%s <<'END'\n%s\nEND\n" "$(quoted "${kubectl[@]}" apply --filename=-)" "$manifest"
  else
    "${kubectl[@]}" apply --filename=- <<<"$manifest"
  fi
}

logs() {
  local pods=jobset.sigs.k8s.io/jobset-name=$name get phases follow
  follow=(logs --follow --container=aavs --tail=100)
  if [ "$worker" = all ]; then
    follow+=(--prefix --max-log-requests=1000)
  else
    pods+=",batch.kubernetes.io/job-completion-index=$worker"
  fi
  # Of pods that are still to come kubectl follows nothing, and says so or fails.
  get=("${kubectl[@]}" get pods --selector="$pods" '--output=jsonpath={.items[*].status.phase}')
  if [ -n "$dry_run" ]; then step "${get[@]}"; fi
  while [ -z "$dry_run" ]; do
    phases=$("${get[@]}")
    case $phases in
      '' | *Pending*) echo "pods of $name: ${phases:-none} yet, looking again in 10 s" ;;
      *) break ;;
    esac
    sleep 10
  done
  step "${kubectl[@]}" "${follow[@]}" --selector="$pods"
}

delete() {
  step "${kubectl[@]}" delete jobset "$name" --ignore-not-found
}

for word in "${steps[@]}"; do "$word" "$@"; done

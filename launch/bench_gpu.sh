#!/usr/bin/env bash
# What a GPU can tell in nine minutes, from a bare checkout and without a network: are its numbers
# those of the recorded runs, and how fast is it? Needs what is there of jax, flax, optax,
# jaxtyping, ml_collections, numpy and Pillow; with torch and transformers the peer is timed as well.
#
#   bash launch/bench_gpu.sh OUT [arguments of `aavs bench sweep`]
set -euo pipefail
out=${1:?usage: bash launch/bench_gpu.sh OUT}
shift
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# One card: the PyTorch model beside ours uses no more.
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# Each measurement is a process of its own, so it can have the card to itself.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
python=${PYTHON:-python3}
status=0
$python -m aavs_jax.cli bench sweep "$out" --minutes 7 "$@" || status=$?
# Small steps, of which each would be tuned for longer than it runs.
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0"
timeout 110 $python -m aavs_jax.cli selftest tests/goldens/stage2.npz 2>&1 | tee "$out/selftest.txt" || {
  status=1
  echo "the self-test failed or had no time: see $out/selftest.txt"
}
exit $status

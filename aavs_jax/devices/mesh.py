"""Devices, and where each array lives on them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from aavs_jax.input_pipeline.errors import UserError

FSDP_MIN_SIZE = 2**16  # smaller arrays are cheaper to copy than to gather


def make_mesh(fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh of devices, all there are by default; `fsdp` of them share one copy of the parameters.

  Raises:
    UserError: the devices do not divide into such groups.
  """
  devices = jax.devices() if devices is None else devices
  if len(devices) % fsdp:
    raise UserError(
      f'config.mesh.fsdp is {fsdp}, which does not divide the {len(devices)} devices: use a divisor'
    )
  shape = (len(devices) // fsdp, fsdp)
  # jax.make_mesh splits the axes of a torus on some TPUs alone: 128x2 of 16x16 chips needs it.
  places = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  return Mesh(places, ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2)


def local_mesh() -> Mesh:
  """A mesh of this process's own devices, for work that processes do independently."""
  devices = jax.local_devices()
  axis_types = (AxisType.Auto,) * 2
  return jax.make_mesh((len(devices), 1), ('data', 'fsdp'), axis_types, devices=devices)


def compiler_options(mesh: Mesh) -> dict[str, bool]:
  """How XLA is to compile large programs for a mesh.

  On GPUs all products come from cuBLAS: those that XLA writes itself are tuned by trial while it
  compiles. What they would gain and cost has not been measured apart from other changes.
  """
  gpu = mesh.devices.flat[0].platform in ('gpu', 'cuda', 'rocm')
  return {'xla_gpu_enable_triton_gemm': False} if gpu else {}


def compiled_to_run_once(mesh: Mesh) -> dict[str, int]:
  """How XLA is to compile for a mesh what draws a model.

  With few optimisations on CPUs: hundreds of small random arrays are long to compile and quick to
  draw. The quickstart's model takes 25 s of CPU time for 50, the published one 104 s for 130,
  drawing included (with none 141 s, since drawing then takes nine times as long).
  """
  cpu = mesh.devices.flat[0].platform == 'cpu'
  return {'xla_backend_optimization_level': 1} if cpu else {}


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Frames are spread over all devices."""
  return NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))


def replicated(mesh: Mesh) -> NamedSharding:
  """A copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def on_each_device(f: Callable[..., Any]) -> Callable[..., Any]:
  """f, run by every device on its own frames, where a mesh is set (jax.set_mesh).

  All arrays that f takes and returns have frames as their first axis, and f must treat each frame
  alone. For loops over frames, and loops that end when the last frame is done: the compiler, which
  sees all frames of all devices, would have the devices wait for each other in every round.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return f
  frames = PartitionSpec(mesh.axis_names)
  return jax.shard_map(f, in_specs=frames, out_specs=frames, check_vma=False)


def _spec(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
  if fsdp == 1 or np.prod(shape) < FSDP_MIN_SIZE:
    return PartitionSpec()
  divisible = [i for i, length in enumerate(shape) if length % fsdp == 0]
  if not divisible:
    return PartitionSpec()
  axis = max(divisible, key=lambda i: shape[i])
  return PartitionSpec(*('fsdp' if i == axis else None for i in range(len(shape))))


def state_sharding(mesh: Mesh, abstract_state):
  """NamedSharding of every array of a state (parameters and the optimiser's copies of them)."""
  fsdp = mesh.shape['fsdp']
  return jax.tree.map(lambda leaf: NamedSharding(mesh, _spec(leaf.shape, fsdp)), abstract_state)


def global_batch(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
  """Arrays on the devices from the part of the batch that this process has read."""
  return {
    name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()
  }

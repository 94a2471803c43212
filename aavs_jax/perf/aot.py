"""Compiles the real steps for a TPU slice that is not there: memory, collectives, a roofline.

The TPU compiler (libtpu) needs no TPU; what it accepts for a slice fits that slice's memory.
"""

import importlib.metadata
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
from jax.experimental import topologies
from jax.sharding import Mesh

from aavs_jax import methods
from aavs_jax.devices.mesh import batch_sharding, make_mesh, replicated
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.methods.method import compiled_predict, seen
from aavs_jax.perf.bench import format_forms, random_batch
from aavs_jax.perf.hlo import Work, work
from aavs_jax.training import flops, phases
from aavs_jax.training.phases import placed
from aavs_jax.training.state import TrainState, count

FULL = 0.9  # share of the memory that a batch is to take, where the largest is looked for
PHASE = 2  # of the recipe, the one that needs more
HOP_SECONDS = 1e-6  # from one chip to the next


class Chip(NamedTuple):
  """A TPU generation, as Cloud TPU's documentation describes a chip of it."""

  kind: str  # of device, as JAX names it
  hbm_gb_s: float
  ici_gb_s: float  # of all links of a chip together, one way
  hbm_gib: float  # that the compiler grants programs, out of 32, 16, 95, 32 and 192
  axes: int  # of the torus
  cores: int  # what the number in names such as v4-16 counts: cores, or chips where it is 1
  devices: int = 1  # that JAX sees in a chip
  config: str = 'default'  # libtpu's: two cores are one device ('megacore') or not

  @property
  def tflops(self) -> float:
    """Peak in bfloat16."""
    return flops.peak_of(self.kind) * self.devices / 1e12


CHIPS = {
  'v4': Chip('TPU v4', 1200, 300, 30.75, axes=3, cores=2, config='megacore'),
  'v5e': Chip('TPU v5 lite', 819, 200, 15.75, axes=2, cores=1),
  'v5p': Chip('TPU v5', 2765, 600, 95.73, axes=3, cores=2, config='megacore'),
  'v6e': Chip('TPU v6 lite', 1638, 400, 31.24, axes=2, cores=1),
  'tpu7x': Chip('TPU7x', 7380, 600, 189.48, axes=3, cores=2, devices=2),
}


class Slice(NamedTuple):
  """A slice of a pod: v5e:4x4."""

  generation: str
  sides: tuple[int, ...]

  @property
  def chip(self) -> Chip:
    return CHIPS[self.generation]

  @property
  def chips(self) -> int:
    return math.prod(self.sides)

  @property
  def devices(self) -> int:
    return self.chips * self.chip.devices

  def __str__(self) -> str:
    return f'{self.generation}:{"x".join(map(str, self.sides))}'


class DoesNotFit(UserError):
  """The compiler found no way to run a step in the memory of a chip.

  Attributes:
    needed: bytes that it takes, infinity where the compiler did not say.
  """

  needed: float = math.inf


def parse_topology(name: str) -> Slice:
  """A slice from its sides, as v5e:4x4, or from its size as Cloud TPU names it, as v5e-16.

  Raises:
    UserError: no such generation, or another form.
  """
  match = re.fullmatch(r'(\w+)(?::(\d+(?:x\d+)*)|-(\d+))', name)
  generation = match[1] if match else name
  if not match or generation not in CHIPS:
    raise UserError(
      f'--topology {name} is unknown: use one of {", ".join(CHIPS)} with its sides or size, such '
      'as v5e:16x16 or v5e-256'
    )
  chip = CHIPS[generation]
  if match[2]:
    sides = tuple(int(side) for side in match[2].split('x'))
  else:
    chips, odd = divmod(int(match[3]), chip.cores)
    power = chips.bit_length() - 1
    if odd or chips != 2**power:
      raise UserError(
        f'--topology {name} is no power of two of chips: give its sides, such as {generation}:'
        + 'x'.join(['4'] * chip.axes)
      )
    # The most even sides, the longest one last; four chips of a 3D torus are one host's 2x2x1.
    sides = tuple(2 ** ((power + i) // chip.axes) for i in range(chip.axes))
    sides = tuple(reversed(sides)) if power < chip.axes else sides
  if len(sides) != chip.axes or 0 in sides:
    example = 'x'.join(['4'] * chip.axes)
    raise UserError(
      f'--topology {name}: {generation} has {chip.axes} sides, such as {generation}:{example}'
    )
  return Slice(generation, sides)


def slice_devices(where: Slice) -> Sequence[jax.Device]:
  """The devices of a slice, fit for compiling alone.

  Raises:
    UserError: libtpu is not installed, or knows no such slice.
  """
  if importlib.util.find_spec('libtpu') is None:
    raise UserError("the TPU compiler is not installed: run `pip install -e '.[aot]'`")
  # No question to a cloud's metadata server, and nothing of a TPU that may be there is claimed.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  # A host has several chips unless it is told that the slice is but one.
  host = {'chips_per_host_bounds': (1, 1, 1)} if where.chips == 1 else {}
  try:
    found = topologies.get_topology_desc(
      platform='tpu', topology_name=str(where), chip_config_name=where.chip.config, **host
    )
  except jax.errors.JaxRuntimeError as error:
    text = ' '.join(str(error).split()).removeprefix('INVALID_ARGUMENT: ')
    raise UserError(f'--topology {where} is not accepted by the TPU compiler: {text}') from error
  return found.devices


def abstract_batch(
  config: ml_collections.ConfigDict, mesh: Mesh, frames: int
) -> dict[str, jax.ShapeDtypeStruct]:
  """A batch of the training step for all devices of a mesh."""
  one = random_batch(config, 1)
  return {
    name: jax.ShapeDtypeStruct(
      (frames, *value.shape[1:]), value.dtype, sharding=batch_sharding(mesh)
    )
    for name, value in one.items()
  }


def compile_train(
  config: ml_collections.ConfigDict, mesh: Mesh, frames: int
) -> tuple[jax.stages.Compiled, TrainState]:
  """The training step as `aavs train` runs it, and the state that it takes.

  Raises:
    DoesNotFit: it needs more memory than a device has.
  """
  built = phases.build(config, methods.of(config), mesh, PHASE, 1)
  key = placed(jax.eval_shape(jax.random.key, 0), replicated(mesh))
  with jax.set_mesh(mesh):
    lowered = built.step.lower(built.abstract, abstract_batch(config, mesh, frames), key)
  return _compile(lowered), built.abstract


def compile_predict(
  config: ml_collections.ConfigDict, mesh: Mesh, frames: int
) -> jax.stages.Compiled:
  """The step of evaluation and prediction, with a copy of the parameters on every device.

  Raises:
    DoesNotFit: it needs more memory than a device has.
  """
  method = methods.of(config)
  state = phases.build(config, method, mesh, PHASE, 1).abstract
  variables = jax.tree.map(lambda leaf: placed(leaf, replicated(mesh)), state.variables)
  batch = seen(method, abstract_batch(config, mesh, frames))
  with jax.set_mesh(mesh):
    lowered = compiled_predict(method, mesh).lower(variables, batch)
  return _compile(lowered)


def _compile(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
  try:
    return lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error) or 'hbm' not in str(error).lower():
      raise
    sizes = re.search(r'\(([\d.]+[KMGT])\) exceeds[^(]*\(([\d.]+[KMGT])\)', str(error))
    figures = f': it needs {sizes[1]} of {sizes[2]}' if sizes else ''
    failure = DoesNotFit(
      f'the step does not fit into the memory of a device{figures}; use a smaller '
      '--batch-per-chip, --fit finds one that fills it'
    )
    if sizes:
      failure.needed = float(sizes[1][:-1]) * 1024 ** (1 + 'KMGT'.index(sizes[1][-1]))
    raise failure from error


def memory(compiled: jax.stages.Compiled) -> dict[str, int]:
  """Bytes of a device's HBM that a compiled step takes, as its arrays are laid out there."""
  stats = compiled.memory_analysis()
  parts = {
    'arguments': stats.argument_size_in_bytes,
    'results': stats.output_size_in_bytes - stats.alias_size_in_bytes,
    'activations': stats.temp_size_in_bytes,
    'program': stats.generated_code_size_in_bytes,
  }
  return {**parts, 'total': sum(parts.values())}


def held(tree: Any) -> int:
  """Bytes of a tree of sharded shapes on one device, without the padding of layouts."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def roofline(done: Work, where: Slice) -> dict[str, float]:
  """Seconds that a step takes at least, see `assumptions`, and what is left of perfect scaling."""
  chip = where.chip
  # An axis of the torus closes to a ring in whole cubes of 4x4x4, or where it spans the pod.
  if chip.axes == 3:
    closed = [all(side % 4 == 0 for side in where.sides)] * 3
  else:
    closed = [side == 16 for side in where.sides]
  link = chip.ici_gb_s * 1e9 / (2 * chip.axes)
  links = sum(1 + ring for side, ring in zip(where.sides, closed) if side > 1)
  hops = sum(side // 2 if ring else side - 1 for side, ring in zip(where.sides, closed))
  seconds = {
    'products': done.flops / (chip.tflops * 1e12 / chip.devices),
    'hbm': done.bytes / (chip.hbm_gb_s * 1e9 / chip.devices),
    'interconnect': 0.0,
  }
  for kind, (number, size) in done.collectives.items():
    passes = 2 if kind == 'all-reduce' else 1  # it scatters sums, then gathers them
    if links:
      sent = size / (links * link / chip.devices)
      seconds['interconnect'] += passes * (sent + number * hops * HOP_SECONDS)
  alone = max(seconds['products'], seconds['hbm'])
  total = alone + seconds['interconnect']
  return {**seconds, 'step': total, 'scaling': alone / total}


def assumptions(where: Slice, open_loops: int) -> str:
  """What `roofline` takes for granted, as one line."""
  chip = where.chip
  loops = f'; {open_loops} loops of unknown length counted once' if open_loops else ''
  return (
    f'estimates take {chip.tflops:g} TFLOP/s bfloat16 and {chip.hbm_gb_s:g} GB/s of HBM a chip, '
    f'each at its peak and wholly overlapped, then {chip.ici_gb_s:g} GB/s of interconnect one way '
    f'(half on axes that are no ring) and {HOP_SECONDS * 1e6:g} us a hop, not overlapped; nothing '
    f'for vector units, irregular access and the host{loops}'
  )


def largest(first: int, step: int, need: Callable[[int], float], limit: float) -> int:
  """A batch that fills the memory: 90 % of it is taken, or `step` more does not fit.

  A compilation takes minutes, so what is tried next is where a line through the latest two says
  that the memory ends; the fourth time it is half of what is open, should there be no such line.

  Args:
    first: a multiple of step, tried at first.
    step: of batches.
    need: bytes that a batch takes, more than limit where it does not fit.
    limit: bytes that there are.

  Returns:
    The batch; 0 if none fits.
  """
  low, high, tried = 0, None, [(0, 0.0)]
  n = first
  while True:
    tried.append((n, need(n)))
    (n0, needed0), (n1, needed1) = tried[-2:]
    if needed1 <= limit:
      low = n
    else:
      high = n
    if FULL * limit <= needed1 <= limit or (high is not None and high - low <= step):
      return low
    slope = (needed1 - needed0) / (n1 - n0)
    if len(tried) % 4 == 0 or not 0 < slope < math.inf:
      n = 2 * low if high is None else (low + high) // 2
    else:
      n = int(n1 + (limit - needed1) / slope)
    n = max(n // step * step, low + step)
    n = n if high is None else min(n, high - step)


def aot(
  config: ml_collections.ConfigDict,
  topology: str,
  frames_per_chip: int | None = None,
  *,
  fit: bool = False,
  progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
  """Compiles the training step and the step of evaluation and prediction for a slice.

  Args:
    config: the model and recipe.
    topology: see parse_topology.
    frames_per_chip: of a batch; by default as few as there can be.
    fit: find as many frames as fill the memory, from frames_per_chip on; see largest.
    progress: told about every attempt.

  Returns:
    What was compiled, and for each of the steps 'train' and 'predict' its compile_seconds, memory
    [bytes], flops, hbm_bytes, collectives, open_loops and roofline [seconds]; of one device each.

  Raises:
    UserError: topology, batch or mesh are impossible, or libtpu is missing or of another release.
    DoesNotFit: the batch is too large for the memory.
  """
  where = parse_topology(topology)
  chip = where.chip
  together = methods.of(config).unit
  unit = chip.devices * config.train.accumulate * together
  per_chip = unit if frames_per_chip is None else frames_per_chip
  if per_chip < 1 or per_chip % unit:
    clips = f' times the {together} frames of a clip' if together > 1 else ''
    raise UserError(
      f'--batch-per-chip is {per_chip}: use a multiple of {unit}, the devices of a chip times '
      f'config.train.accumulate{clips}, so that all have the same number of whole frames'
    )
  mesh = make_mesh(config.mesh.fsdp, slice_devices(where))
  found = None  # the step of the largest batch so far, its state, the seconds it took

  def attempt(count: int) -> None:
    nonlocal found
    started = time.monotonic()
    step, state = compile_train(config, mesh, count * where.chips)
    found = step, state, time.monotonic() - started

  there = chip.hbm_gib * 2**30 / chip.devices

  def need(count: int) -> float:
    try:
      attempt(count)
    except DoesNotFit as error:
      progress(f'  {count} frames a chip: {error}')
      return max(error.needed, there + 1)
    needed = memory(found[0])['total']
    progress(
      f'  {count} frames a chip: fits, takes {needed / 2**30:.1f} of {there / 2**30:.1f} GiB, '
      f'compiled in {found[2]:.0f} s'
    )
    return min(needed, there)  # as the compiler says that it fits

  if fit:
    per_chip = largest(per_chip, unit, need, there)
    if not per_chip:
      raise DoesNotFit(f'not even {unit} frames a chip fit into the memory of {where}')
  else:
    attempt(per_chip)
  step, state, seconds = found
  result = {
    'topology': str(where),
    'chips': where.chips,
    'devices': where.devices,
    'dtype': config.dtype,
    'forms': methods.forms(config),
    'accumulate': config.train.accumulate,
    'fsdp': config.mesh.fsdp,
    'frames_per_chip': per_chip,
    'frames': per_chip * where.chips,
    'trained_parameters': count(state.trained),
    'frozen_parameters': count(state.frozen),
    'hbm_bytes_per_device': int(there),
    'train': _measure(step, where, seconds),
  }
  result['train']['memory'] |= {
    'trained': held(state.trained),
    'frozen': held(state.frozen),
    'optimizer': held(state.opt_state),
  }
  started = time.monotonic()
  step = compile_predict(config, mesh, result['frames'])
  result['predict'] = _measure(step, where, time.monotonic() - started)
  for name in ('train', 'predict'):
    result[name]['frames_per_second'] = result['frames'] / result[name]['roofline']['step']
  return result


def _measure(step: jax.stages.Compiled, where: Slice, seconds: float) -> dict[str, Any]:
  try:
    text = step.as_text()
  except jax.errors.JaxRuntimeError as error:  # seen with libtpu 0.0.52 and jaxlib 0.10.2
    raise UserError(
      f'libtpu {importlib.metadata.version("libtpu")} has compiled what jaxlib '
      f'{jax.lib.__version__} cannot read back: install the one of the same release with '
      "`pip install -e '.[aot]'`"
    ) from error
  done = work(text)
  return {
    'compile_seconds': seconds,
    'memory': memory(step),
    'flops': done.flops,
    'hbm_bytes': done.bytes,
    'compiler_cycles': done.cycles,
    'collectives': {kind: value._asdict() for kind, value in done.collectives.items()},
    'open_loops': done.open_loops,
    'parts': [
      {'part': name, 'pass': direction, **part._asdict()}
      for (name, direction), part in sorted(
        done.parts.items(), key=lambda item: (-item[1].cycles, item[0])
      )
    ],
    'roofline': roofline(done, where),
  }


def format_breakdown(parts: Sequence[dict[str, Any]]) -> str:
  """Cycles, FLOPs and bytes by part of the model, largest first, as a table.

  Parts below a thousandth of the cycles, of which there are dozens, are a row together.
  """

  def together(name, parts):
    keys = ('cycles', 'flops', 'bytes', 'silent')
    return {'part': name, 'pass': '', **{key: sum(part[key] for part in parts) for key in keys}}

  whole = together('all of it', parts)
  small = [part for part in parts if part['cycles'] < whole['cycles'] / 1000]
  rows = [part for part in parts if part not in small]
  if small:
    rows.append(together(f'{len(small)} more', small))
  rows.append(whole)
  width = max(len(row['part']) for row in rows) + 2
  lines = [f'  {"":{width}}{"":10}{"M cycles":>10}{"share":>8}{"GFLOP":>10}{"GB":>8}']
  for row in rows:
    share = row['cycles'] / max(whole['cycles'], 1)
    lines.append(
      f'  {row["part"] or "(no name)":{width}}{row["pass"]:10}{row["cycles"] / 1e6:10.2f}'
      f'{share:8.1%}{row["flops"] / 1e9:10.1f}{row["bytes"] / 1e9:8.2f}'
    )
  if whole['silent']:
    lines.append(
      f'  the compiler gives no cycles for {whole["silent"]} instructions that move something'
    )
  return '\n'.join(lines)


def format_report(result: dict[str, Any]) -> str:
  """What `aot` found, for people."""
  where = parse_topology(result['topology'])
  chip, gib, mib = where.chip, 2**30, 2**20
  unit = 'device' if chip.devices > 1 else 'chip'
  trained, frozen = result['trained_parameters'] / 1e6, result['frozen_parameters'] / 1e6
  lines = [
    f'{where}, {where.chips} chips'
    + (f' with {chip.devices} devices each' if chip.devices > 1 else '')
    + f'; {result["frames_per_chip"]} frames a chip, {result["frames"]} a step; {result["dtype"]}, '
    f'{format_forms(result["forms"])}accumulate {result["accumulate"]}, fsdp {result["fsdp"]}',
    f'{trained:.2f} M of {trained + frozen:.2f} M parameters train; figures are per {unit}',
  ]
  for name, title in (
    ('train', f'training step, phase {PHASE}'),
    ('predict', 'evaluation and prediction, one program'),
  ):
    part = result[name]
    sizes, line = part['memory'], part['roofline']
    rows = []
    rest = sizes['arguments']
    if name == 'train':
      rows += [
        ('trained parameters', sizes['trained']),
        ('frozen parameters', sizes['frozen']),
        ('optimiser state', sizes['optimizer']),
      ]
      rest -= sizes['trained'] + sizes['frozen'] + sizes['optimizer']
    rows += [
      ('batch, padding of layouts' if name == 'train' else 'parameters, batch', rest),
      ('activations (temporary)', sizes['activations']),
      ('results, program', sizes['results'] + sizes['program']),
    ]
    lines += [f'{title}, compiled in {part["compile_seconds"]:.0f} s']
    lines += [f'  {label:26}{size / mib:12,.1f} MiB' for label, size in rows]
    lines += [
      f'  {"in all":26}{sizes["total"] / gib:12,.2f} GiB of '
      f'{result["hbm_bytes_per_device"] / gib:.2f} that programs can have',
      f'  {"matrix products":26}{part["flops"] / 1e12:12,.3f} TFLOP',
      f'  {"through HBM":26}{part["hbm_bytes"] / 1e9:12,.2f} GB',
      f'  {"cycles, by the compiler":26}{part["compiler_cycles"] / 1e6:12,.1f} M',
    ]
    lines += [
      f'  {kind:26}{value["bytes"] / 1e6:12,.3f} MB in {value["count"]}'
      for kind, value in part['collectives'].items()
    ] or [f'  {"collectives":26}{"none":>12}']
    lines += [
      f'  {"estimated step":26}{line["step"] * 1e3:12,.2f} ms: the larger of products '
      f'{line["products"] * 1e3:.2f} and HBM {line["hbm"] * 1e3:.2f}, then interconnect '
      f'{line["interconnect"] * 1e3:.3f}',
      f'  {"estimated speed":26}{part["frames_per_second"]:12,.0f} frames/s in all, '
      f'{100 * line["scaling"]:.1f} % of perfect scaling',
    ]
  lines += [assumptions(where, result['train']['open_loops'])]
  return '\n'.join(lines)

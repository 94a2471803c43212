"""Timing of the real steps on whatever is there, of compiling them, and of the peer beside them."""

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple, TypeVar

import jax
import ml_collections
import numpy as np

from aavs_jax import methods
from aavs_jax.devices.mesh import batch_sharding, global_batch, make_mesh, replicated
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.input_pipeline.host import give_back_freed, keep_freed
from aavs_jax.methods import forms
from aavs_jax.methods.method import compiled_predict, seen
from aavs_jax.perf import peer
from aavs_jax.training import flops, phases
from aavs_jax.training.phases import placed
from aavs_jax.training.state import count, flatten

ROUNDS = 2  # ours and the peer take turns so often
TITLES = {'step': 'training step', 'predict': 'forward and post-processing'}
_T = TypeVar('_T')


def random_batch(config: ml_collections.ConfigDict, frames: int) -> dict[str, np.ndarray]:
  """A batch of noise in the shapes and types of config, two label values a frame."""
  rng = np.random.default_rng(0)
  size, eval_size = config.data.image_size, config.data.eval_size
  labels = np.zeros((frames, size, size), np.uint8)
  labels[:, size // 4 : size // 2, size // 4 :] = 1
  classes = np.full((frames, config.data.max_targets), -1, np.int32)
  present = min(2, config.data.max_targets)
  classes[:, :present] = np.arange(present)
  batch = {
    'frames': rng.integers(0, 256, (frames, size, size, 3), np.uint8),
    'log_mel': rng.standard_normal((frames, 96, 64), np.float32),
    'labels': labels,
    'target_classes': classes,
    'weight': np.ones(frames, np.float32),
    'position': np.arange(frames, dtype=np.int32),
    'group': np.arange(frames, dtype=np.int32) // 5,
  }
  if config.use_prior:
    batch['prior'] = rng.integers(0, 2, (frames, eval_size, eval_size)).astype(np.uint8) * 255
  return batch


class _Compiled(NamedTuple):
  run: Callable  # (state, batch) -> (next state, metrics), or (model, batch) -> predictions
  make_state: Callable  # () -> state or model, where it belongs, of noise
  state: Any  # its shapes and places
  trace_seconds: float  # from Python to XLA's input
  compile_seconds: float
  text: Callable[[], str]  # of the compiled module


def compile_step(what: str, config: ml_collections.ConfigDict, batch: Any, phase: int) -> _Compiled:
  """Compiles a step as training or evaluation runs it; `what` is a key of TITLES."""
  method, mesh = methods.of(config), make_mesh(config.mesh.fsdp)
  key = jax.random.key(config.seed)
  shapes = jax.eval_shape(method.init, key)
  if what == 'step':
    built = phases.build(config, method, mesh, phase, 1)
    state, step = built.abstract, built.step
    arguments = lambda batch: (batch, key)  # noqa: E731

    def make_state():
      first = _noise(flatten(shapes), replicated(mesh))
      return built.begin(first, first)
  else:
    state = jax.tree.map(lambda leaf: placed(leaf, replicated(mesh)), shapes)
    make_state = lambda: _noise(shapes, replicated(mesh))  # noqa: E731
    step = compiled_predict(method, mesh)
    arguments = lambda batch: (seen(method, batch),)  # noqa: E731
  started = time.perf_counter()
  with jax.set_mesh(mesh):
    lowered = step.lower(state, *arguments(batch))
  traced = time.perf_counter()
  run = lowered.compile()
  done = time.perf_counter()
  give_back_freed()
  return _Compiled(
    lambda state, batch: run(state, *arguments(batch)),
    make_state,
    state,
    traced - started,
    done - traced,
    run.as_text,
  )


def _noise(shapes: Any, place: jax.sharding.Sharding) -> Any:
  """Numbers for arrays: to compile what initialises a model takes GPUs longer than the step."""
  rng = np.random.default_rng(0)

  def draw(leaf):
    return (0.02 * rng.standard_normal(leaf.shape, np.float32)).astype(leaf.dtype)

  return jax.device_put(jax.tree.map(draw, shapes), place)


def place(config: ml_collections.ConfigDict, frames: int) -> dict[str, jax.Array]:
  """A batch of noise on the devices. Raises UserError if they cannot share it."""
  unit = methods.of(config).unit
  parts = jax.device_count() * config.train.accumulate * unit
  if frames < 1 or frames % parts:
    raise UserError(
      f'--frames is {frames}: use a multiple of {parts}, the devices times config.train.accumulate'
      + (f' times {unit} frames that stay together' if unit > 1 else '')
    )
  return global_batch(random_batch(config, frames), batch_sharding(make_mesh(config.mesh.fsdp)))


def bench(
  what: str, config: ml_collections.ConfigDict, frames: int, phase: int, repeats: int
) -> dict[str, Any]:
  """Times one kind of step on a batch of noise.

  Args:
    what: 'predict' (forward and post-processing) or 'step' (a training step).
    config: the model and recipe.
    frames: of the batch.
    phase: of the recipe; in phase 1 of two the backbone has no gradient.
    repeats: timed runs, after one that is not.

  Returns:
    What ran where; seconds of each run with their median and extremes; frames_per_second,
    gflop_per_frame (forward, or of the step; see flops.COUNTED), tflops_per_second, and mfu where
    the device's peak is known; peak_memory [bytes] of the 'device' or, where that cannot be told,
    the 'process' (peak_memory_of); compile_seconds, less where a compiled program was kept.

  Raises:
    UserError: the devices cannot share the batch.
  """
  if repeats < 1:
    raise UserError(f'--repeats is {repeats}: use 1 or more')
  keep_freed()  # here too, since this may be a child of the command
  batch = place(config, frames)
  compiled = compile_step(what, config, batch, phase)
  state = compiled.make_state()
  seconds = []
  for _ in range(repeats + 1):
    started = time.perf_counter()
    result = jax.block_until_ready(compiled.run(state, batch))
    seconds.append(time.perf_counter() - started)
    if what == 'step':
      state = result[0]  # the old one was donated
  # Before the count of FLOPs, which takes memory as well.
  memory = jax.devices()[0].memory_stats() or {}
  of = 'device' if 'peak_bytes_in_use' in memory else 'process'
  peak_memory = memory['peak_bytes_in_use'] if of == 'device' else peer.process_memory()
  if what == 'step':
    done = flops.step_flops(config, compiled.state, batch)
  else:
    done = flops.forward_flops(config, compiled.state, batch)
  result = {
    'what': what,
    'platform': jax.default_backend(),
    'device': jax.devices()[0].device_kind,
    'devices': jax.device_count(),
    'dtype': config.dtype,
    'forms': forms(config),
    'frames': frames,
    'gflop_per_frame': done / frames / 1e9,
    'peak_flops': flops.peak(),
    'compile_seconds': compiled.trace_seconds + compiled.compile_seconds,
    'peak_memory': peak_memory,
    'peak_memory_of': of,
    'jax': jax.__version__,
  }
  if what == 'step':
    result |= {'phase': phase, 'trained_parameters': count(compiled.state.trained)}
  return timed(result, seconds[1:])


def timed(result: dict[str, Any], seconds: list[float]) -> dict[str, Any]:
  """A result with the figures that follow from seconds of single runs."""
  median = statistics.median(seconds)
  result = result | {
    'seconds': seconds,
    'median_seconds': median,
    'least_seconds': min(seconds),
    'most_seconds': max(seconds),
    'frames_per_second': result['frames'] / median,
  }
  if 'gflop_per_frame' in result:
    done = result['gflop_per_frame'] * 1e9 * result['frames_per_second']
    result |= flops.speed(done, result['peak_flops'])
  return result


def compile_times(
  config: ml_collections.ConfigDict, frames: int, phase: int
) -> dict[str, dict[str, float]]:
  """Times how long both steps take to compile: anew, and in a later process with what was kept.

  Returns:
    For 'step' and 'predict': trace_seconds (Python, in every process), cold_seconds, and
    cached_seconds, which is read from JAX's persistent cache if `kept`.

  Raises:
    UserError: the devices cannot share the batch, or a process died.
  """
  with tempfile.TemporaryDirectory() as cache:
    cold = in_child(_compile_both, config, frames, phase, cache)
    again = in_child(_compile_both, config, frames, phase, cache)
  return {
    what: {
      'trace_seconds': cold[what]['trace'],
      'cold_seconds': cold[what]['compile'],
      'cached_seconds': again[what]['compile'],
      'kept': again[what]['kept'],
    }
    for what in TITLES
  }


def _compile_both(
  config: ml_collections.ConfigDict, frames: int, phase: int, cache: str
) -> dict[str, dict[str, Any]]:
  jax.config.update('jax_compilation_cache_dir', cache)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  hits = []
  jax.monitoring.register_event_listener(
    lambda event, **_: event == '/jax/compilation_cache/cache_hits' and hits.append(event)
  )
  batch = place(config, frames)
  jax.random.key(config.seed)  # compiled here, so that what is kept of a step is the step
  result = {}
  for what in TITLES:
    hits.clear()
    compiled = compile_step(what, config, batch, phase)
    result[what] = {
      'trace': compiled.trace_seconds,
      'compile': compiled.compile_seconds,
      'kept': bool(hits),
    }
  return result


def where() -> tuple[str, str, int]:
  """Platform and kind of the devices, and how many there are."""
  return jax.default_backend(), jax.devices()[0].device_kind, jax.device_count()


def require_one(devices: int) -> None:
  """UserError for several devices: PyTorch's model beside ours runs on one."""
  if devices > 1:
    raise UserError(
      f'JAX sees {devices} devices, and the peer runs on one: set CUDA_VISIBLE_DEVICES=0, or '
      'JAX_NUM_CPU_DEVICES=1 on a CPU'
    )


def in_child(function: Callable[..., _T], *arguments: Any) -> _T:
  """Calls a function of a module in a fresh process, whose memory and programs are its own."""
  context = multiprocessing.get_context('spawn')
  with ProcessPoolExecutor(1, context) as pool:
    try:
      return pool.submit(function, *arguments).result()
    except BrokenProcessPool:
      raise UserError(
        'a process of the benchmark died, as one does that is killed for its memory: use fewer '
        '--frames'
      ) from None
    except BaseException:  # a signal above all, which would wait for the child to end
      for child in multiprocessing.active_children():
        child.terminate()
      raise


def beside_peer(
  what: str,
  config: ml_collections.ConfigDict,
  frames: int,
  phase: int,
  repeats: int,
  progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
  """Times the model and the transformers library's Mask2Former of the same sizes, in turns.

  Each measurement has a process of its own, one after the other, ROUNDS times; medians are over
  all rounds. Ours runs in the dtypes that the peer's modes are compared with, see peer.MODES.

  Returns:
    platform, device, and 'ours' by dtype and 'peer' by mode, with what `bench` tells; each of the
    latter has `speed_ratio` and `memory_ratio`: ours to the peer's frames a second and peak memory.

  Raises:
    UserError: the peer is not installed, cannot run where JAX does, or a process died.
  """
  if config.method != 'aavs':
    raise UserError(f'--peer has the sizes of aavs, and the config is of {config.method}')
  peer.require()
  batch = random_batch(config, frames)
  # Started as a measurement is, since asking here would take the device.
  platform, _, count = in_child(where)
  require_one(count)
  device = peer.DEVICES.get(platform)
  if not device:
    raise UserError(f'--peer: JAX runs on {platform}, where PyTorch does not; use a CPU or GPU')
  modes = peer.MODES[device]
  ours, theirs = {}, {}
  for number in range(ROUNDS):
    for dtype in dict.fromkeys(modes.values()):
      config = config.copy_and_resolve_references()
      config.dtype = dtype
      progress(f'round {number + 1} of {ROUNDS}: ours, {dtype}')
      found = in_child(bench, what, config, frames, phase, repeats)
      ours[dtype] = _join(ours.get(dtype), found)
    for mode in modes:
      progress(f'round {number + 1} of {ROUNDS}: the peer, {mode}')
      sizes = config.to_dict()
      found = in_child(peer.measure, what, sizes, batch, phase, repeats, device, mode)
      theirs[mode] = _join(theirs.get(mode), found)
  for mode, found in theirs.items():
    same = ours[modes[mode]]
    found['speed_ratio'] = same['frames_per_second'] / found['frames_per_second']
    found['memory_ratio'] = same['peak_memory'] / found['peak_memory']
  some = next(iter(ours.values()))
  return {
    **{name: some[name] for name in ('what', 'platform', 'device', 'frames')},
    'phase': phase,
    'rounds': ROUNDS,
    'ours': ours,
    'peer': theirs,
  }


def _join(before: dict[str, Any] | None, found: dict[str, Any]) -> dict[str, Any]:
  """One measurement of those of two rounds."""
  if before is None:
    return timed(found, found['seconds'])
  found['peak_memory'] = max(before['peak_memory'], found['peak_memory'])
  return timed(found, before['seconds'] + found['seconds'])


def format_bench(result: dict[str, Any]) -> str:
  """What `bench` found, for people."""
  rows = [
    ('median', _seconds(result)),
    ('speed', f'{result["frames_per_second"]:.4g} frames/s'),
    ('model FLOPs', f'{result["gflop_per_frame"]:.4g} GFLOP a frame'),
    ('that is', _speed(result)),
    ('peak memory', _memory(result)),
    ('compilation', f'{result["compile_seconds"]:.1f} s, less where the program was kept'),
  ]
  if 'trained_parameters' in result:
    rows.append(('trained parameters', f'{result["trained_parameters"] / 1e6:.2f} M'))
  return '\n'.join([
    f'{TITLES[result["what"]]} of {result["frames"]} frames'
    + (f', phase {result["phase"]}' if 'phase' in result else '')
    + f', {result["dtype"]}, {format_forms(result["forms"])}on '
    f'{result["devices"]} {result["device"]} device{"s" * (result["devices"] > 1)}',
    *(f'  {label:20}{text}' for label, text in rows),
    flops.COUNTED,
  ])  # fmt: skip


def format_forms(forms: dict[str, Any]) -> str:
  """What `methods.forms` gives, each with a comma after it."""
  return ''.join(f'{name} {value}, ' for name, value in forms.items())


def _seconds(result: dict[str, Any]) -> str:
  return (
    f'{result["median_seconds"]:.3f} s of {len(result["seconds"])}, from '
    f'{result["least_seconds"]:.3f} to {result["most_seconds"]:.3f}'
  )


def _speed(result: dict[str, Any]) -> str:
  text = f'{result["tflops_per_second"]:.3g} TFLOP/s'
  if 'mfu' in result:
    return f'{text}, {100 * result["mfu"]:.1f} % of {result["peak_flops"] / 1e12:g} (MFU)'
  return f'{text}; no MFU, since the peak of this device is not known'


def _memory(result: dict[str, Any]) -> str:
  of = {'device': "a device's memory", 'process': 'the process, host memory'}
  return f'{result["peak_memory"] / 1e9:.2f} GB of {of[result["peak_memory_of"]]}'


def format_compile_times(result: dict[str, dict[str, float]]) -> str:
  """What `compile_times` found, for people."""
  lines = [f'{"seconds":30}{"tracing":>10}{"compiling":>12}{"from the cache":>17}']
  for what, times in result.items():
    lines.append(
      f'  {TITLES[what]:28}{times["trace_seconds"]:10.1f}{times["cold_seconds"]:12.1f}'
      + (f'{times["cached_seconds"]:17.1f}' if times['kept'] else f'{"not kept":>17}')
    )
  return '\n'.join([*lines, 'tracing comes first in every process, also before the cache is read'])


def format_peer(result: dict[str, Any]) -> str:
  """What `beside_peer` found, for people."""
  a_peer = next(iter(result['peer'].values()))
  lines = [
    f'{TITLES[result["what"]]} of {result["frames"]} frames'
    + (f', phase {result["phase"]}' if result['what'] == 'step' else '')
    + f', on {result["device"]}; {result["rounds"]} rounds in turns, a process each; the peer is '
    f'Mask2Former of transformers {a_peer["transformers"]}, torch {a_peer["torch"]}, on '
    f'{a_peer["threads"]} threads',
    f'  {"":26}{"seconds":>10}{"frames/s":>11}{"peak GB":>10}{"ours : peer, speed":>21}'
    f'{"memory":>9}',
  ]
  for who, table in (('ours', result['ours']), ('peer', result['peer'])):
    for name, found in table.items():
      line = (
        f'  {f"{who}, {name}":26}{found["median_seconds"]:10.3f}{found["frames_per_second"]:11.2f}'
        f'{found["peak_memory"] / 1e9:10.2f}'
      )
      if who == 'peer':
        line += f'{found["speed_ratio"]:21.2f}{found["memory_ratio"]:9.2f}'
      lines.append(line)
  lines += [f'  ours, {name}: {_speed(found)}' for name, found in result['ours'].items()]
  if result['what'] == 'step':
    lines.append(peer.TRAINED)
  return '\n'.join([*lines, flops.COUNTED])

"""The compiled training step, kept for the next start of the same training.

JAX keeps what XLA makes of a program, but finds it again only once the program has been traced and
lowered, which of a large model takes longer than all else. Here it is found by what it was made of:
config, arguments, devices, flags, and every Python file that was loaded.
"""

import hashlib
import importlib.util
import os
import pickle
import platform
import sys
import zlib
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import ml_collections
from etils import epath
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from aavs_jax.console import say
from aavs_jax.devices import distributed
from aavs_jax.input_pipeline import files
from aavs_jax.methods.method import Method
from aavs_jax.training import checkpoint
from aavs_jax.training.state import Flat, flat_shapes

_FLAGS = ('XLA_FLAGS', 'LIBTPU_INIT_ARGS')
_ANEW = '  WARNING: the next start will have to compile anew'
_OF_PROCESSORS = ('model name', 'flags', 'Features')  # lines of /proc/cpuinfo

_FOUND = []  # an event for each program that JAX has found in its cache
jax.monitoring.register_event_listener(
  lambda event, **_: event == '/jax/compilation_cache/cache_hits' and _FOUND.append(event)
)


class Programs:
  """What is kept of one training. What is read there is run, as is what JAX keeps."""

  def __init__(
    self,
    folder: str | None,
    workdir: epath.Path,
    config: ml_collections.ConfigDict,
    method: Method,
    mesh: Mesh,
  ):
    """Of a method's training in workdir on the devices of a mesh; in a folder, or not at all."""
    self._folder, self._method = folder and epath.Path(folder), method
    self._training = _short(f'{checkpoint.absolute(workdir)} {jax.process_index()}')
    self._devices = list(mesh.devices.flat)
    first = self._devices[0]
    self._made_of = {
      'config': config.to_dict(),
      'devices': [_describe(device) for device in self._devices],
      'platform': [first.client.platform_version, first.platform == 'cpu' and _processor()],
      'flags': [os.environ.get(name) for name in _FLAGS],
      'jax': {name: str(value) for name, value in jax.config.values.items()},
      'python': sys.version,
    }
    try:
      self._loaded = _sources() if folder else {}
    except OSError as error:  # an archive
      self._folder = None
      say(f'{_ANEW} ({error})')

  def shapes(self) -> Flat:
    """See flat_shapes, for which the model is traced."""
    shapes = self._read('shapes')
    if shapes is None:
      shapes = flat_shapes(self._method)
      self.keep_shapes(shapes)
    return shapes

  def keep_shapes(self, shapes: Flat) -> None:
    """Keeps those of all numbers of the model."""
    self._write('shapes', shapes)

  def step(self, name: str) -> tuple[jax.stages.Compiled, int] | None:
    """The step that was kept under a name, see step_name, and its FLOPs; None if none was.

    None too if another process has none: all must call this, and all compile or none does.
    """
    kept = self._load(name)
    return kept if all(distributed.gather(kept is not None)) else None

  def _load(self, name: str) -> tuple[jax.stages.Compiled, int] | None:
    kept = self._read(name)
    if kept is None:
      return None
    *step, flops = kept
    try:
      load = serialize_executable.deserialize_and_load
      return load(*step, execution_devices=self._devices), flops
    except Exception as error:  # whatever the runtime of the devices raises
      say(f'  the training step that was kept cannot be loaded ({" ".join(str(error).split())})')
      return None

  def keep_step(self, name: str, step: jax.stages.Compiled, flops: Future[int]) -> None:
    """Keeps a step that was compiled anew under a name, if it can be."""
    try:
      serialized = serialize_executable.serialize(step)
    except Exception:  # a callback in it, or a runtime of devices that cannot
      return
    self._write(name, (*serialized, flops.result()))

  def _read(self, name: str) -> Any:
    if not self._folder:
      return None
    try:
      kept = zlib.decompress(self._path(name).read_bytes())
      made_of, sources, content = pickle.loads(kept)
      same = made_of == self._made_of and sources == {name: self._digest(name) for name in sources}
      return pickle.loads(content) if same else None
    except Exception:  # not there, damaged, out of reach: it can be made anew
      return None

  def _write(self, name: str, content: Any) -> None:
    if not self._folder:
      return
    try:
      sources = _sources()
      if any(sources.get(name, digest) != digest for name, digest in self._loaded.items()):
        return  # edited since: what is kept would be the old program under the new code
      kept = pickle.dumps((self._made_of, sources, pickle.dumps(content)))
      with files.writing(self._path(name)) as path:
        path.write_bytes(zlib.compress(kept, 1))  # a seventh of it, in 0.1 s
    except Exception as error:  # of a disk, a bucket: no reason not to train
      say(f'{_ANEW} ({error})')

  def _digest(self, module: str) -> str:
    """Of the file from which a module was loaded, or would be."""
    known = self._loaded.get(module)
    return known or files.digest(importlib.util.find_spec(module).origin)

  def _path(self, name: str) -> epath.Path:
    return self._folder / f'aavs-{name}-{self._training}'


def compile_step(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, bool]:
  """The compiled step, and whether it was compiled anew, and not found by JAX.

  What was found cannot be kept: on CPUs it loses functions, if it can be serialised at all.
  """
  before = len(_FOUND)
  compiled = lowered.compile()
  return compiled, len(_FOUND) == before


def step_name(phase: int, steps_of_phase: int, arguments: Any) -> str:
  """What tells the steps of a training apart.

  Args:
    phase: 1 or 2.
    steps_of_phase: that the learning rate follows.
    arguments: of other shapes, types, places or structure for each.
  """
  leaves, tree = jax.tree.flatten(arguments)
  text = [f'{phase} {steps_of_phase} {tree}']
  text += [f'{leaf.shape} {leaf.dtype} {leaf.sharding}' for leaf in leaves]
  return f'step-{_short(" ".join(text))}'


def _describe(device: jax.Device) -> str:
  return f'{device.id} {device.process_index} {device.device_kind} {getattr(device, "coords", "")}'


def _short(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _sources() -> dict[str, str]:
  """Digests of the Python files that are loaded, by module. OSError: one is in an archive."""
  paths = {name: getattr(module, '__file__', None) for name, module in list(sys.modules.items())}
  # Without names that a library made up.
  paths = {name: path for name, path in paths.items() if path and path.endswith(('.py', '.pyc'))}
  return {name: files.digest(path) for name, path in paths.items() if os.path.isabs(path)}


def _processor() -> str:
  """Of this machine, with what it can do: programs are compiled for that."""
  cpuinfo = Path('/proc/cpuinfo')
  if not cpuinfo.exists():
    return platform.processor()
  lines = cpuinfo.read_text(encoding='utf-8').splitlines()
  return ' '.join(sorted({line for line in lines if line.startswith(_OF_PROCESSORS)}))

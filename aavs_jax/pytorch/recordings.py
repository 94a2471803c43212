"""Recorded runs of the authors' PyTorch code, and what it takes to run them again.

tests/goldens/README.md says what the files hold. Every size comes from the file: its config and the
shapes of its arrays.
"""

import contextlib
import functools
import json
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

from aavs_jax.configs import avss_stage1, avss_stage2
from aavs_jax.input_pipeline.clips import IGNORE
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.methods.matching import Targets
from aavs_jax.methods.set_loss import PointDraws
from aavs_jax.models.aavs import AAVS
from aavs_jax.pytorch.names import released_name, released_to_params
from aavs_jax.training.state import flatten
from aavs_jax.types import Variables

CONFIGS = {1: avss_stage1.get_config(), 2: avss_stage2.get_config()}  # what trains, and how

Flat = dict[str, jax.Array]


class Arrays(dict):
  """The arrays of a file by key. A missing or misshapen one is a UserError naming file and key."""

  def __init__(self, path: Path, arrays: dict[str, np.ndarray]):
    super().__init__(arrays)
    self.path = path

  def __missing__(self, key):
    raise UserError(f'{self.path} lacks {key}: it is damaged or no recording, take another copy')

  def numbers(self, key: str, *shape: int | None) -> np.ndarray:
    """The numbers under a key, which must have this shape (None: any length)."""
    value = self[key]
    fits = value.ndim == len(shape) and all(b in (None, a) for a, b in zip(value.shape, shape))
    if not fits or value.dtype.kind not in 'fiu':
      raise UserError(
        f'{self.path}: {key} is {value.dtype} {value.shape}, not numbers of shape {shape} as the '
        'rest of the file asks for: take another copy'
      )
    return value

  def number(self, key: str) -> float:
    """The one number under a key (scalars were recorded as () or (1,))."""
    return float(self.numbers(key, *(1,) * self[key].ndim).item())

  def under(self, prefix: str) -> dict[str, np.ndarray]:
    """What follows a prefix in a key -> array."""
    return {key.removeprefix(prefix): self[key] for key in self if key.startswith(prefix)}


class Recording(NamedTuple):
  """The recorded run of one model."""

  arrays: Arrays
  sizes: dict  # its config
  stage: int


@contextlib.contextmanager
def legible(path: Path):
  """Turns what a damaged or foreign file makes numpy and the model raise into one sentence."""
  try:
    yield
  except UserError:
    raise
  except (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
  ) as error:
    text = f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'
    text = getattr(error, 'strerror', None) or text
    raise UserError(
      f'{path} cannot be read as a recording ({text}): name an .npz file in the format of '
      'tests/goldens/README.md'
    ) from error


def read(path: str | Path) -> Arrays:
  """Every array of an .npz file; nothing in it is unpickled. Raises UserError if it is none."""
  with legible(path):
    file = np.load(path, allow_pickle=False)
    if isinstance(file, np.ndarray):
      raise UserError(f'{path} holds a single array: name an .npz file of a recording')
    with file:
      return Arrays(Path(path), dict(file))


def recording_of(arrays: Arrays) -> Recording:
  """The recording that a file holds; its stage is 2 if it feeds a prior mask to the model.

  Raises:
    UserError: something that is needed to run it again is missing or does not fit the rest.
  """
  with legible(arrays.path):
    sizes = json.loads(bytes(arrays['config']))
    recording = Recording(arrays, sizes, 2 if 'in/stage1_mask' in arrays else 1)
    model(recording, 'gather')
    inputs(recording)
    counts = {phase: max(steps(recording, phase), 1) for phase in (1, 2)}
    taken = [f'phase{phase}/{step}' for phase in (1, 2) for step in range(counts[phase])]
    for prefix in ('loss', *taken):
      draws(recording, prefix)
      arrays.number(f'{prefix}/total')
  return recording


def steps(recording: Recording, phase: int) -> int:
  """How many optimiser steps of a phase were recorded."""
  return sum(key.endswith('/total') for key in recording.arrays.under(f'phase{phase}/'))


def set_names(recording: Recording) -> list[str]:
  """Names of the prediction sets in the recording, in our order (the final one last)."""
  return [*map(str, range(recording.sizes['decl'] - 1)), 'final']


def model(recording: Recording, sampling: str, dtype=jnp.float32) -> AAVS:
  """The recorded model, with one of the two sampling forms."""
  c = recording.sizes

  def rows(path):
    return len(recording.arrays[f'param/{released_name(path)}'])

  points = rows('aavs/pixel_decoder/layer0/attention/weights/bias') // (c['dh'] * 3)  # of 3 levels
  config = CONFIGS[recording.stage].copy_and_resolve_references().model
  config.update(
    num_queries=c[f'q{recording.stage}'],
    hidden=c['hid'],
    heads=c['dh'],
    encoder_layers=c['encl'],
    encoder_ffn=c['encff'],
    encoder_points=points,
    decoder_layers=c['decl'] - 1,
    decoder_ffn=c['ff'],
    audio_hidden=rows('aavs/audio_projection/down/linear/bias'),
    sampling=sampling,
  )
  swin = FrozenDict(  # so that what is compiled for a model can be kept
    embed_dim=c['ed'],
    depths=tuple(c['depths']),
    heads=tuple(c['heads']),
    window=c['win'],
    mlp_ratio=rows('aavs/backbone/stage0_block0/fc1/bias') // c['ed'],
    drop_path=0.0,
  )
  return AAVS(
    num_classes=c['num_labels'],
    use_prior=recording.stage == 2,
    dtype=dtype,
    **config.to_dict() | {'swin': swin},
  )


def inputs(recording: Recording) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
  """Frames, audio embeddings and prior, as the model takes them."""
  arrays = recording.arrays
  frames = arrays.numbers('in/pixel_values', None, 3, None, None)
  n = len(frames)
  prior = arrays.numbers('in/stage1_mask', n, None, None) if recording.stage == 2 else None
  audio = arrays.numbers('in/audio_features', n, None)
  return frames.transpose(0, 2, 3, 1), audio, prior


def targets(recording: Recording) -> Targets:
  """The ground truth: a target for each label value of a frame, background included."""
  n, _, height, width = recording.arrays['in/pixel_values'].shape
  labels = recording.arrays.numbers('in/label_map', n, height, width).astype(np.uint8)
  present = [np.unique(frame[frame != IGNORE]) for frame in labels]
  classes = np.full((n, max(map(len, present))), -1, np.int32)
  for row, values in zip(classes, present):
    row[: len(values)] = values
  return Targets(labels, classes, np.ones(n, np.float32), np.zeros(n, np.int32))


def draws(recording: Recording, prefix: str) -> tuple[PointDraws, np.ndarray]:
  """Recorded draws of one evaluation of the loss, and its matches.

  Args:
    recording: where to look.
    prefix: 'loss', 'phase1/0', ...: where in it.

  Returns:
    The draws, with a leading axis s, and the query of each target int [s, n, k], -1 where there is
    no target.
  """
  arrays, names, points = recording.arrays, set_names(recording), recording.sizes['npts']
  loss = CONFIGS[recording.stage].loss
  n, k = targets(recording).classes.shape
  pairs = (len(names), n, k)
  matcher = np.zeros((len(names), n, points, 2), np.float32)
  candidates = np.zeros((*pairs, loss.oversample * points, 2), np.float32)
  extra = np.zeros((*pairs, points - int(loss.uncertain_share * points), 2), np.float32)
  query = np.full(pairs, -1)
  for s, name in enumerate(names):
    match, drawn = f'{prefix}/match/{name}', f'{prefix}/points/{name}'
    matcher[s] = arrays.numbers(f'{drawn}/matcher', n, points, 2)
    where = s, arrays[f'{match}/frame'], arrays[f'{match}/target']
    query[where] = arrays[f'{match}/query']
    candidates[where] = arrays[f'{drawn}/candidates']
    extra[where] = arrays[f'{drawn}/extra']
  return PointDraws(matcher, candidates, extra), query


def start(recording: Recording) -> Flat:
  """The parameters that everything was recorded at, by flat path.

  Raises:
    UserError: they do not make up the model of the recording's config.
  """
  path = recording.arrays.path
  with legible(path):
    shapes = _parameter_shapes(model(recording, 'gather'), inputs(recording)[1].shape[1])
    params = released_to_params(recording.arrays.under('param/'), shapes, what=str(path))
  return {path: jnp.asarray(value) for path, value in params.items()}


@functools.cache
def _parameter_shapes(model: AAVS, embedding: int) -> dict[str, jax.ShapeDtypeStruct]:
  """By flat path; the size of the frames has no part in them."""
  prior = jax.ShapeDtypeStruct((1, 64, 64), jnp.float32) if model.use_prior else None
  tree = jax.eval_shape(
    lambda *inputs: model.init(jax.random.key(0), *inputs),
    jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32),
    jax.ShapeDtypeStruct((1, embedding), jnp.float32),
    prior,
  )
  return flatten(Variables({'aavs': tree['params']}, {}))

"""What the parity tests share: the recorded numbers, the start they were recorded at, the model.

The recording holds the trained parameters as they were at its very end, not at its start (see
goldens/README.md). Its start was drawn from a seeded generator of PyTorch, so it is drawn again
here: `start` needs neither the model under test nor a fit.
"""

import functools
import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from aavs_jax.convert import from_released_layout, released_name, released_to_params
from aavs_jax.losses import PointDraws, loss
from aavs_jax.models.aavs import AAVS
from aavs_jax.stages import trainable_paths
from aavs_jax.types import Outputs, Targets
from configs import avss_stage1, avss_stage2

GOLDENS = pathlib.Path(__file__).parent / 'goldens'
CONFIGS = {1: avss_stage1.get_config(), 2: avss_stage2.get_config()}
SEEDS = {1: 12, 2: 13}  # of the generator that the recording drew everything from
STEPS = 3  # recorded optimiser steps a phase
# Each compiled function runs a few times, so compiling fast matters and running fast does not.
COMPILE_FAST = {
  'xla_backend_optimization_level': 0,
  'xla_llvm_disable_expensive_passes': True,
  'xla_cpu_use_fusion_emitters': False,
}
INTERMEDIATE_MODULES = ('backbone', 'pixel_decoder', 'audio_projection')

Flat = dict[str, jax.Array]


class TorchGenerator:
  """PyTorch's generator on the CPU: what torch.rand and torch.randn give in float32."""

  def __init__(self, seed: int):
    self._state = np.random.RandomState(seed)
    self._spare = None

  def _words(self, count: int) -> np.ndarray:
    return self._state.randint(0, 2**32, size=count, dtype=np.uint32)

  def rand(self, *shape: int) -> np.ndarray:
    words = self._words(int(np.prod(shape))) & 0xFFFFFF
    return (words.astype(np.float32) * np.float32(2**-24)).reshape(shape)

  def randn(self, *shape: int) -> np.ndarray:
    size = int(np.prod(shape))
    if size < 16:
      return np.array([self._one() for _ in range(size)], np.float32).reshape(shape)
    uniform = self.rand(size)
    whole = size // 16 * 16
    normal = np.empty(size, np.float32)
    normal[:whole] = self._box_muller(uniform[:whole])
    if size % 16:
      normal[-16:] = self._box_muller(self.rand(16))
    return normal.reshape(shape)

  @staticmethod
  def _box_muller(uniform: np.ndarray) -> np.ndarray:
    """Blocks of 16: eight radii, then eight angles."""
    radius, angle = uniform.reshape(-1, 2, 8).transpose(1, 0, 2)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - radius))
    angle = np.float32(2 * np.pi) * angle
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)

  def _one(self) -> float:
    """Tensors of fewer than 16 numbers: pairs in float64, the second kept for the next call."""
    if self._spare is not None:
      value, self._spare = self._spare, None
      return value
    high, low = self._words(4).astype(np.uint64).reshape(2, 2).T
    angle, radius = ((high << np.uint64(32) | low) & np.uint64(2**53 - 1)) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log1p(-radius)), 2 * np.pi * angle
    self._spare = radius * np.sin(angle)
    return radius * np.cos(angle)


@functools.cache
def recorded(stage: int) -> dict[str, np.ndarray]:
  """Every array of a stage's recording."""
  with np.load(GOLDENS / f'stage{stage}.npz') as file:
    return dict(file)


def sizes(stage: int) -> dict:
  """The recording's config; the README beside it says what its keys mean."""
  return json.loads(bytes(recorded(stage)['config']))


def draw_start(stage: int) -> tuple[dict[str, np.ndarray], TorchGenerator]:
  """Released name -> value of every parameter at the recording's start, and the generator after it.

  In the order of the released state dict: standard normals times 1.2 / sqrt(fan in) for matrices
  and 0.1 for vectors, norms of 1 + 0.1 normals. Bias tables (0.5), sampling offsets (1.5) and
  embeddings (0.7) were drawn a second time.
  """
  generator = TorchGenerator(SEEDS[stage])
  parameters = {}
  for key, value in recorded(stage).items():
    if not key.startswith('param/') or value.dtype != np.float32:  # the rest are index buffers
      continue
    name = key.removeprefix('param/')
    draw, scale = generator.randn(*value.shape), 0.1
    if value.ndim > 1:
      scale = 1.2 / np.prod(value.shape[1:]) ** 0.5
    for endings, again in (
      (('relative_position_bias_table',), 0.5),
      (('sampling_offsets.bias',), 1.5),
      (('embed.weight', 'embedder.weight', 'queries_features.weight'), 0.7),
    ):
      if name.endswith(endings):
        draw, scale = generator.randn(*value.shape), again
    offset = 1 if name.endswith('weight') and 'norm' in name else 0
    parameters[name] = np.float32(offset) + draw * np.float32(scale)
  return parameters, generator


def trained_names(stage: int) -> list[str]:
  """Released names of what the recording trained in phase 2."""
  prefix = 'phase2/param_after/'
  return [key.removeprefix(prefix) for key in recorded(stage) if key.startswith(prefix)]


@functools.cache
def model(stage: int, form: str) -> AAVS:
  """The recording's model with one of the two sampling forms."""
  c = sizes(stage)
  return AAVS(
    num_classes=c['num_labels'],
    num_queries=c[f'q{stage}'],
    use_prior=stage == 2,
    adapter_variant='replace' if stage == 1 else 'after',
    swin=dict(
      embed_dim=c['ed'],
      depths=tuple(c['depths']),
      heads=tuple(c['heads']),
      window=c['win'],
      mlp_ratio=4,
      drop_path=0.3,
    ),
    hidden=c['hid'],
    heads=c['dh'],
    encoder_layers=c['encl'],
    encoder_ffn=c['encff'],
    encoder_points=4,
    decoder_layers=c['decl'] - 1,
    decoder_ffn=c['ff'],
    audio_hidden=64,
    sampling=form,
  )


@functools.cache
def inputs(stage: int) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Frames, audio embeddings and prior, as the model takes them."""
  r = recorded(stage)
  frames = jnp.asarray(r['in/pixel_values'].transpose(0, 2, 3, 1))
  prior = jnp.asarray(r['in/stage1_mask']) if stage == 2 else None
  return frames, jnp.asarray(r['in/audio_features']), prior


@functools.cache
def start(stage: int) -> Flat:
  """The parameters everything was recorded at, flat ('aavs/queries/features').

  The frozen ones are the recorded ones, the trained ones are drawn again.
  """
  template = jax.eval_shape(model(stage, 'gather').init, jax.random.key(0), *inputs(stage))
  r, drawn = recorded(stage), draw_start(stage)[0]
  source = {k.removeprefix('param/'): v for k, v in r.items() if k.startswith('param/')}
  source |= {name: drawn[name] for name in trained_names(stage)}
  params = released_to_params(source, template['params'])
  return traverse_util.flatten_dict({'aavs': params}, sep='/')


def to_release(path: str) -> str:
  """Released name of a flat path."""
  return released_name(path.removeprefix('aavs/'))


def from_release(path: str, value: np.ndarray) -> np.ndarray:
  """A recorded value of the parameter at a path, in our layout."""
  return from_released_layout(path, value)


@functools.cache
def targets(stage: int) -> Targets:
  labels = recorded(stage)['in/label_map'].astype(np.uint8)
  present = [np.unique(frame) for frame in labels]
  classes = np.full((len(labels), max(map(len, present))), -1, np.int32)
  for row, values in zip(classes, present):
    row[: len(values)] = values
  return Targets(jnp.asarray(labels), jnp.asarray(classes), jnp.ones(len(labels)))


def set_names(stage: int) -> list[str]:
  """Names of the prediction sets in the recording, in our order (the final one last)."""
  return [*map(str, range(sizes(stage)['decl'] - 1)), 'final']


def draws(stage: int, prefix: str) -> tuple[PointDraws, np.ndarray]:
  """Recorded draws of one evaluation of the loss, and its matches.

  Args:
    stage: 1 or 2.
    prefix: 'loss', 'phase1/0', ...: where in the recording.

  Returns:
    The draws, and the query of each target int [s, n, k], -1 where there is no target.
  """
  r, names, points = recorded(stage), set_names(stage), sizes(stage)['npts']
  n, k = targets(stage).classes.shape
  pairs = (len(names), n, k)
  candidates = np.zeros((*pairs, 3 * points, 2), np.float32)
  extra = np.zeros((*pairs, points - int(0.75 * points), 2), np.float32)
  query = np.full(pairs, -1)
  for s, name in enumerate(names):
    match = f'{prefix}/match/{name}'
    where = s, r[f'{match}/frame'], r[f'{match}/target']
    query[where] = r[f'{match}/query']
    candidates[where] = r[f'{prefix}/points/{name}/candidates']
    extra[where] = r[f'{prefix}/points/{name}/extra']
  matcher = np.stack([r[f'{prefix}/points/{name}/matcher'] for name in names])
  return PointDraws(jnp.asarray(matcher), jnp.asarray(candidates), jnp.asarray(extra)), query


class Evaluation(NamedTuple):
  """One pass at some parameters with recorded draws."""

  total: jax.Array
  terms: dict[str, jax.Array]
  outputs: Outputs
  intermediates: dict[str, jax.Array]  # named as in the recording, in its layout
  gradient: Flat | None


def _evaluate(params: Flat, points: PointDraws, *, stage: int, form: str):
  tree = traverse_util.unflatten_dict(params, sep='/')['aavs']
  outputs, captured = model(stage, form).apply(
    {'params': tree},
    *inputs(stage),
    mutable='intermediates',
    capture_intermediates=lambda module, _: module.name in INTERMEDIATE_MODULES,
  )
  maps, pixel, audio = (
    captured['intermediates'][name]['__call__'][0] for name in INTERMEDIATE_MODULES
  )
  intermediates = {
    **{f'backbone/{i}': x.transpose(0, 3, 1, 2) for i, x in enumerate(maps)},
    **{f'pixel_decoder/{i}': x.transpose(0, 3, 1, 2) for i, x in enumerate(pixel[0])},
    'mask_features': pixel[1].transpose(0, 3, 1, 2),
    'audio_embeddings': audio,
  }
  total, terms = loss(outputs, targets(stage), points, form)
  return total, (terms, outputs, intermediates)


@functools.cache
def _compiled(stage: int, form: str, with_gradient: bool):
  """The parameters' gradient is taken for those that train in phase 2 of the stage's config."""
  names = trainable_paths(CONFIGS[stage], start(stage), 2)

  @functools.partial(jax.jit, compiler_options=COMPILE_FAST)
  def run(params, points):
    frozen = {path: value for path, value in params.items() if path not in names}

    def of_trained(trained):
      return _evaluate({**frozen, **trained}, points, stage=stage, form=form)

    trained = {path: params[path] for path in names}
    if with_gradient:
      (total, rest), gradient = jax.value_and_grad(of_trained, has_aux=True)(trained)
    else:
      (total, rest), gradient = of_trained(trained), None
    return Evaluation(total, *rest, gradient)

  return run


def evaluate(stage: int, params: Flat, points: PointDraws, form: str = 'gather') -> Evaluation:
  """Outputs, loss and, with form 'gather', the gradient. Compiled once for a stage and form."""
  return _compiled(stage, form, form == 'gather')(params, points)


@functools.cache
def at_start(stage: int, form: str) -> Evaluation:
  """The evaluation that 'out', 'loss', 'grad' and 'post' of the recording describe."""
  return evaluate(stage, start(stage), draws(stage, 'loss')[0], form)


def relative(ours, theirs) -> float:
  """Largest difference as a share of the largest recorded value."""
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  assert ours.shape == theirs.shape
  return float(np.abs(ours - theirs).max() / np.abs(theirs).max())

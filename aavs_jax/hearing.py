"""A start for small models: the audio network learns which classes sound, from labelled seconds.

The published recipe begins with a VGGish that has heard AudioSet, and keeps it frozen. Where there
is none, or none of this size, it learns here to tag the classes of the labelled seconds of training
clips, and of mixtures of two of them, by a linear head, which is thrown away.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jaxtyping import Bool, Float

from aavs_jax import config as config_lib
from aavs_jax.console import Progress, say
from aavs_jax.input_pipeline import audio, files, labels, reader
from aavs_jax.input_pipeline.clips import IGNORE, Clip
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.input_pipeline.index import read_index, require_classes
from aavs_jax.models.vggish import VGGish
from aavs_jax.training import work_folder
from aavs_jax.training.state import flatten
from aavs_jax.types import Variables

BATCH, LEARNING_RATE = 64, 2e-3
STEPS = 300  # for up to eight classes, and in proportion for more
HEARD = 'hearing.json'  # in the folder: of how many classes and seconds of val, how many right
_SECONDS = 6000  # that are read of a large data set, about
_MIXED = 0.5  # share of the examples that are mixtures
_LOUDNESS = 0.3  # of their parts: spread of the logarithm of its factor

Examples = tuple[Float[np.ndarray, 'n 96 64'], Bool[np.ndarray, 'n c']]  # log-mel; what sounds


def hear(config: ml_collections.ConfigDict, out: str | Path, data: str) -> float:
  """Writes a start for training, which holds the audio network of config.vggish alone.

  Args:
    config: of the stage that will start from it; its seed is used here too.
    out: a new or empty folder, to be named as config.train.init.
    data: a data set whose labels tell classes. Its training clips are learnt from, those of val
      are tagged at the end.

  Returns:
    Share of val's labelled seconds of which every class is tagged right.

  Raises:
    UserError: the data set cannot be read, its labels tell no classes, or `out` cannot be written.
  """
  files.new_folder(out)
  if 'vggish' not in config:
    raise UserError('the config has no section vggish: no network is there to learn to hear')
  splits = {split: read_index(data, split, config.data.subsets) for split in ('train', 'val')}
  config_lib.require_fit(splits['train'] + splits['val'], config)
  require_classes(splits['train'] + splits['val'])
  rng = np.random.default_rng(config.seed)
  log_mel, sounding = _examples(config, splits['train'], rng)
  taught = sounding.any(0)
  if not taught.any():
    raise UserError(f'{data} has no training clip with a labelled sound: there is nothing to hear')
  params, tags = _train(config, log_mel, sounding[:, taught], rng)
  held_out, truth = _examples(config, splits['val'], rng)
  right = np.mean((tags(held_out) == truth[:, taught]).all(1) & ~truth[:, ~taught].any(1))
  say(f'  all of {taught.sum()} classes tagged right in {right:.1%} of {len(truth)} seconds of val')
  note = {'kind': 'hearing', 'source': data, 'vggish': '', 'names': [], 'unused': []}
  note['lacking'] = [r'^(?!vggish/)']  # all else
  heard = {'classes': int(taught.sum()), 'seconds': len(truth), 'right': float(right)}
  flat = flatten(Variables({'vggish': params}, {}))
  work_folder.write_converted(out, config, flat, note, beside={HEARD: heard})
  return float(right)


def _examples(config, clips: Sequence[Clip], rng: np.random.Generator) -> Examples:
  """Every labelled second of the clips, in any order, or of some if there are very many."""
  sounds, classes = [], []
  with Progress('reading', min(_SECONDS, _labelled(clips)), 'seconds') as progress:
    for i in rng.permutation(len(clips)):
      clip = clips[i]
      try:
        heard, seen = _seconds(config, clip)
      except UserError:
        if config.data.on_bad_clip == 'error':
          raise
        continue  # training counts them
      sounds.extend(heard)
      classes.extend(seen)
      progress.advance_to(min(len(sounds), _SECONDS))
      if len(sounds) >= _SECONDS:
        break
  if not sounds:
    raise UserError(
      f'{clips[0].table}: no clip of {clips[0].split} can be read: see `aavs check-data`'
    )
  return np.stack(sounds), np.stack(classes)


def _seconds(config, clip: Clip) -> Examples:
  """The labelled ones of a clip."""
  size, log_mel = config.data.image_size, reader.load_log_mel(clip)
  read = reader.read_clip(clip, size, config.data.eval_size)
  present = [labels.values(read.label_ids(t, size)) for t in clip.labelled_frames]
  return log_mel[list(clip.labelled_frames)], [
    np.isin(np.arange(1, IGNORE), values) for values in present
  ]


def _labelled(clips: Sequence[Clip]) -> int:
  return sum(len(clip.labelled_frames) for clip in clips)


def _train(config, log_mel: np.ndarray, sounding: np.ndarray, rng: np.random.Generator):
  """Parameters of the network, and log_mel [n 96 64] -> what sounds bool [n c]."""
  network = VGGish(**config.vggish.to_dict())
  steps = round(STEPS * max(1, sounding.shape[1] / 8))
  schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, steps // 6, steps)
  optimizer = optax.adamw(schedule, weight_decay=0.01)

  def init(key):
    head = jnp.zeros((config.vggish.embedding, sounding.shape[1])), jnp.zeros(sounding.shape[1])
    return network.init(key, jnp.zeros((1, 96, 64)))['params'], head

  def logits(params, log_mel):
    network_params, (kernel, bias) = params
    return network.apply({'params': network_params}, log_mel) @ kernel + bias

  def loss(params, log_mel, sounding):
    wrong = optax.losses.sigmoid_binary_cross_entropy(logits(params, log_mel), sounding)
    return wrong.mean()

  @jax.jit
  def step(params, state, log_mel, sounding):
    gradient = jax.grad(loss)(params, log_mel, sounding)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  params = jax.jit(init)(jax.random.key(config.seed))
  state = optimizer.init(params)
  with Progress('learning to hear', steps, 'steps') as progress:
    for _ in range(steps):
      params, state = step(params, state, *_batch(log_mel, sounding, rng))
      progress.advance(1)
  compiled = jax.jit(lambda log_mel: logits(params, log_mel) > 0)
  return params[0], lambda log_mel: np.concatenate(
    [np.asarray(compiled(part)) for part in np.split(log_mel, range(BATCH, len(log_mel), BATCH))]
  )


def _batch(log_mel: np.ndarray, sounding: np.ndarray, rng: np.random.Generator) -> Examples:
  """Examples, and mixtures of two of them: magnitudes add up, and what sounds in either sounds."""
  one, other = rng.integers(0, len(log_mel), (2, BATCH))
  factors = np.exp(rng.normal(0, _LOUDNESS, (2, BATCH, 1, 1)))
  factors = np.where(rng.random((BATCH, 1, 1)) < _MIXED, factors, [[[[1.0]]], [[[0.0]]]])
  parts = np.stack([audio.magnitudes(log_mel[one]), audio.magnitudes(log_mel[other])])
  mixed = audio.log_magnitudes((factors * parts).sum(0))
  heard = sounding[one] | (sounding[other] & (factors[1, :, 0] > 0))
  return mixed.astype(np.float32), heard

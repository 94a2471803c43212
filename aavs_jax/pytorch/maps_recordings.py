"""Recorded runs of TPAVI's and AVSegFormer's releases, run again and compared.

tests/goldens/methods/README.md says what the files hold.
"""

import importlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import optax

from aavs_jax import methods
from aavs_jax.configs import _maps
from aavs_jax.input_pipeline.avsbench import SemanticClip
from aavs_jax.models.pvt_v2 import PVTv2
from aavs_jax.models.resnet import ResNet
from aavs_jax.pytorch import maps_names
from aavs_jax.pytorch.names import from_released_layout, released_to_params
from aavs_jax.pytorch.recordings import Arrays, Flat, legible
from aavs_jax.pytorch.verdicts import (
  Errors,
  Row,
  Table,
  compare,
  of_largest,
  share_unequal,
  worst,
)
from aavs_jax.scoring import metrics, protocols
from aavs_jax.training import phases
from aavs_jax.training.optimizer import taken_over
from aavs_jax.training.state import flat_shapes, flatten_statistics, is_parameter, unflatten
from aavs_jax.types import Batch

# A bias before a BatchNorm has a gradient of zero but for rounding, from which Adam makes steps.
_NO_GRADIENT = r'^tpavi/level\d/projection/bias$'
WITH_GRADIENT = 1e-3  # of a tensor's largest gradient: below it Adam's steps follow rounding
_TERMS = {  # ours -> as recorded
  'entropy': 'iou_loss', 'segmentation': 'iou_loss', 'matching': 'sa_loss', 'mixer': 'mix_loss',
}  # fmt: skip
OFF = 0.02  # of a tensor's largest change: an element further away than this is off
# In bfloat16 only maps can be asked to agree: 0.7 to 3.4 % of their pixels differ, on the CPU.
BFLOAT16_TOLERANCE = 0.05


class Recording(NamedTuple):
  """The recorded run of one model."""

  arrays: Arrays
  sizes: dict  # its config
  config: ml_collections.ConfigDict  # ours, with the recorded recipe
  batch: Batch
  begin: Flat  # all numbers at the start, but VGGish's

  def name_of(self, path: str) -> str:
    return maps_names.names_of(self.config.method, self.config.model.backbone.kind)(path)

  def ours(self, paths: Mapping, prefix: str) -> dict[str, np.ndarray]:
    """What was recorded under a prefix by our paths and in our layout; by name what is not ours."""
    names = {self.name_of(path): path for path in paths}
    return {
      names.get(name, name): from_released_layout(names.get(name, name), value)
      for name, value in self.arrays.under(prefix).items()
    }


class Trained(NamedTuple):
  """One forward pass in training mode and the gradient of its loss."""

  logits: np.ndarray  # [n c h w]
  intermediates: dict[str, np.ndarray]
  total: np.ndarray
  terms: dict[str, np.ndarray]
  statistics: dict[str, np.ndarray]
  gradient: dict[str, np.ndarray]


class Steps(NamedTuple):
  """Optimiser steps from the recorded start."""

  totals: list[float]  # the loss before each
  flat: list[Flat]  # all numbers after each


def recording_of(arrays: Arrays) -> Recording:
  """The recording that a file holds. Raises UserError for what is missing or does not fit."""
  with legible(arrays.path):
    sizes = json.loads(bytes(arrays['config']))
    method, task = sizes['method'], sizes['task']
    tensors = arrays.under('param/')

    def size(name, axis=0):
      return arrays[f'param/{name}'].shape[axis]

    if method not in maps_names.CONFIGS or task not in _maps.SUBSETS:
      raise KeyError(f'{method} {task}')
    config = maps_names.config_of(method, tensors, size)
    recipe = importlib.import_module(f'aavs_jax.configs.{method}_{task}').get_config()
    for section in ('loss', 'optimizer', 'train'):
      config[section] = recipe[section]
    if config.model.backbone.kind == 'pvt_v2':
      config.model.backbone.drop_path = 0.0
    if method == 'avsegformer':
      config.model.update(heads=sizes['num_heads'], encoder_points=sizes['points'], dropout=0.0)
    config.vggish.embedding = arrays['in/audio_features'].shape[1]
    wanted = {
      path: leaf
      for path, leaf in flat_shapes(methods.of(config)).items()
      if not path.startswith('vggish/')
    }
    name_of = maps_names.names_of(method, config.model.backbone.kind)
    begin = released_to_params(tensors, wanted, name_of=name_of, unused=(), what=str(arrays.path))
    return Recording(arrays, sizes, config, _batch(arrays, sizes), begin)


def _batch(arrays: Arrays, sizes: dict) -> Batch:
  frames = arrays.numbers('in/frames', None, 3, None, None)
  n, _, height, width = frames.shape
  batch = {
    'frames': frames.transpose(0, 2, 3, 1),
    'audio': arrays.numbers('in/audio_features', n, None),
  }
  if sizes['task'] == 'avss':
    batch['labels'] = arrays.numbers('in/labels', n, height, width)
    batch['weight'] = arrays.numbers('in/truth_flag', n)
    batch['real'] = arrays.numbers('in/video_flag', n)
  else:
    batch['labels'] = arrays.numbers('in/masks', n, height, width)
    first = np.arange(n) % sizes['frames'] == 0
    batch['weight'] = (first if sizes['task'] == 's4' else np.ones(n)).astype(np.float32)
  return batch


def evaluate(
  recording: Recording, dtype: str = 'float32'
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
  """Logits [n c h w], what Method.predict gives and intermediates in evaluation mode."""
  config = recording.config.copy_and_resolve_references()
  config.dtype = dtype
  method = methods.of(config)

  def run(flat, batch):
    with _Noting() as noted:
      outputs, _ = method.apply(unflatten(flat), batch)
    return outputs.logits, method.predict(outputs), noted.of(outputs)

  logits, predictions, found = jax.device_get(jax.jit(run)(recording.begin, recording.batch))
  return logits.transpose(0, 3, 1, 2), predictions, _as_recorded(found, recording)


def trained_paths(recording: Recording) -> list[str]:
  """What trains in the last phase, by path."""
  config = recording.config
  return phases.trainable_paths(config, methods.of(config), recording.begin, phase=2)


def compiled(recording: Recording) -> Callable[[Flat], Trained]:
  """All numbers of the model -> what training mode makes of the recorded batch; compiled once."""
  method = methods.of(recording.config)
  paths = trained_paths(recording)
  key = jax.random.key(0)  # nothing is drawn

  def loss_of(trained, flat, batch):
    with _Noting() as noted:
      outputs, statistics = method.apply(unflatten({**flat, **trained}), batch, key)
    total, terms = method.loss(outputs, batch, method.totals(batch), key)
    found = noted.of(outputs)
    return total, (outputs.logits, found, terms, flatten_statistics(statistics))

  run = jax.jit(jax.value_and_grad(loss_of, has_aux=True))

  def train(flat):
    trained = {path: flat[path] for path in paths}
    (total, aux), gradient = jax.device_get(run(trained, flat, recording.batch))
    logits, found, terms, statistics = aux
    found = _as_recorded(found, recording)
    return Trained(logits.transpose(0, 3, 1, 2), found, total, terms, statistics, gradient)

  return train


class _Noting:
  """Notes what the modules of interest return while it is entered, by name."""

  _OF_INTEREST = re.compile(
    r'channels\d|level\d|path[123]|audio_projection|generator|encoder|decoder|mixer|query_mlp2'
  )

  def __enter__(self) -> '_Noting':
    self._found = {}
    self._context = nn.intercept_methods(self._note)
    self._context.__enter__()
    return self

  def __exit__(self, *error):
    self._context.__exit__(*error)

  def _note(self, call, arguments, options, context):
    result = call(*arguments, **options)
    module = context.module
    if isinstance(module, (PVTv2, ResNet)):
      self._found |= {f'backbone/{i}': x for i, x in enumerate(result)}
    elif len(module.path) == 1 and self._OF_INTEREST.fullmatch(module.name):
      self._found[module.name] = result
    return result

  def of(self, outputs) -> dict[str, jax.Array]:
    """All of it, named as recorded."""
    found = {}
    for name, value in self._found.items():
      kind, number = re.fullmatch(r'(\D+?)(\d?)', name).groups()
      if name.startswith('backbone'):
        found[name] = value
      elif kind == 'level':
        found[f'tpavi/{number}'], found[f'audio/{number}'] = value
      elif kind == 'encoder':
        found['encoder/last'] = value[0]
      else:
        names = {'channels': f'conv/{number}', 'path': f'path/{number}', 'decoder': 'decoder/last'}
        names |= {'audio_projection': 'audio', 'generator': 'generated_queries'}
        names |= {'mixer': 'mixer_gate', 'query_mlp': 'query_features'}
        found[names[kind]] = value
    if hasattr(outputs, 'mask_features'):
      found['mask_features'] = outputs.mask_features
    return found


def _as_recorded(found: dict, recording: Recording) -> dict[str, np.ndarray]:
  """Intermediates in the layout of the recording, some of every few frames alone."""
  sizes, result = recording.sizes, {}
  for name, value in found.items():
    if value.ndim == 4:
      value = value.transpose(0, 3, 1, 2)
    if name.startswith('audio/'):
      value = value.reshape(-1, 5, value.shape[-1])
    if name.startswith(('generated', 'encoder', 'decoder', 'mask', 'query')):
      value = value[:: sizes['keep']]
    if name.endswith('/last'):
      name = name.replace('last', str(sizes[f'{name[:7]}_layers'] - 1))
    result[name] = value
  return result


def take_steps(recording: Recording, train: Callable[[Flat], Trained], frozen: int = 0) -> Steps:
  """Three optimiser steps of the recipe, the first `frozen` of them in phase 1 of two."""
  config = recording.config.copy_and_resolve_references()
  config.train.phase2_epoch = frozen
  method = methods.of(config)
  flat, totals, after, state = recording.begin, [], [], None
  for step in range(3):
    if step in (0, frozen):
      phase = 1 if step < frozen else 2
      paths = phases.trainable_paths(config, method, recording.begin, phase)
      optimizer, _ = phases.optimizer_of(config, method, phase, 1)
      update = jax.jit(optimizer.update)
      fresh = optimizer.init({path: flat[path] for path in paths})
      state = taken_over(fresh, state) if step else fresh
    result = train(flat)
    trained = {path: flat[path] for path in paths}
    gradient = {path: result.gradient[path] for path in paths}
    updates, state = update(gradient, state, trained)
    trained = jax.device_get(optax.apply_updates(trained, updates))
    flat = {**flat, **trained, **result.statistics}
    totals.append(float(result.total))
    after.append(flat)
  return Steps(totals, after)


def evaluation_errors(recording: Recording) -> Errors:
  """Of intermediates, logits and map in evaluation mode."""
  arrays = recording.arrays
  logits, predictions, found = evaluate(recording)
  recorded = arrays.under('eval/')
  whole = recorded.pop('logits')
  # Layers before the last one are inside a loop, whose last result tells of them.
  inside = {name for name in recorded if re.match('(en|de)coder/', name)} - found.keys()
  recorded = {name: value for name, value in recorded.items() if name not in inside}
  if predictions.ndim == 4:
    predictions = predictions.argmax(1)
  return {
    'intermediates': _compare_recorded(found, recorded),
    'logits': compare({'eval/logits': logits}, {'eval/logits': whole}, of_largest),
    'map': compare({'map': predictions}, {'map': arrays['post/map']}, share_unequal),
  }


def _compare_recorded(found: Mapping, recorded: Mapping) -> dict[str, float]:
  """Errors of what was recorded: a recording may hold some tensors or layers alone."""
  return compare({n: found[n] for n in recorded if n in found}, recorded, of_largest)


def training_errors(recording: Recording, result: Trained) -> Errors:
  """Of everything that was recorded in training mode at the start."""
  arrays = recording.arrays
  inner = {n: v for n, v in arrays.under('train/').items() if re.match('backbone|tpavi', n)}
  terms = {_TERMS[name]: value for name, value in result.terms.items()}
  errors = {
    'logits': compare(
      {'train/logits': result.logits[..., ::2, ::2]},
      {'train/logits': arrays['train/logits']},
      of_largest,
    ),
    'loss': {'total': of_largest(result.total, arrays.number('loss/total'))},
    'loss terms': {n: of_largest(v, arrays.number(f'loss/{n}')) for n, v in terms.items()},
    'gradients': _compare_recorded(
      result.gradient, _with_gradient(recording.ours(result.gradient, 'grad/'))
    ),
  }
  if inner:
    errors['intermediates'] = _compare_recorded(result.intermediates, inner)
  if result.statistics:
    moved = {p: v for p, v in result.statistics.items() if not p.endswith('/count')}
    errors['running statistics'] = compare(
      moved, recording.ours(moved, 'train/buffers/'), of_largest
    )
  return errors


def step_errors(recording: Recording, taken: Steps, gradient: Mapping[str, np.ndarray]) -> Errors:
  """Of three losses, of the change by two steps, and of the statistics after them."""
  after = taken.flat[1]
  found, recorded = _changes(recording, after, 'change/')
  errors = _loss_and_far(recording, taken, 'step/', found, recorded)
  for path, value in found.items():  # where there is none, what was recorded counts as right
    slope = np.abs(gradient[path])
    found[path] = np.where(slope > WITH_GRADIENT * slope.max(), value, recorded[path])
  errors['changes, with a gradient'] = compare(found, recorded, of_largest)
  # Those that changed were recorded; the spare branch keeps its own.
  moved = {
    p: v for p, v in after.items() if not is_parameter(p) and np.any(v != recording.begin[p])
  }
  if moved:
    errors['running statistics'] = compare(
      moved, recording.ours(moved, 'buffers_after/'), of_largest
    )
  return errors


def frozen_errors(recording: Recording, taken: Steps) -> Errors:
  """Of three steps of which the first leaves the backbone as it is."""
  found, recorded = _changes(recording, taken.flat[2], 'frozen/change/')
  return _loss_and_far(recording, taken, 'frozen/step/', found, recorded)


def _with_gradient(flat: Mapping) -> dict:
  return {path: value for path, value in flat.items() if not re.search(_NO_GRADIENT, path)}


def _changes(recording: Recording, flat: Flat, prefix: str) -> tuple[dict, dict]:
  """Changes of what trains in learning rates, and those recorded, of some tensors or all."""
  paths = trained_paths(recording)
  recorded = _with_gradient(recording.ours(dict.fromkeys(paths), prefix))
  lr = recording.sizes['lr']
  found = {p: (flat[p] - recording.begin[p]) / lr for p in paths if p in recorded}
  return found, recorded


def _loss_and_far(recording: Recording, taken: Steps, prefix: str, found, recorded) -> Errors:
  """Errors of the losses before each step, and the share of elements whose change is off."""
  keys = [f'{prefix}{i}/total' for i in range(len(taken.totals))]
  losses = {
    key: of_largest(total, recording.arrays.number(key)) for key, total in zip(keys, taken.totals)
  }
  far = [
    np.abs(found[path] - v) > OFF * np.abs(v).max()
    if path in found and found[path].shape == v.shape
    else np.ones(v.shape, bool)
    for path, v in recorded.items()
  ]
  share = sum(map(np.count_nonzero, far)) / max(sum(map(np.size, far)), 1)
  return {'losses of the steps': losses, 'changes, elements that are off': {prefix: share}}


def metric_errors(recording: Recording) -> dict[str, float]:
  """Of the metrics of the recorded logits."""
  arrays, batch = recording.arrays, recording.batch
  logits, labels = arrays['eval/logits'], batch['labels']
  if recording.sizes['task'] == 'avss':
    record = metrics.semantic_record(
      logits.argmax(1).astype(np.uint8), labels, recording.config.num_classes
    )
    found = dict(zip(('iou_sum', 'f_sum', 'count'), record['frames']))
  else:
    scores = np.concatenate([np.zeros_like(logits), logits / 2], 1)
    found = dict(zip(('miou', 'fscore'), metrics.binary_record(scores, labels > 0)['scores']))
  return compare(found, arrays.under('metric/'), of_largest)


def bfloat16_row(recording: Recording) -> Row:
  """How many pixels of the map a model of bfloat16 gives otherwise."""
  _, predictions, _ = evaluate(recording, 'bfloat16')
  if predictions.ndim == 4:
    predictions = predictions.argmax(1)
  share = share_unequal(predictions, recording.arrays['post/map'])
  return Row('map', 'share of the pixels', share, BFLOAT16_TOLERANCE, f'{1 - share:.2%} agree')


def all_errors(recording: Recording) -> Errors:
  """Of everything in float32; of the steps with the backbone frozen at first as 'frozen: ...'."""
  with jax.default_matmul_precision('highest'):
    train = compiled(recording)
    result, taken = train(recording.begin), take_steps(recording, train)
    errors = {}
    for part in (
      evaluation_errors(recording),
      training_errors(recording, result),
      step_errors(recording, taken, result.gradient),
      {'metrics of the release': metric_errors(recording)},
    ):
      for quantity, found in part.items():
        errors[quantity] = errors.get(quantity, {}) | found
    if recording.arrays.under('frozen/'):
      frozen = frozen_errors(recording, take_steps(recording, train, frozen=1))
      errors |= {f'frozen: {quantity}': found for quantity, found in frozen.items()}
  return errors


def compare_maps(recording: Recording) -> Iterator[Table]:
  """A table for float32, and one for bfloat16, of a recorded model."""
  name = recording.arrays.path.name
  rows = []
  for quantity, found in all_errors(recording).items():
    prefix = 'frozen: ' * quantity.startswith('frozen: ')
    rows.append(worst(quantity.removeprefix(prefix), found, prefix))
  yield Table(f'{name}, float32', rows)
  yield Table(f'{name}, bfloat16', [bfloat16_row(recording)])


def compare_metrics(arrays: Arrays) -> Iterator[Table]:
  """A table for the metrics of recorded predictions, as the releases compute them."""
  with legible(arrays.path):
    found, clips, records = {}, [], []
    for key in dict.fromkeys(key.rpartition('/')[0] for key in arrays if key.count('/') == 2):
      if key.startswith('binary/'):
        logits = arrays[f'{key}/logits'].reshape(-1, 5, 1, *arrays[f'{key}/truth'].shape[1:])
        truth = arrays[f'{key}/truth'].reshape(logits.shape) > 0
        own = [
          metrics.binary_record(np.concatenate([clip * 0, clip / 2], 1), target[:, 0])
          for clip, target in zip(logits, truth)
        ]
        scores = protocols.as_released([], np.stack(own), len(own))
        found |= {f'{key}/{name}': value for name, value in scores.items()}
      elif key.startswith('semantic/'):
        classes, sums = len(arrays[f'{key}/count']), 0.0
        shape = (-1, 10, *arrays[f'{key}/truth'].shape[1:])
        parts = (arrays[f'{key}/{name}'].reshape(shape) for name in ('prediction', 'truth'))
        for flags, prediction, target in zip(arrays[f'{key}/video_flag'].reshape(-1, 10), *parts):
          real = int(flags.sum())  # the first ones of the clip
          clips.append(SemanticClip('', str(len(clips)), 'v2' if real > 5 else 'v1s', 'test', real))
          records.append(metrics.semantic_record(prediction[:real], target[:real], classes))
          sums = sums + protocols.padded(clips[-1:], records[-1]['frames'])
        found |= {f'{key}/{n}': v for n, v in zip(('iou_sum', 'f_sum', 'count'), sums)}
    scores = protocols.as_released(clips, np.stack(records), 1)
    found |= {f'semantic/{name}': value for name, value in scores.items()}
  inputs = ('logits', 'truth', 'prediction', 'video_flag', 'frame', 'label')
  ours = re.compile(r'(binary|semantic)/')
  wanted = {k: v for k, v in arrays.items() if ours.match(k) and not k.endswith(inputs)}
  errors = compare(found, wanted, of_largest)
  yield Table(f'{arrays.path.name}, on the host', [worst('metrics of the release', errors)])

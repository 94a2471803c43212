"""Does this device compute what the authors' PyTorch code computed? Recorded runs, run again."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aavs_jax import methods
from aavs_jax.console import say
from aavs_jax.input_pipeline import audio
from aavs_jax.input_pipeline.avsbench import SemanticClip
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.methods import set_loss
from aavs_jax.methods.aavs import class_scores
from aavs_jax.methods.set_loss import PointDraws
from aavs_jax.models.aavs import AAVS
from aavs_jax.models.mask_decoder import Outputs
from aavs_jax.models.vggish import VGGish
from aavs_jax.pytorch import maps_recordings, recordings
from aavs_jax.pytorch.names import from_released_layout, released_name, released_to_params
from aavs_jax.pytorch.recordings import CONFIGS, Arrays, Flat, Recording, draws, legible
from aavs_jax.pytorch.verdicts import (
  Errors,
  Row,
  Table,
  compare,
  format_table,
  largest_difference,
  mean_difference,
  of_largest,
  of_largest_change,
  share_unequal,
  worst,
)
from aavs_jax.scoring import metrics, protocols
from aavs_jax.training.optimizer import make_optimizer
from aavs_jax.training.phases import flat_of_phase, trainable_paths
from aavs_jax.training.state import flatten, unflatten
from aavs_jax.types import Variables

LOSS = CONFIGS[1].loss  # of both stages
GOLDENS = Path(__file__).parents[2] / 'tests' / 'goldens'
DEFAULT_FILES = ('stage1.npz', 'stage2.npz', 'audio.npz', 'metrics.npz')
OTHER_METHODS = (
  'methods/tpavi_s4.npz', 'methods/tpavi_avss.npz', 'methods/avsegformer_s4.npz',
  'methods/other_data.npz',
)  # fmt: skip
SAMPLINGS = ('gather', 'dense')
# One compiled gradient a stage: each sampling's is compared in one of them, the rest in both.
GRADIENT_SAMPLING = {1: 'gather', 2: 'dense'}
# The release always takes masks to 384x384 and scores to 224x224, whatever the size of the images.
IMAGE_SIZE, EVAL_SIZE = 384, 224
INTERMEDIATE_MODULES = ('backbone', 'pixel_decoder', 'audio_projection')
TERMS = {'class': 'cross_entropy', 'mask': 'mask', 'dice': 'dice'}  # our name: recorded name

# bfloat16 has 8 bits, so only maps can be asked to agree: the sign of the mask logits, in or out of
# each query's mask, and the final map. Shares of the pixels that differ on the project's recordings
# (stage 1; 2), on the CPU; the rest is what must be told from it:
#                                     signs                 map
#   as it is                          0.7 %; 0.7 %          3.4 %; 6.4 %
#   parameters rounded to 8 bits too  1.0 %; 0.8 %          9.1 %; 4.8 %
#   parameters of 5 bits              3.2 %; 3.1 %          17 %; 37 %
#   parameters of 4 bits              6.7 %; 4.8 %          18 %; 63 %
#   without bias tables               6.8 %; 4.9 %          17 %; 67 %
#   without offsets                   12 %; 8.6 %           43 %; 58 %
#   without adapters                  36 %; 15 %            44 %; 88 %
SIGNS_TOLERANCE = 0.02
MAP_TOLERANCE = 0.12


class Predictions(NamedTuple):
  """What the model makes of the recorded inputs, as numpy arrays."""

  outputs: Outputs
  intermediates: dict[str, np.ndarray]  # named as in the recording, in its layout


class Evaluation(NamedTuple):
  """Predictions and their loss with recorded draws, as numpy arrays."""

  predictions: Predictions
  total: np.ndarray
  terms: dict[str, np.ndarray]
  gradient: dict[str, np.ndarray] | None  # by flat path, of what trains in phase 2


class Steps(NamedTuple):
  """The recorded optimiser steps of one phase, taken again."""

  totals: list[float]
  norms: list[float]  # of the gradients, before clipping
  queries: list[np.ndarray]  # int [s, n, k]
  params: Flat


def selftest(files: Sequence[str | Path] = ()) -> bool:
  """Compares this device with recorded runs and says how it went, in tables.

  Args:
    files: recordings (format: tests/goldens/README.md); without any, those of the project.

  Returns:
    Whether everything that is judged is within its tolerance.

  Raises:
    UserError: a file cannot be read, or is no recording.
  """
  if not files:
    if not GOLDENS.is_dir():
      raise UserError(
        f'{GOLDENS} is not there, as after an installation without the tests: name recordings, as '
        '`aavs selftest stage1.npz`, or install a checkout of the project with pip install -e'
      )
    files = [GOLDENS / name for name in (*DEFAULT_FILES, *OTHER_METHODS)]
  comparisons = [recognise(recordings.read(path)) for path in files]
  device = jax.devices()[0]
  say(
    f'jax {jax.__version__} on {device.device_kind} ({device.platform}), 1 of {jax.device_count()}'
  )
  say("float32 is compared with matmul precision 'highest' (TPUs, and GPUs with TF32, take less by")
  say('default), bfloat16 with the default.')
  missed = judged = 0
  for comparison in comparisons:
    for table in comparison():
      say(f'\n{format_table(table)}')
      judged += sum(row.tolerance is not None for row in table.rows)
      missed += sum(not row.passes for row in table.rows)
  if not judged:
    raise UserError(f'{files[0]} holds nothing to compare with: name a whole recording')
  say(f'\n{judged - missed} of {judged} quantities are within tolerance')
  return not missed


def recognise(arrays: Arrays) -> Callable[[], Iterator[Table]]:
  """The comparison that the arrays of a file are for. UserError if they are for none."""
  if 'in/frames' in arrays:
    return functools.partial(maps_recordings.compare_maps, maps_recordings.recording_of(arrays))
  if 'binary/0/logits' in arrays:
    return functools.partial(maps_recordings.compare_metrics, arrays)
  if 'config' in arrays:
    return functools.partial(compare_model, recordings.recording_of(arrays))
  if 'vggish/parameter_order' in arrays:
    return functools.partial(compare_audio, arrays)
  if arrays.under('binary/') or arrays.under('semantic/'):
    return functools.partial(compare_metrics, arrays)
  raise UserError(
    f'{arrays.path} is no recording (it holds {", ".join(list(arrays)[:3]) or "nothing"}): name '
    'one in the format of tests/goldens/README.md'
  )


def compare_model(recording: Recording) -> Iterator[Table]:
  """A table for float32, and one for bfloat16, of a recorded model."""
  name = f'{recording.arrays.path.name}, stage {recording.stage}'
  begin = recordings.start(recording)
  errors: Errors = {}
  for sampling in SAMPLINGS:
    result = at_start(recording, begin, sampling)
    both = prediction_errors(recording, result.predictions) | loss_errors(recording, result)
    for quantity, found in both.items():
      named = {f'{name}, {sampling}': error for name, error in found.items()}
      errors[quantity] = errors.get(quantity, {}) | named
    if result.gradient is not None:
      errors['gradients'] = gradient_errors(recording, result.gradient)
      errors |= map_errors(recording, result.predictions.outputs)
  rows = [worst(quantity, found) for quantity, found in errors.items()]
  for phase in (1, 2):
    errors = step_errors(recording, begin, phase, take_steps(recording, begin, phase))
    rows += [worst(quantity, found, f'phase {phase}: ') for quantity, found in errors.items()]
  sampling = GRADIENT_SAMPLING[recording.stage]
  yield Table(f'{name}, float32; gradients and steps with sampling {sampling}', rows)

  predictions = in_bfloat16(recording, begin)
  rows = [
    worst(quantity, found)._replace(tolerance=None)
    for quantity, found in prediction_errors(recording, predictions).items()
  ]
  rows += bfloat16_rows(recording, predictions.outputs)
  yield Table(f'{name}, bfloat16 with sampling dense', rows)


def _predict(model: AAVS, params: Flat, inputs) -> Predictions:
  outputs, captured = model.apply(
    {'params': unflatten(params).params['aavs']},
    *inputs,
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
  return Predictions(outputs, intermediates)


@functools.cache  # models of the same sizes are compiled once
def _compiled_predict(model: AAVS):
  return jax.jit(functools.partial(_predict, model))


@functools.cache
def _compiled_evaluate(model: AAVS, trained: tuple[str, ...]):
  """(params, inputs, targets, points) -> Evaluation, with the gradient of `trained` if any."""

  def loss_of(params, inputs, targets, points):
    predictions = _predict(model, params, inputs)
    total, terms = set_loss.loss(
      predictions.outputs,
      targets,
      lambda index: jax.tree.map(lambda leaf: leaf[index], points),
      set_loss.totals(targets, model.num_queries, LOSS),
      LOSS,
      model.sampling,
    )
    return total, (predictions, terms)

  def run(params, *arguments):
    if not trained:
      total, (predictions, terms) = loss_of(params, *arguments)
      return Evaluation(predictions, total, terms, None)
    (total, (predictions, terms)), gradient = jax.value_and_grad(
      lambda some: loss_of({**params, **some}, *arguments), has_aux=True
    )({path: params[path] for path in trained})
    return Evaluation(predictions, total, terms, gradient)

  return jax.jit(run)


def evaluate(recording: Recording, params: Flat, points: PointDraws, sampling: str) -> Evaluation:
  """Predictions and loss in float32, with the stage's GRADIENT_SAMPLING also the gradient."""
  trained = ()
  if sampling == GRADIENT_SAMPLING[recording.stage]:
    trained = tuple(trained_in(recording, params, 2))
  run = _compiled_evaluate(recordings.model(recording, sampling), trained)
  with jax.default_matmul_precision('highest'):
    return jax.device_get(
      run(params, recordings.inputs(recording), recordings.targets(recording), points)
    )


def trained_in(recording: Recording, params: Flat, phase: int) -> list[str]:
  """Paths that train in a phase of the recorded recipe."""
  config = CONFIGS[recording.stage]
  return trainable_paths(config, methods.of(config), params, phase)


def at_start(recording: Recording, begin: Flat, sampling: str) -> Evaluation:
  """The evaluation that 'out', 'loss', 'grad' and 'post' of the recording describe."""
  return evaluate(recording, begin, draws(recording, 'loss')[0], sampling)


def in_bfloat16(recording: Recording, begin: Flat) -> Predictions:
  """What the bfloat16 model predicts; its loss, float32 throughout, would tell nothing more."""
  run = _compiled_predict(recordings.model(recording, 'dense', jnp.bfloat16))
  return jax.device_get(run(begin, recordings.inputs(recording)))


@functools.cache
def _optimizer(stage: int, phase: int):
  """Compiled: what trains -> AdamW's state; gradient, state, what trains -> both next, the norm."""
  config = CONFIGS[stage].optimizer
  optimizer, _ = make_optimizer(config, config.lr if phase == 1 else config.lr_phase2, 1)

  def update(gradient, state, trained):
    updates, state = optimizer.update(gradient, state, trained)
    return optax.apply_updates(trained, updates), state, optax.global_norm(gradient)

  return jax.jit(optimizer.init), jax.jit(update)


def take_steps(recording: Recording, begin: Flat, phase: int) -> Steps:
  """The steps of a phase, with its recorded draws; both phases begin at the recording's start."""
  config = CONFIGS[recording.stage]
  params = flat_of_phase(config, methods.of(config), 1, begin, None) if phase == 1 else begin
  init, update = _optimizer(recording.stage, phase)
  names = trained_in(recording, params, phase)
  trained = {path: params[path] for path in names}
  state = init(trained)
  totals, norms, queries = [], [], []
  for step in range(recordings.steps(recording, phase)):
    points, _ = draws(recording, f'phase{phase}/{step}')
    result = evaluate(recording, params, points, GRADIENT_SAMPLING[recording.stage])
    gradient = {path: result.gradient[path] for path in names}
    trained, state, norm = update(gradient, state, trained)
    params = {**params, **trained}
    totals.append(float(result.total))
    norms.append(float(norm))
    queries.append(result.terms['query'])
  return Steps(totals, norms, queries, params)


def prediction_errors(recording: Recording, predictions: Predictions) -> Errors:
  """Errors of intermediates and of all prediction sets."""
  recorded = recording.arrays.under('out/')
  sets = {
    f'{kind}/{i}': value
    for kind in ('mask_logits', 'class_logits')
    for i, value in enumerate(getattr(predictions.outputs, kind))
  }
  inner = {name: value for name, value in recorded.items() if 'logits' not in name}
  outer = {name: value for name, value in recorded.items() if name not in inner}
  return {
    'intermediates': compare(predictions.intermediates, inner, of_largest),
    'prediction sets': compare(sets, outer, of_largest),
  }


def loss_errors(recording: Recording, result: Evaluation) -> Errors:
  """Errors of the loss at the start, and of the matching in it."""
  arrays = recording.arrays
  errors = {
    'matching': {'loss': _unmatched(recording, 'loss', result.terms['query'])},
    'loss': {'total': of_largest(result.total, arrays.number('loss/total'))},
  }
  weighted = arrays.under('loss/weighted/loss_')
  if weighted:  # stage 1 was recorded without them
    terms = {
      kind if name == 'final' else f'{kind}_{name}': result.terms[ours][i]
      for ours, kind in TERMS.items()
      for i, name in enumerate(recordings.set_names(recording))
    }
    recorded = {name: np.squeeze(value) for name, value in weighted.items()}
    errors['loss terms'] = compare(terms, recorded, of_largest)
  return errors


def gradient_errors(recording: Recording, gradient: Mapping[str, np.ndarray]) -> dict[str, float]:
  """Errors of the gradient at the start, by flat path."""
  return compare(gradient, _in_our_layout(gradient, recording.arrays.under('grad/')), of_largest)


def map_errors(recording: Recording, outputs: Outputs) -> Errors:
  """Of the scores (stage 1, recorded in float16) or of the map (stage 2) at 224x224."""
  scores = final_scores(outputs.mask_logits[-1], outputs.class_logits[-1])
  if recording.stage == 1:
    recorded = recording.arrays['post/binary_scores_224']
    return {'scores': compare({'scores': scores}, {'scores': recorded}, largest_difference)}
  recorded = recording.arrays['post/semantic_map_224']
  return {'map': compare({'map': scores.argmax(1)}, {'map': recorded}, share_unequal)}


_class_scores = jax.jit(class_scores, static_argnums=(2, 3))


def final_scores(masks: np.ndarray, classes: np.ndarray) -> np.ndarray:
  """Post-processed scores float32 [n, c, 224, 224] of the logits of the final prediction set."""
  with jax.default_matmul_precision('highest'):
    return np.asarray(_class_scores(masks, classes, IMAGE_SIZE, EVAL_SIZE))


def step_errors(recording: Recording, begin: Flat, phase: int, taken: Steps) -> Errors:
  """Errors of a phase's optimiser steps."""
  arrays = recording.arrays

  def column(name, values):
    keys = (f'phase{phase}/{step}/{name}' for step in range(len(values)))
    return {key: of_largest(value, arrays.number(key)) for key, value in zip(keys, values)}

  errors = {
    'matching': {
      key: _unmatched(recording, key, query)
      for step, query in enumerate(taken.queries)
      for key in [f'phase{phase}/{step}']
    },
    'totals of the steps': column('total', taken.totals),
  }
  if f'phase{phase}/0/grad_norm' in arrays:  # stage 2, which does not clip, was recorded without
    errors['gradient norms of the steps'] = column('grad_norm', taken.norms)

  def change(params):
    return {path: np.asarray(params[path]) - np.asarray(begin[path]) for path in params}

  found = change({path: taken.params[path] for path in trained_in(recording, begin, phase)})
  wanted = _in_our_layout(found, arrays.under(f'phase{phase}/param_after/'))
  wanted = {
    path: value - np.asarray(begin[path]) if value.shape == begin[path].shape else value
    for path, value in wanted.items()
  }
  errors['parameters after the steps'] = compare(found, wanted, of_largest_change)
  return errors


def bfloat16_rows(recording: Recording, outputs: Outputs) -> list[Row]:
  """How far scores, masks and map of a bfloat16 model are from the recorded logits'."""
  arrays, sets = recording.arrays, range(len(outputs.class_logits))
  masks = np.stack([arrays[f'out/mask_logits/{i}'] for i in sets])
  classes = np.stack([arrays[f'out/class_logits/{i}'] for i in sets])
  wanted = final_scores(masks[-1], classes[-1])
  found = final_scores(outputs.mask_logits[-1], outputs.class_logits[-1])
  signs = ((outputs.mask_logits > 0) == (masks > 0)) & np.isfinite(outputs.mask_logits)
  same = found.argmax(1) == wanted.argmax(1)
  rows = [Row('scores', 'of the largest value', of_largest(found, wanted), None, '')]
  for quantity, agree, tolerance in (
    ('masks of the queries', signs, SIGNS_TOLERANCE),
    ('map', same, MAP_TOLERANCE),
  ):
    share = float(np.mean(agree))
    rows.append(Row(quantity, 'share of the pixels', 1 - share, tolerance, f'{share:.2%} agree'))
  return rows


def compare_audio(arrays: Arrays) -> Iterator[Table]:
  """A table for log-mel examples, and VGGish's embeddings of the recorded ones."""
  errors: Errors = {}
  embed = _vggish(arrays)
  for name in dict.fromkeys(key.split('/')[0] for key in arrays if key.endswith('/pcm')):
    log_mel, rate = arrays.numbers(f'{name}/log_mel', None, 96, 64), int(arrays[f'{name}/rate'])
    pcm = arrays[f'{name}/pcm'].astype(np.float32) / 32768
    waveform = audio.resample(pcm.reshape(len(pcm), -1).mean(axis=1), rate)
    found = audio.log_mel_examples(waveform)[: len(log_mel)]
    resampled = rate != audio.SAMPLE_RATE
    # The release resamples with another library's low-pass filter, so only the mean is compared.
    quantity = 'log-mel, resampled' if resampled else 'log-mel at 16 kHz'
    error = mean_difference if resampled else largest_difference
    errors.setdefault(quantity, {}).update(compare({name: found}, {name: log_mel}, error))
    if f'{name}/embedding' in arrays:
      errors.setdefault('VGGish embedding', {}).update(
        compare({name: embed(log_mel)}, {name: arrays[f'{name}/embedding']}, of_largest)
      )
  yield Table(f'{arrays.path.name}, float32', [worst(*pair) for pair in errors.items()])


def _vggish(arrays: Arrays) -> Callable[[np.ndarray], np.ndarray]:
  """VGGish with the recording's random weights: log-mel examples to embeddings."""
  random = np.random.RandomState(1234)
  weights = {}
  with legible(arrays.path):
    for entry in arrays['vggish/parameter_order']:
      name, shape = str(entry).split(':')
      shape = tuple(map(int, shape.split('x')))
      scale = np.sqrt(2 / np.prod(shape[1:])) if name.endswith('weight') else 0.05
      weights[name] = (random.standard_normal(shape) * scale).astype(np.float32)
    widths = [len(value) for name, value in weights.items() if name.endswith('weight')]
    network = VGGish(tuple(widths[:6]), tuple(widths[6:-1]), widths[-1], final_relu=False)
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), jnp.zeros((1, 96, 64))))[
      'params'
    ]
    params = released_to_params(
      weights, flatten(Variables({'vggish': shapes}, {})), what=str(arrays.path)
    )

  apply = jax.jit(network.apply)

  def embed(log_mel):
    with jax.default_matmul_precision('highest'):
      return np.asarray(apply({'params': unflatten(params).params['vggish']}, log_mel))

  return embed


def compare_metrics(arrays: Arrays) -> Iterator[Table]:
  """A table for the metrics of recorded predictions, per clip and over the clips."""
  found, records = {}, {'binary': [], 'semantic': []}
  with legible(arrays.path):
    for clip in dict.fromkeys(key.rpartition('/')[0] for key in arrays if key.count('/') == 2):
      task, target = clip.split('/')[0], arrays[f'{clip}/target']
      if task == 'binary':
        record = metrics.binary_record(arrays[f'{clip}/scores'], target.astype(bool))
        values = zip(('miou', 'fscore'), record['scores'])
      else:
        record = metrics.semantic_record(
          arrays[f'{clip}/pred'], target, len(arrays[f'{clip}/count'])
        )
        values = zip(('iou_sum', 'f_sum', 'count'), record['frames'])
      found |= {f'{clip}/{name}': value for name, value in values}
      records[task].append(record)
    for task, own in records.items():
      if own:
        clips = [SemanticClip('', str(i), 'v1s', 'test', 5) for i in range(len(own))]
        overall = protocols.summarise(clips, np.stack(own))['overall']
        prefix = 'binary/dataset_' if task == 'binary' else 'semantic/'
        found |= {prefix + name: overall[name] for name in overall if prefix + name in arrays}
  inputs = ('scores', 'pred', 'target')
  wanted = {key: value for key, value in arrays.items() if not key.endswith(inputs)}
  if errors := compare(found, wanted, largest_difference):
    yield Table(f'{arrays.path.name}, on the host', [worst('metrics', errors)])


def _unmatched(recording: Recording, prefix: str, query: np.ndarray) -> float:
  """Share of the targets whose query is not the recorded one."""
  wanted = draws(recording, prefix)[1]
  return share_unequal(query[wanted >= 0], wanted[wanted >= 0])


def _in_our_layout(
  ours: Mapping[str, np.ndarray], released: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """Recorded values by flat path, in our layout; by released name what `ours` does not have."""
  paths = {released_name(path): path for path in ours}
  return {
    paths.get(name, name): from_released_layout(paths.get(name, name), value)
    for name, value in released.items()
  }

"""The selftest: passes on the project's recordings, and names what a changed one has otherwise."""

import json

import jax
import numpy as np
import pytest

from aavs_jax import cli
from aavs_jax.pytorch import recordings, selftest
from aavs_jax.pytorch.names import released_name, to_released_layout
from aavs_jax.training.state import flatten
from tests import parity

STAGE1, STAGE2, AUDIO, METRICS = (str(selftest.GOLDENS / name) for name in selftest.DEFAULT_FILES)


def write(tmp_path, arrays):
  path = tmp_path / 'changed.npz'
  np.savez(path, **arrays)
  return str(path)


def copy(path):
  """The arrays of a recording, to be changed."""
  return {key: value.copy() for key, value in recordings.read(path).items()}


def verdicts(output):
  """(quantity, verdict, rest of the line) of every row that is judged."""
  rows = []
  for line in output.splitlines():
    for verdict in ('ok', 'MISS'):
      before, found, after = line.partition(f'  {verdict}  ')
      if found:
        rows.append((before.strip().split('  ')[0], verdict, after))
  return rows


def test_passes_on_the_recordings(capsys):
  assert cli.main(['selftest', STAGE2, METRICS]) == 0
  output = capsys.readouterr().out
  for part in (jax.__version__, jax.devices()[0].device_kind, "'highest'"):
    assert part in output
  rows = verdicts(output)
  assert {verdict for _, verdict, _ in rows} == {'ok'}
  assert [quantity for quantity, _, _ in rows] == [
    'intermediates', 'prediction sets', 'matching', 'loss', 'loss terms', 'gradients', 'map',
    'phase 1: matching', 'phase 1: totals of the steps', 'phase 1: parameters after the steps',
    'phase 2: matching', 'phase 2: totals of the steps', 'phase 2: parameters after the steps',
    'masks of the queries', 'map', 'metrics',
  ]  # fmt: skip
  assert '16 of 16' in output.splitlines()[-1]


@pytest.mark.slow
def test_passes_on_all_recordings_by_default(capsys):
  assert cli.main(['selftest']) == 0
  assert '74 of 74' in capsys.readouterr().out.splitlines()[-1]


def test_names_what_differs(capsys, tmp_path):
  arrays = copy(STAGE2)
  names = list(recordings.read(STAGE2).under('grad/'))
  logits, after = arrays['out/mask_logits/2'], arrays[f'phase2/param_after/{names[1]}']
  arrays['out/audio_embeddings'][0, 0] = np.nan
  logits[1, 2, 3, 4] += 1e-3 * np.abs(logits).max()
  arrays['loss/weighted/loss_dice_1'] *= 1.001
  arrays[f'grad/{names[0]}'] *= -1
  arrays['post/semantic_map_224'][0, 0] = 1
  arrays['phase1/1/match/0/query'] = arrays['phase1/1/match/0/query'][::-1]
  arrays['phase2/2/total'] *= 1.01
  after.flat[::50] += 1e-4
  assert cli.main(['selftest', write(tmp_path, arrays)]) == 1
  output = capsys.readouterr().out
  found = {quantity: rest for quantity, verdict, rest in verdicts(output) if verdict == 'MISS'}
  paths = {released_name(path): path for path in parity.begin(2)}
  wanted = {
    'intermediates': 'audio_embeddings',
    'prediction sets': 'mask_logits/2',
    'loss terms': 'dice_1',
    'gradients': paths[names[0]],
    'map': 'map',
    'phase 1: matching': 'phase1/1',
    'phase 2: totals of the steps': 'phase2/2',
    'phase 2: parameters after the steps': paths[names[1]],
  }
  assert found.keys() == wanted.keys()
  assert not [quantity for quantity in wanted if wanted[quantity] not in found[quantity]]
  assert '7 of 15' in output.splitlines()[-1]


def refusal(capsys, *files):
  assert cli.main(['selftest', *map(str, files)]) == 2
  lines = capsys.readouterr().err.strip().splitlines()
  assert len(lines) == 1
  return lines[0]


@pytest.mark.parametrize('fault', ['absent', 'text', 'array', 'cut', 'pickle', 'foreign', 'empty'])
def test_other_files_are_refused(capsys, tmp_path, fault):
  path = tmp_path / 'file.npz'
  if fault == 'text':
    path.write_text('no recording')
  elif fault == 'array':
    with path.open('wb') as file:
      np.save(file, np.zeros(3))
  elif fault == 'cut':
    path.write_bytes(open(STAGE1, 'rb').read()[:500_000])
  elif fault == 'pickle':
    np.savez(path, config=np.array([{}], dtype=object))
  elif fault == 'foreign':
    np.savez(path, weights=np.zeros(3))
  elif fault == 'empty':
    np.savez(path)
  # Before anything is computed, also where another file is sound.
  line = refusal(capsys, STAGE1, path)
  assert f'{path} ' in line and ('(No such file or directory): ' in line) == (fault == 'absent')


def test_a_recording_with_nothing_to_compare_is_refused(capsys, tmp_path):
  np.savez(tmp_path / 'file.npz', **{'binary/scores': np.zeros(3)})
  assert 'nothing to compare' in refusal(capsys, tmp_path / 'file.npz')


@pytest.mark.parametrize(
  ('key', 'change', 'words'),
  [
    ('phase1/0/match/final/query', None, 'lacks phase1/0/match/final/query'),
    ('phase2/1/points/3/matcher', lambda x: x[:, 1:], 'phase2/1/points/3/matcher is float32'),
    ('loss/match/0/target', lambda x: x + 9, 'IndexError'),
    ('in/label_map', lambda x: x[:, :, 1:], 'in/label_map is int64 (3, 96, 95)'),
    ('config', lambda x: x[:-5], 'JSONDecodeError'),
    ('config', lambda x: np.frombuffer(b'{}', np.uint8), "KeyError: 'dh'"),
    ('param/audio_proj.0.weight', None, '1 missing: audio_proj.0.weight'),
    ('param/model.class_predictor.bias', lambda x: x[1:], 'class_predictor.bias (2,), not (3,)'),
  ],
)
def test_damaged_recordings_are_refused(capsys, tmp_path, key, change, words):
  arrays = copy(STAGE1)
  if change:
    arrays[key] = change(arrays[key])
  else:
    del arrays[key]
  line = refusal(capsys, write(tmp_path, arrays))
  assert 'changed.npz' in line and words in line


def test_without_the_recordings_a_file_is_asked_for(capsys, monkeypatch, tmp_path):
  monkeypatch.setattr(selftest, 'GOLDENS', tmp_path / 'goldens')
  assert 'name recordings' in refusal(capsys)


def record(path):
  """Writes what our own model gives at other sizes, of stage 2."""
  sizes = {
    'num_labels': 4, 'win': 2, 'ed': 16, 'depths': [1, 2, 1, 1], 'heads': [1, 2, 2, 4], 'hid': 64,
    'dh': 2, 'encl': 1, 'decl': 3, 'q2': 5, 'npts': 16, 'encff': 16, 'ff': 32,
  }  # fmt: skip
  rows = {  # what tells the sizes that are not in the config
    'aavs/pixel_decoder/layer0/attention/weights/bias': 2 * 3 * 3,  # heads, levels, points
    'aavs/backbone/stage0_block0/fc1/bias': 2 * 16,
    'aavs/audio_projection/down/linear/bias': 12,
  }
  told = {f'param/{released_name(name)}': np.zeros(count) for name, count in rows.items()}
  model = recordings.model(recordings.Recording(told, sizes, 2), 'gather')
  shapes = jax.eval_shape(
    model.init, jax.random.key(0), np.zeros((1, 64, 64, 3)), np.zeros((1, 20)), np.zeros((1, 8, 8))
  )
  config = np.frombuffer(json.dumps(sizes).encode(), np.uint8)
  arrays = recordings.Arrays(path, {'config': config})
  recording = recordings.Recording(arrays, sizes, 2)
  random = np.random.default_rng(77)

  def normal(*shape):
    return random.standard_normal(shape).astype(np.float32)

  for name, leaf in flatten({'aavs': shapes['params']}).items():
    fan_in = max(1, np.prod(leaf.shape[:-1]))
    value = normal(*leaf.shape) / np.float32(np.sqrt(fan_in)) + ('scale' in name)
    arrays[f'param/{released_name(name)}'] = to_released_layout(name, value)
  labels = np.arange(2 * 64 * 64).reshape(2, 64, 64) // 900 % 4
  arrays['in/pixel_values'] = normal(2, 3, 64, 64)
  arrays['in/audio_features'] = normal(2, 20)
  arrays['in/label_map'] = labels
  arrays['in/stage1_mask'] = (labels > 0).astype(np.float32)

  frame, target = np.nonzero(recordings.targets(recording).classes >= 0)
  evaluations = ['loss', *(f'phase{phase}/{step}' for phase in (1, 2) for step in range(3))]
  for prefix in evaluations:
    arrays[f'{prefix}/total'] = np.zeros(1)
    for name in recordings.set_names(recording):
      points, match = f'{prefix}/points/{name}', f'{prefix}/match/{name}'
      arrays[f'{points}/matcher'] = random.random((2, 16, 2), np.float32)
      arrays[f'{points}/candidates'] = random.random((len(frame), 48, 2), np.float32)
      arrays[f'{points}/extra'] = random.random((len(frame), 4, 2), np.float32)
      arrays[f'{match}/frame'], arrays[f'{match}/target'] = frame, target
      arrays[f'{match}/query'] = np.zeros_like(frame)  # until it is known

  def note(prefix, total, query):
    arrays[f'{prefix}/total'][:] = total
    for s, name in enumerate(recordings.set_names(recording)):
      arrays[f'{prefix}/match/{name}/query'] = query[s, frame, target]

  begin = recordings.start(recording)
  result = selftest.at_start(recording, begin, 'dense')
  outputs, intermediates = result.predictions
  note('loss', result.total, result.terms['query'])
  arrays |= {f'out/{name}': value for name, value in intermediates.items()}
  for kind in ('mask_logits', 'class_logits'):
    arrays |= {f'out/{kind}/{i}': value for i, value in enumerate(getattr(outputs, kind))}
  scores = selftest.final_scores(outputs.mask_logits[-1], outputs.class_logits[-1])
  arrays['post/semantic_map_224'] = scores.argmax(1).astype(np.uint8)
  for parameter, value in result.gradient.items():
    arrays[f'grad/{released_name(parameter)}'] = to_released_layout(parameter, value)
  for phase in (1, 2):
    taken = selftest.take_steps(recording, begin, phase)
    for step in range(3):
      note(f'phase{phase}/{step}', taken.totals[step], taken.queries[step])
    for parameter in selftest.trained_in(recording, begin, phase):
      after = to_released_layout(parameter, np.asarray(taken.params[parameter]))
      arrays[f'phase{phase}/param_after/{released_name(parameter)}'] = after
  np.savez(path, **arrays)


@pytest.mark.slow
def test_recordings_of_other_sizes(capsys, tmp_path):
  path = tmp_path / 'other.npz'
  record(path)
  assert cli.main(['selftest', str(path)]) == 0
  assert '14 of 14' in capsys.readouterr().out.splitlines()[-1]

"""The selftest: passes on the project's recordings, and names what a changed one has otherwise."""

import json

import jax
import numpy as np
import pytest

from aavs_jax import cli, recordings, selftest
from aavs_jax.convert import released_name, to_released_layout
from aavs_jax.state import flatten
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
  for part in (jax.__version__, jax.devices()[0].device_kind, "'highest'", 'from seed 13'):
    assert part in output
  rows = verdicts(output)
  assert {verdict for _, verdict, _ in rows} == {'ok'}
  assert [quantity for quantity, _, _ in rows] == [
    'intermediates', 'prediction sets', 'matching', 'loss', 'loss terms', 'gradients', 'map',
    'phase 1: matching', 'phase 1: totals of the steps', 'phase 2: matching',
    'phase 2: totals of the steps', 'phase 2: parameters after the steps',
    'masks of the queries', 'map, where it is decided', 'metrics',
  ]  # fmt: skip
  assert '15 of 15' in output.splitlines()[-1]


@pytest.mark.slow
def test_passes_on_all_recordings_by_default(capsys):
  assert cli.main(['selftest']) == 0
  assert '32 of 32' in capsys.readouterr().out.splitlines()[-1]


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
  assert '6 of 14' in output.splitlines()[-1]


def test_a_start_that_cannot_be_drawn_again_is_a_miss(capsys, monkeypatch, tmp_path):
  monkeypatch.setattr(recordings, 'SEEDS', 100)
  arrays = copy(STAGE1)
  frozen = 'param/model.model.pixel_level_module.decoder.mask_projection.weight'
  arrays[frozen].flat[7] += 1e-4
  assert cli.main(['selftest', write(tmp_path, arrays)]) == 1
  output = capsys.readouterr().out
  assert 'no seed from 0 to 99 draws the rest, so the start is unknown' in output
  assert [row[:2] for row in verdicts(output)] == [('start', 'MISS')]


def test_another_seed_is_found():
  recording = parity.recording(1)
  trained = recordings.trained_names(recording)
  generator = recordings.TorchGenerator(321)
  drawn = dict(recordings.draw_parameters(recording.arrays.under('param/'), generator))
  late = {name: value + np.float32(1e-4) * (name in trained) for name, value in drawn.items()}
  arrays = {f'param/{name}': value for name, value in late.items()}
  arrays |= {f'phase2/param_after/{name}': late[name] for name in trained}
  arrays = recordings.Arrays(recording.arrays.path, {**recording.arrays, **arrays})
  begin, origin = recordings.start(recording._replace(arrays=arrays))
  assert 'from seed 321' in origin
  for path, value in begin.items():
    wanted = to_released_layout(path, np.asarray(value))
    np.testing.assert_array_equal(drawn[released_name(path)], wanted)


def test_a_sound_recording_is_taken_as_it_is():
  recording = parity.recording(1)
  # Three clippings to 0.01 of norms around 24 (goldens/README.md).
  factor = recordings.clip_factor(recording)
  norms = [recording.arrays.number(f'phase1/{step}/grad_norm') for step in range(3)]
  assert factor == pytest.approx(1e-6 / np.prod(norms))
  assert recordings.clip_factor(parity.recording(2)) == 1

  arrays = recordings.Arrays(recording.arrays.path, recording.arrays)
  for path, value in parity.begin(1).items():
    arrays[f'param/{released_name(path)}'] = to_released_layout(path, np.asarray(value))
  for name, value in recording.arrays.under('grad/').items():
    arrays[f'grad/{name}'] = value / factor if 'swin_adapt' in name else value
  sound = recording._replace(arrays=arrays)
  begin, origin = recordings.start(sound)
  assert origin == 'param/ is the start'
  assert all(np.array_equal(begin[path], value) for path, value in parity.begin(1).items())
  assert recordings.clip_factor(sound) == 1
  gradient = parity.at_start(1, 'gather').gradient
  assert selftest.gradient_errors(sound, gradient) == pytest.approx(
    selftest.gradient_errors(recording, gradient), abs=1e-6
  )

  # Phase 1's own parameters and norms, where they were recorded, are compared.
  taken = parity.taken(1, 1)
  for path in parity.at_start(1, 'gather').gradient:
    after = to_released_layout(path, np.asarray(taken.params[path]))
    arrays[f'phase1/param_after/{released_name(path)}'] = after
  for step, norm in enumerate(taken.norms):
    arrays[f'phase1/{step}/grad_norm'] = np.float32(norm)
  for name in [name for name in arrays.under('phase1/param_after/') if 'swin_adapt' in name]:
    del arrays[f'phase1/param_after/{name}']
  errors = selftest.step_errors(sound, parity.begin(1), 1, taken)
  assert set(errors['parameters after the steps'].values()) == {0.0}
  assert len(errors['parameters after the steps']) == 32
  assert max(errors['gradient norms of the steps'].values()) < 1e-6


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
  assert str(path) in refusal(capsys, STAGE1, path)


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


def record(path, seed):
  """Writes what our own model gives at other sizes: stage 2, with parameters saved too late."""
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
  empty = {
    name: to_released_layout(name, np.zeros(leaf.shape, np.float32))
    for name, leaf in flatten({'aavs': shapes['params']}).items()
  }
  empty = {released_name(name): value for name, value in empty.items()}
  config = np.frombuffer(json.dumps(sizes).encode(), np.uint8)
  arrays = recordings.Arrays(path, {'config': config})
  recording = recordings.Recording(arrays, sizes, 2)
  generator = recordings.TorchGenerator(seed)
  for name, value in recordings.draw_parameters(empty, generator):
    arrays[f'param/{name}'] = value
  labels = np.arange(2 * 64 * 64).reshape(2, 64, 64) // 900 % 4
  arrays['in/pixel_values'] = generator.randn(2, 3, 64, 64)
  arrays['in/audio_features'] = generator.randn(2, 20)
  arrays['in/label_map'] = labels
  arrays['in/stage1_mask'] = (labels > 0).astype(np.float32)

  frame, target = np.nonzero(recordings.targets(recording).classes >= 0)
  evaluations = ['loss', *(f'phase{phase}/{step}' for phase in (1, 2) for step in range(3))]
  for prefix in evaluations:
    arrays[f'{prefix}/total'] = np.zeros(1)
    for name in recordings.set_names(recording):
      points, match = f'{prefix}/points/{name}', f'{prefix}/match/{name}'
      arrays[f'{points}/matcher'] = generator.rand(2, 16, 2)
      arrays[f'{points}/candidates'] = generator.rand(len(frame), 48, 2)
      arrays[f'{points}/extra'] = generator.rand(len(frame), 4, 2)
      arrays[f'{match}/frame'], arrays[f'{match}/target'] = frame, target
      arrays[f'{match}/query'] = np.zeros_like(frame)  # until it is known

  def note(prefix, total, query):
    arrays[f'{prefix}/total'][:] = total
    for s, name in enumerate(recordings.set_names(recording)):
      arrays[f'{prefix}/match/{name}/query'] = query[s, frame, target]

  begin, _ = recordings.start(recording)
  result = selftest.at_start(recording, begin, 'dense')
  outputs, intermediates = result.predictions
  note('loss', result.total, result.terms['query'])
  arrays |= {f'out/{name}': value for name, value in intermediates.items()}
  for kind in ('mask_logits', 'class_logits'):
    arrays |= {f'out/{kind}/{i}': value for i, value in enumerate(getattr(outputs, kind))}
  arrays['post/semantic_map_224'] = selftest.final_scores(outputs).argmax(1).astype(np.uint8)
  for phase in (1, 2):
    taken = selftest.take_steps(recording, begin, phase)
    for step in range(3):
      note(f'phase{phase}/{step}', taken.totals[step], taken.queries[step])
  for parameter, value in result.gradient.items():
    name = released_name(parameter)
    after = to_released_layout(parameter, np.asarray(taken.params[parameter]))
    arrays[f'grad/{name}'] = to_released_layout(parameter, value)
    arrays[f'phase2/param_after/{name}'] = arrays[f'param/{name}'] = after
  np.savez(path, **arrays)


@pytest.mark.slow
def test_recordings_of_other_sizes_and_seeds(capsys, tmp_path):
  path = tmp_path / 'other.npz'
  record(path, seed=77)
  assert cli.main(['selftest', str(path)]) == 0
  output = capsys.readouterr().out
  assert 'from seed 77' in output and '13 of 13' in output.splitlines()[-1]

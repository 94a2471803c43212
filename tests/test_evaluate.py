"""Scoring a split and handing over masks: what the model is fed, and what is written or refused."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from aavs_jax import config as config_lib
from aavs_jax import evaluate, hand_over, methods
from aavs_jax.input_pipeline import avsbench, files, labels, listening, masks, prepare
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.input_pipeline.images import load_frame, load_label_rgb
from aavs_jax.input_pipeline.index import read_index
from aavs_jax.input_pipeline.reader import load_log_mel
from aavs_jax.scoring import metrics, predictor, score, tables
from aavs_jax.scoring.predictor import Predictor
from aavs_jax.training import checkpoint
from aavs_jax.training.state import create, digest, flat_shapes, unflatten
from aavs_jax.training.work_folder import load_trained
from tests import stand_in, tiny

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module', autouse=True)
def compile_once(tmp_path_factory):
  """Every call compiles its model anew; from the second time on it comes from here."""
  jax.config.update('jax_compilation_cache_dir', str(tmp_path_factory.mktemp('compiled')))
  compilation_cache.reset_cache()
  yield
  jax.config.update('jax_compilation_cache_dir', None)
  compilation_cache.reset_cache()


def save_random(folder, stage, seed):
  """A work folder as training leaves it, of a model with random weights."""
  config = tiny.get_config(stage)
  config.data.batch_items = 1
  config.data.threads = 2
  config.model.swin.depths = (1, 0, 0, 0)
  config.model.encoder_layers = 0
  rng = np.random.default_rng(seed)
  abstract = flat_shapes(methods.of(config))
  params = {
    path: jax.numpy.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype)
    for path, leaf in abstract.items()
  }
  files.write_json(folder / 'config.json', config.to_dict())
  manager = checkpoint.make_manager(folder / 'checkpoints', 1)
  checkpoint.save(manager, create(params, list(params)[:3], optax.sgd(1.0)), 1, {'miou': 0.5})
  manager.wait_until_finished()
  manager.close()
  return folder


@pytest.fixture(scope='module')
def stage1(tmp_path_factory):
  # Of many seeds the masks are empty; of this one they depend on the clip and its sound.
  return save_random(tmp_path_factory.mktemp('models') / 'stage1', 'stage1', 9)


@pytest.fixture(scope='module')
def stage2(tmp_path_factory):
  return save_random(tmp_path_factory.mktemp('models') / 'stage2', 'stage2', 19)


@pytest.fixture(scope='module')
def model1(stage1):
  """Config, parameters and the compiled model, shared by the tests of this module."""
  config, variables, _ = load_trained(stage1)
  return config, variables, Predictor(methods.of(config))


@pytest.fixture(scope='module')
def clips(data_root):
  return read_index(data_root, 'test')


@pytest.fixture(scope='module')
def handed_over(stage1, data_root, tmp_path_factory):
  """Stage 1's masks of val and test, to be copied before they are changed."""
  out = tmp_path_factory.mktemp('masks') / 'masks'
  return out, hand_over.write_masks(stage1, data=data_root, out=out)


@pytest.fixture
def written(handed_over, tmp_path):
  return shutil.copytree(handed_over[0], tmp_path / 'masks')


def _contents(folder):
  return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def _with(config, **data):
  config = config.copy_and_resolve_references()
  config.data.update(data)
  return config


def test_numbers_that_are_not_finite_are_no_model(stage1, monkeypatch):
  flat, step = checkpoint.load_flat(stage1)
  name = sorted(flat)[0]
  flat[name] = np.full_like(flat[name], np.nan)
  monkeypatch.setattr(checkpoint, 'load_flat', lambda _: (flat, step))
  with pytest.raises(UserError, match=rf'not finite \(1 parameters, first {name}\)'):
    load_trained(stage1)


def _directly(model, clip):
  """What a model says of a clip, five frames at a time, read without the pipeline."""
  config, params, predictor = model
  size = config.data.image_size
  frames = np.stack([load_frame(clip, t, size) for t in range(clip.num_frames)])
  batch = {'frames': frames, 'log_mel': load_log_mel(clip)}
  parts = [
    predictor(params, {name: value[start : start + 5] for name, value in batch.items()})
    for start in range(0, clip.num_frames, 5)
  ]
  return np.concatenate(parts)


def test_scores_do_not_depend_on_the_batch_and_are_those_of_the_predictions(model1, clips):
  config, params, predictor = model1
  found = [
    score.score(_with(config, batch_items=n), predictor, params, clips)['per_clip'] for n in (1, 3)
  ]
  assert len(found[0]) == len(clips)
  for one, three in zip(*found):
    assert one == pytest.approx(three, abs=1e-4)
  by_clip = {(row['subset'], row['uid']): row for row in found[0]}
  shares = []
  for clip in clips:
    scores = _directly(model1, clip)
    shares.append((scores.argmax(1) > 0).mean())
    target = np.stack([
      labels.binary_metric_target(load_label_rgb(clip, t), config.data.eval_size)
      for t in range(clip.num_frames)
    ])  # fmt: skip
    expected = tuple(metrics.binary_record(scores, target)['scores'])
    row = by_clip[clip.subset, clip.uid]
    assert (row['miou'], row['fscore']) == pytest.approx(expected, abs=1e-4)
  assert len(np.unique(shares)) > 1  # predictions say something


class _Says(Predictor):
  """A function in the place of a compiled model."""

  def __init__(self, answer):
    self.method, self._answer = stand_in.method(tiny.get_config()), answer

  def __call__(self, variables, batch):
    return self._answer(variables, batch)


def _stand_in(stage):
  """Config, and what stands for a model: its numbers do not depend on the shape of the batch."""
  config = tiny.get_config(stage)
  config.oracle_prior = stage == 'stage2'

  def see_and_hear(params, batch):
    loudness = batch['log_mel'].mean(axis=(1, 2))[:, None, None]
    red, green = batch['frames'][..., 0], batch['frames'][..., 1] + 8 * loudness
    return np.stack([red, green], axis=1) / 64 if stage == 'stage1' else _some_class(red, green)

  return config, _Says(see_and_hear)


def _some_class(red, green):
  return np.where(green > red, green % 71, 0).astype(np.uint8)


@pytest.mark.parametrize('stage', ['stage1', 'stage2'])
def test_the_size_of_the_batch_changes_no_bit_of_any_score(stage, clips):
  config, model = _stand_in(stage)
  found = [score.score(_with(config, batch_items=n), model, {}, clips) for n in (1, 2, 5, 16)]
  assert all(scores == found[0] for scores in found[1:])
  assert 0 < found[0]['dataset']['overall']['miou'] < 1
  assert 0 < found[0]['overall']['false_positive_rate'] < 1


@pytest.mark.parametrize('dilated', [True, False])
def test_what_sounds_is_located_by_the_labels_that_both_stages_train_on(dilated, clips):
  config, model = _stand_in('stage1')
  model.method = model.method._replace(dilated_truth=dilated)

  def know(_, batch):
    sounds = (batch['ids'] > 0) & (batch['ids'] < 255)
    return np.stack([~sounds, sounds], 1).astype(np.float32)

  model._answer = know
  scores = score.score(config, model, {}, clips)
  assert scores['dataset']['overall']['iou_sounding'] == 1
  # Of a dilated truth a rim is missing; the labels' size is not that of the scores.
  for row in (scores['overall'], scores['dataset']['overall']):
    assert 0.5 < row['miou'] < 0.99 if dilated else row['miou'] == 1


class _Device(Predictor):
  """A stand-in's answers as of a device: they can be waited for; notes who is how far ahead."""

  def __init__(self, model):
    self.method = model.method
    self.model, self.dispatched, self.read, self.ahead = model, 0, 0, []

  def __call__(self, params, batch):
    self.dispatched += 1
    return _Answer(self, self.model(params, batch))


class _Answer:
  def __init__(self, device, value):
    self.device, self.value = device, value

  def __array__(self, dtype=None, copy=None):
    self.device.read += 1
    self.device.ahead.append(self.device.dispatched - self.device.read)
    return np.asarray(self.value)


@pytest.fixture
def two_at_once(monkeypatch):
  """Makes a function wait until it is called by two threads; a single one gives up."""

  def change(module, name):
    both, function = threading.Barrier(2), getattr(module, name)

    def wait_and_call(*args):
      both.wait(20)
      return function(*args)

    monkeypatch.setattr(module, name, wait_and_call)

  return change


@pytest.mark.parametrize('stage', ['stage1', 'stage2'])
def test_devices_go_on_while_clips_are_scored_in_threads(stage, clips, two_at_once):
  config, model = _stand_in(stage)
  config, clips = _with(config, batch_items=1), clips[:4]
  seen = {False: [], True: []}

  def found(device, threads):
    return score.score(
      _with(config, threads=threads), device, {}, clips,
      on_clip=lambda clip, ids: seen[threads > 1].append((clip.uid, ids.tobytes())),
    )  # fmt: skip

  expected = found(model, 1)
  two_at_once(metrics, 'binary_record' if stage == 'stage1' else 'semantic_record')
  device = _Device(model)
  assert found(device, 3) == expected
  assert seen[True] == seen[False] and [uid for uid, _ in seen[True]] == [c.uid for c in clips]
  # Two batches wait at the device until the last ones are read: no fewer and, for memory, no more.
  assert device.ahead == [2] * (len(clips) - 2) + [1, 0]


@pytest.mark.parametrize('stage', ['stage1', 'stage2'])
def test_without_its_sound_all_that_a_model_marks_is_false(stage, clips):
  config, model = _stand_in(stage)
  marked = {}

  def look(clip, ids):
    marked.setdefault(clip.subset, []).append(ids > 0)

  result = score.score(config, model, {}, clips, audio='offscreen', on_clip=look)
  shares = {subset: np.mean(parts) for subset, parts in marked.items()}
  assert set(shares) == {'v1s', 'v1m', 'v2'} and 0 < min(shares.values()) < 1
  for subset, share in shares.items():
    assert result['subsets'][subset]['false_positive_rate'] == pytest.approx(share)
  everything = np.concatenate([part for parts in marked.values() for part in parts])
  assert result['overall']['false_positive_rate'] == pytest.approx(everything.mean())
  heard = score.score(config, model, {}, clips)['overall']
  assert heard['false_positive_rate'] != pytest.approx(heard['sounding_share'])


@pytest.mark.parametrize('audio', listening.CHOICES)
def test_the_model_hears_what_it_should(model1, clips, audio):
  config, params, predictor = model1
  clips = [clip for clip in clips if clip.subset != 'v2']  # one v2 clip has no other
  heard = {}

  def listen(params, batch):
    real = batch['weight'] > 0
    for index, t, log_mel in zip(*(batch[key][real] for key in ('clip', 'frame', 'log_mel'))):
      heard[int(index), int(t)] = log_mel
    return predictor(params, batch)

  score.score(config, _Says(listen), params, clips, audio=audio)
  assert len(heard) == 5 * len(clips)
  others = {'other': listening.other_sounds(clips), 'offscreen': listening.offscreen_sounds(clips)}
  for (index, t), log_mel in heard.items():
    own = load_log_mel(clips[index])[t]
    if audio in others:
      expected = load_log_mel(others[audio][index])[t]
      assert not np.array_equal(expected, own)
    elif audio == 'noise':
      expected = listening.noise_log_mel(clips[index])[t]
    else:
      expected = {'true': own, 'silence': np.full_like(own, listening.SILENCE)}[audio]
    np.testing.assert_array_equal(log_mel, expected)


def test_training_split_is_scored_on_its_labelled_frames(stage1, model1, data_root, tmp_path):
  result = evaluate.evaluate(
    stage1, data=data_root, out=tmp_path / 'r.json', split='train', maps=tmp_path / 'maps'
  )
  train = read_index(data_root, 'train')
  assert result['clips'] == len(train)
  assert result['frames'] == sum(1 if c.subset == 'v1s' else c.num_frames for c in train)
  clip = next(c for c in train if c.subset == 'v1s')
  colours = load_label_rgb(clip, 0)
  target = labels.binary_metric_target(colours, model1[0].data.eval_size)
  expected = tuple(metrics.binary_record(_directly(model1, clip)[:1], target[None])['scores'])
  row = next(r for r in result['per_clip'] if (r['subset'], r['uid']) == ('v1s', clip.uid))
  assert (row['miou'], row['fscore']) == pytest.approx(expected, abs=1e-4)


def test_a_model_of_other_classes_is_refused(stage2, data_root, tmp_path):
  folder = shutil.copytree(stage2, tmp_path / 'model')
  names = ['kettle' if name == 'axe' else name for name in avsbench.CLASSES]
  (folder / 'classes.json').write_text(json.dumps(names))
  with pytest.raises(UserError, match=r"class 3 is 'kettle' for .* but 'axe' in AVSBench"):
    evaluate.evaluate(folder, data=data_root, out=tmp_path / 'r.json', oracle=True)


def test_evaluation_tells_what_it_was_made_of(stage1, stage2, written, data_root, tmp_path):
  flat, step = checkpoint.load_flat(stage2)
  options = dict(data=data_root, out=tmp_path / 'r.json')
  result = evaluate.evaluate(stage2, mask_folder=str(written), **options)
  assert json.loads((tmp_path / 'r.json').read_text()) == result
  assert result['checkpoint_step'] == step
  assert result['checkpoint_digest'] == digest(unflatten(flat))
  model_of_masks = digest(unflatten(checkpoint.load_flat(stage1)[0]))
  assert result['masks_digest'] == model_of_masks != result['checkpoint_digest']
  oracle = evaluate.evaluate(stage2, oracle=True, **options)
  assert oracle['masks_digest'] is None and oracle['prior'] == 'oracle'
  assert oracle['per_clip'] != result['per_clip']  # so the prior reaches the model


def test_a_place_that_cannot_be_is_refused_before_anything_is_scored(tmp_path):
  (tmp_path / 'file').write_text('')
  for out, words in (('', 'is a folder: name a file'), ('file/r.json', 'cannot be written')):
    with pytest.raises(UserError, match=words):
      evaluate.evaluate(tmp_path / 'no model', data='no data', out=tmp_path / out)
  assert [path.name for path in tmp_path.iterdir()] == ['file']


def test_scores_that_are_no_numbers_are_no_silence(model1, clips):
  config, params, predictor = model1
  broken = jax.tree.map(lambda leaf: leaf * np.nan, params)
  with pytest.raises(FloatingPointError, match='scores of the model are not finite'):
    score.score(config, predictor, broken, clips[:1])
  with pytest.raises(FloatingPointError, match='scores of the model are not finite'):
    masks.of_scores(_directly((config, broken, predictor), clips[0]), soft=False)


def test_the_tables_stand_beside_the_json(stage1, data_root, tmp_path):
  out = tmp_path / 'eval' / 'stage1.json'
  result = evaluate.evaluate(stage1, data=data_root, out=out, audio='silence')
  assert {path.name for path in out.parent.iterdir()} == {'stage1.json', 'stage1.md'}
  text = out.with_suffix('.md').read_text()
  assert text.startswith('# Stage 1 on test, silence audio\n')
  assert text == tables.format_evaluation(result, markdown=True)
  with pytest.raises(UserError, match=r'--out .*eval/r\.md is where the tables go'):
    evaluate.evaluate(stage1, data=data_root, out=out.with_name('r.md'))


def test_a_choice_of_subsets_is_scored_alone(stage1, data_root, tmp_path):
  options = dict(data=data_root, out=tmp_path / 'r.json')
  whole = evaluate.evaluate(stage1, **options)
  some = evaluate.evaluate(stage1, subsets=['v1m', 'v1s'], **options)
  assert list(some['subsets']) == ['v1s', 'v1m'] and some['clips'] == 4
  for part in ('v1s', 'v1m'):
    assert some['subsets'][part]['miou'] == pytest.approx(whole['subsets'][part]['miou'], abs=1e-4)
  assert some['overall']['miou'] == pytest.approx(
    (whole['subsets']['v1s']['miou'] + whole['subsets']['v1m']['miou']) / 2, abs=1e-4
  )
  with pytest.raises(UserError, match="no subset 'v3': choose from v1s, v1m, v2"):
    evaluate.evaluate(stage1, subsets=['v1s', 'v3'], **options)


def test_the_config_can_ask_for_the_oracle_prior(stage2, written, data_root, tmp_path):
  options = dict(data=data_root, out=tmp_path / 'r.json')
  oracle = evaluate.evaluate(stage2, oracle=True, **options)
  folder = shutil.copytree(stage2, tmp_path / 'stage2')
  config = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(config | {'oracle_prior': True}))
  assert evaluate.evaluate(folder, **options) == oracle
  assert evaluate.evaluate(folder, mask_folder=str(written), **options)['prior'] == 'stage1'
  # Folders of before the key was added say nothing of it.
  config.pop('oracle_prior')
  config['data'].pop('threads')
  (folder / 'config.json').write_text(json.dumps(config))
  assert config_lib.from_json(folder / 'config.json').data.threads == 4  # as in configs/base.py
  with pytest.raises(UserError, match=r'config\.data\.masks is empty'):
    evaluate.evaluate(folder, **options)


def test_priors_that_make_no_sense_are_refused(stage1, stage2, data_root, tmp_path):
  options = dict(data=data_root, out=tmp_path / 'r.json')
  with pytest.raises(UserError, match=r'--oracle is given, but the model of .*stage1 takes no'):
    evaluate.evaluate(stage1, oracle=True, **options)
  with pytest.raises(UserError, match=r'--masks here is given, but the model of .*stage1'):
    evaluate.evaluate(stage1, mask_folder='here', **options)
  with pytest.raises(UserError, match='--oracle and --masks here are two priors'):
    evaluate.evaluate(stage2, oracle=True, mask_folder='here', **options)
  with pytest.raises(UserError, match=r'--no-prior is given, but the model of .*stage1 takes no'):
    evaluate.evaluate(stage1, no_prior=True, **options)
  with pytest.raises(UserError, match='--oracle and --no-prior are two priors'):
    evaluate.evaluate(stage2, oracle=True, no_prior=True, **options)
  assert not (tmp_path / 'r.json').exists()


def test_stage_2_can_be_scored_without_a_prior(stage2, data_root, tmp_path, monkeypatch, capsys):
  given, call = [], Predictor.__call__

  def watched(self, variables, batch):
    given.append(np.unique(batch['prior']).tolist())
    return call(self, variables, batch)

  monkeypatch.setattr(Predictor, '__call__', watched)
  result = evaluate.evaluate(stage2, data=data_root, out=tmp_path / 'r.json', no_prior=True)
  assert result['prior'] == 'none' and result['masks_digest'] is None
  assert given and all(values == [128] for values in given)
  assert capsys.readouterr().out.startswith('  stage 2 on test, true audio, no prior: 5 clips in')


class TestWriteMasks:
  def test_the_set_is_complete_and_the_models_own(self, handed_over, model1, data_root):
    out, count = handed_over
    found = [c for split in ('val', 'test') for c in read_index(data_root, split)]
    assert count == len(found)
    expected = {f'{c.subset}/{c.uid}/{t}.png' for c in found for t in range(c.num_frames)}
    assert set(_contents(out)) == expected | {'source.json'}
    values = set()
    for clip in found:
      binary = _directly(model1, clip).argmax(1) * 255
      for t in range(clip.num_frames):
        with Image.open(masks.mask_path(str(out), clip, t)) as image:
          assert image.mode == 'L'
          mask = np.asarray(image)
        values |= set(np.unique(mask).tolist())
        np.testing.assert_array_equal(mask, binary[t])
    assert values == {0, 255}

  def test_a_second_run_writes_only_what_is_missing(
    self, stage1, written, data_root, two_at_once, capsys
  ):
    before = _contents(written)
    assert hand_over.write_masks(stage1, data=data_root, out=written) == 0
    assert capsys.readouterr().out == '  masks of 10 clips were there and are kept\n'
    first, last = sorted(written.glob('v2/*/7.png'))
    first.write_bytes(first.read_bytes()[:30])
    # As a writer leaves it that was killed after it had removed what was there.
    shutil.move(last.parent, last.parent.with_name(f'.{last.parent.name}.writing'))
    two_at_once(masks, 'write_clip_masks')
    assert hand_over.write_masks(stage1, data=data_root, out=written) == 2
    assert capsys.readouterr().out.startswith('  masks of 8 clips were there and are kept\n')
    assert _contents(written) == before

  def test_masks_of_two_models_are_not_mixed(self, written, data_root, tmp_path):
    other = save_random(tmp_path / 'other', 'stage1', 3)
    before = _contents(written)
    with pytest.raises(UserError, match='holds masks of another model'):
      hand_over.write_masks(other, data=data_root, out=written)
    (written / 'source.json').unlink()
    with pytest.raises(UserError, match=r'holds v1s but no source\.json'):
      hand_over.write_masks(other, data=data_root, out=written)
    assert _contents(written) == {k: v for k, v in before.items() if k != 'source.json'}

  def test_masks_of_two_data_sets_are_not_mixed(self, stage1, written, data_root, tmp_path):
    root = shutil.copytree(data_root, tmp_path / 'data')
    before = _contents(written)
    clip = read_index(root, 'test')[-1]
    assert clip.name in json.loads(before['source.json'])['labels']
    Image.fromarray(np.full((40, 60), 7, np.uint8)).save(clip.label_ids_path(0))
    with pytest.raises(UserError, match=r'masks of another data set, in which test/.* has other'):
      hand_over.write_masks(stage1, data=str(root), out=written)
    # One that cannot be read tells nothing, and of other splits nothing is known yet.
    Path(clip.label_ids_path(0)).write_bytes(b'')
    hand_over.write_masks(stage1, data=str(root), out=written)
    hand_over.write_masks(stage1, data=str(root), out=written, splits=('train',))
    labels = json.loads((written / 'source.json').read_text())['labels']
    assert {name.split('/')[0] for name in labels} == {'val', 'test', 'train'}

  def test_what_is_no_mask_is_not_replaced(self, stage1, written, data_root, clips):
    clip = clips[0]
    folder = written / clip.subset / clip.uid
    (folder / '0.png').unlink()
    (folder / 'notes.txt').write_text('mine')
    before = _contents(written)
    with pytest.raises(UserError, match=r'holds notes\.txt, which is no map'):
      hand_over.write_masks(stage1, data=data_root, out=written)
    assert _contents(written) == before

  def test_a_data_set_is_not_overwritten(self, stage1, data_root, tmp_path):
    root = shutil.copytree(data_root, tmp_path / 'data')
    before = _contents(root)
    with pytest.raises(UserError, match=r'metadata\.csv says that'):
      hand_over.write_masks(stage1, data=str(root), out=root)
    with pytest.raises(UserError, match=r'metadata\.csv says that'):
      evaluate.evaluate(stage1, data=str(root), out=tmp_path / 'r.json', maps=root)
    (root / 'metadata.csv').rename(tmp_path / 'metadata.csv')
    with pytest.raises(UserError, match=r'but no source\.json'):
      hand_over.write_masks(stage1, data=data_root, out=root)
    (tmp_path / 'metadata.csv').rename(root / 'metadata.csv')
    assert _contents(root) == before


@pytest.mark.parametrize(
  ('items', 'length', 'devices', 'processes', 'expected'),
  [
    (1, 0, 1, 1, 1),
    (4, 5, 1, 1, 4),
    (16, 5, 4, 4, 4),  # five frames a device, as in training
    (256, 5, 4, 64, 4),
    (256, 1, 4, 64, 4),  # one frame a device cannot be kept: items are of five
    (1024, 1, 4, 64, 4),
    (6, 5, 4, 1, 8),
    (8, 0, 5, 2, 4),
  ],
)
def test_evaluation_has_the_frames_of_training_on_a_device(
  items, length, devices, processes, expected
):
  config = tiny.get_config('stage1')
  config.data.batch_items, config.data.item_frames = items, length
  assert predictor.eval_batch_items(config, 1, devices, processes) == expected


def test_maps_and_masks_in_a_bucket_are_refused(stage1, data_root, tmp_path):
  with pytest.raises(UserError, match='gs://b/masks is in a bucket'):
    hand_over.write_masks(stage1, data=data_root, out='gs://b/masks')
  with pytest.raises(UserError, match='gs://b/maps is in a bucket'):
    evaluate.evaluate(stage1, data=data_root, out=tmp_path / 'r.json', maps='gs://b/maps')
  assert not os.path.exists('gs:')


_PROCESS = """
import json, sys
process, processes, port, stage1, data, folder = sys.argv[1:]
import jax
if processes != '1':
  jax.distributed.initialize(f'localhost:{port}', int(processes), int(process))
import numpy as np
from aavs_jax import evaluate, hand_over
from aavs_jax.devices import mesh
from aavs_jax.input_pipeline import files
from aavs_jax.scoring.predictor import local_variables
from aavs_jax.training.state import digest
from aavs_jax.training.work_folder import load_trained
from aavs_jax import evaluate
from aavs_jax.devices import mesh

assert hand_over.write_masks(stage1, data=data, out=f'{folder}/masks', splits=['test']) == 5
options = dict(data=data, out=f'{folder}/shared/r.json', maps=f'{folder}/maps')
result = evaluate.evaluate(stage1, **options)
files.write_json(f'{folder}/{process}.json', result)

# Parameters spread over all devices, as in training, come back whole.
mesh.FSDP_MIN_SIZE = 1
_, params, _ = load_trained(stage1)
places = mesh.state_sharding(mesh.make_mesh(jax.device_count()), params)
spread = jax.tree.map(
  lambda leaf, place: jax.make_array_from_callback(
    leaf.shape, place, lambda index: np.asarray(leaf)[index]
  ), params, places,
)
assert not all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(spread))
assert digest(local_variables(spread)) == digest(params)
"""


@pytest.mark.slow
def test_devices_and_processes_change_no_score(stage1, handed_over, data_root, tmp_path):
  alone = evaluate.evaluate(
    stage1, data=data_root, out=tmp_path / 'alone.json', maps=tmp_path / 'maps'
  )
  cache = {
    'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'cache'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }
  for processes, devices in [(1, 4), (2, 2)]:
    folder = tmp_path / f'{processes}x{devices}'
    with socket.socket() as free:
      free.bind(('localhost', 0))
      port = str(free.getsockname()[1])
    running = [
      subprocess.Popen(
        [sys.executable, '-c', _PROCESS, str(process), str(processes), port, str(stage1),
         data_root, str(folder)],
        cwd=ROOT, env=os.environ | cache | {'JAX_NUM_CPU_DEVICES': str(devices)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
      )
      for process in range(processes)
    ]  # fmt: skip
    outputs = [process.communicate()[0] for process in running]
    assert not any(process.returncode for process in running), '\n'.join(outputs)
    for process in range(processes):
      assert json.loads((folder / f'{process}.json').read_text()) == alone
    assert {path.name for path in (folder / 'shared').iterdir()} == {'r.json', 'r.md'}
    assert json.loads((folder / 'shared' / 'r.json').read_text()) == alone
    assert _contents(folder / 'maps') == _contents(tmp_path / 'maps')
    test = {f'{clip.subset}/{clip.uid}' for clip in read_index(data_root, 'test')}
    for name, content in _contents(folder / 'masks').items():
      assert name == 'source.json' or os.path.dirname(name) in test
      assert content == _contents(handed_over[0])[name]


def test_numbers_that_the_config_does_not_know_are_no_model(stage1, monkeypatch):
  flat, step = checkpoint.load_flat(stage1)
  flat['aavs/more'] = np.ones(2, np.float32)
  monkeypatch.setattr(checkpoint, 'load_flat', lambda _: (flat, step))
  with pytest.raises(UserError, match=r'does not fit its config\.json \(1 parameters, .*more\)'):
    load_trained(stage1)


def test_masks_of_the_other_kind_are_no_prior(stage2, written, data_root, tmp_path):
  source = written / 'source.json'
  source.write_text(json.dumps(json.loads(source.read_text()) | {'kind': 'soft'}))
  with pytest.raises(UserError, match=r'holds soft masks, but config\.prior\.soft is'):
    evaluate.evaluate(stage2, data=data_root, out=tmp_path / 'r.json', mask_folder=str(written))


def test_prepared_frames_of_another_size_give_no_masks(stage1, data_root, tmp_path):
  shards = tmp_path / 'shards'
  prepare.prepare(data_root, shards, image_size=64, eval_size=32, workers=1)
  with pytest.raises(UserError, match='image_size'):
    hand_over.write_masks(stage1, data=str(shards), out=tmp_path / 'masks')
  assert not (tmp_path / 'masks').exists()

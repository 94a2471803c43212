"""The prior of stage 2 with the faults of stage 1, soft or hard, predicted or absent."""

import dataclasses
import functools
import itertools
import json
import pathlib
import re
import shutil

import cv2
import flax.linen as nn
import numpy as np
import pytest
from etils import epath

from aavs_jax import config as config_lib
from aavs_jax import hand_over, methods
from aavs_jax.cross_fit import cross_fit
from aavs_jax.input_pipeline import listening, masks, pipeline, prior
from aavs_jax.input_pipeline.avsbench import SemanticClip
from aavs_jax.input_pipeline.clips import IGNORE, fold_of
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.input_pipeline.index import read_index
from aavs_jax.input_pipeline.items import Item, Lot, Task, load_eval_item, load_training_item
from aavs_jax.input_pipeline.prior import Faults, disturb
from aavs_jax.input_pipeline.reader import load_log_mel
from aavs_jax.predict import load_models
from aavs_jax.train import train
from aavs_jax.training import work_folder
from tests import small_maps, tiny

PLAIN = Task(True, 71, 32, 32, 4, True, '')
FAULTY = dataclasses.replace(
  PLAIN, none=0.2, negative_sound=0.3, faults=Faults(missing=0.5, added=0.5, moved=0.1, wrong=0.2)
)


def _rng(seed=0):
  return np.random.default_rng(seed)


class TestFaults:
  @pytest.fixture
  def ids(self):
    """Two objects, of which one touches the edge, and pixels that do not count."""
    ids = np.zeros((40, 40), np.uint8)
    ids[4:14, 6:18] = 3
    ids[20:32, 30:] = 8
    ids[38:, :] = IGNORE
    return ids

  def test_without_faults_it_is_the_truth(self, ids):
    expected = 255 * np.isin(ids, (3, 8))
    assert np.array_equal(disturb(ids, [ids], _rng(), Faults()), expected)
    assert np.array_equal(prior.truth(ids), expected)

  def test_the_same_draws_are_the_same_faults(self, ids):
    a, b, c = (disturb(ids, [], _rng(seed), FAULTY.faults) for seed in (1, 1, 2))
    assert np.array_equal(a, b) and not np.array_equal(a, c)

  def test_objects_are_missing_one_by_one_and_as_a_whole(self, ids):
    seen = set()
    for seed in range(40):
      mask = disturb(ids, [], _rng(seed), Faults(missing=0.5))
      there = tuple(one for one in (3, 8) if mask[ids == one].any())
      assert np.array_equal(mask, 255 * np.isin(ids, there))
      seen.add(there)
    assert seen == {(), (3,), (8,), (3, 8)}
    assert not disturb(ids, [], _rng(), Faults(missing=1.0)).any()

  def test_what_sounds_in_another_second_is_added(self, ids):
    other = np.where(ids == 8, 5, 0).astype(np.uint8)
    now = np.where(ids == 3, 3, 0).astype(np.uint8)
    mask = disturb(now, [now, other], _rng(), Faults(added=1.0))
    assert np.array_equal(mask, 255 * (ids > 0) * (ids != IGNORE))
    silent = disturb(np.zeros_like(ids), [now], _rng(), Faults(added=1.0))
    assert np.array_equal(silent, prior.truth(now))

  def test_where_nothing_else_is_known_the_object_is_added_elsewhere(self, ids):
    true = prior.truth(ids)
    mask = disturb(ids, [ids], _rng(), Faults(added=1.0))
    assert (mask[true > 0] == 255).all() and (mask > 0).sum() > 1.3 * (true > 0).sum()
    nothing = np.zeros_like(ids)
    assert not disturb(nothing, [nothing], _rng(), Faults(added=1.0)).any()

  def test_a_wrong_mask_is_as_large_and_elsewhere(self, ids):
    true, overlaps = prior.truth(ids) > 0, []
    for seed in range(10):
      mask = disturb(ids, [], _rng(seed), Faults(wrong=1.0)) > 0
      assert mask.sum() == true.sum()
      overlaps.append((mask & true).sum() / true.sum())
    assert np.mean(overlaps) < 0.3

  def test_edges_move_as_far_as_they_may(self, ids):
    reach, true, changed = 2, prior.truth(ids), 0
    square = np.ones((6 * reach + 1,) * 2, np.uint8)  # grown by `reach` and shifted on a diagonal
    least, most = cv2.erode(true, square), cv2.dilate(true, square)
    for seed in range(20):
      mask = disturb(ids, [], _rng(seed), Faults(moved=reach / 40))
      assert set(np.unique(mask)) == {0, 255}
      assert (mask[2:-2, 2:-2] >= least[2:-2, 2:-2]).all() and (mask <= most).all()
      changed += not np.array_equal(mask, true)
    assert changed > 15


class TestSoftMasks:
  def test_they_decide_as_hard_ones(self, data_root, tmp_path):
    clip = read_index(data_root, 'test')[0]
    scores = _rng().random((5, 2, 32, 32), np.float32) ** 3
    scores[0, 1] = scores[0, 0]  # a tie is silence
    scores[1, 1] = scores[1, 0] * (1 + 1e-6)
    scores[2] = 0
    soft, hard = (masks.of_scores(scores, soft) for soft in (True, False))
    assert np.array_equal(soft >= 128, hard == 255)
    assert np.array_equal(hard, 255 * (scores.argmax(1) == 1))
    share = scores[3:, 1] / scores[3:].sum(1)
    assert np.abs(soft[3:] / 255 - share).max() < 1 / 255
    assert len(np.unique(soft)) > 200
    masks.write_clip_masks(str(tmp_path), clip, soft)
    for t in range(5):
      assert np.array_equal(masks.read_mask(str(tmp_path), clip, t, 32, soft=True), soft[t])
    with pytest.raises(UserError, match='values other than 0 and 255'):
      masks.read_mask(str(tmp_path), clip, 3, 32)
    assert masks.is_complete(str(tmp_path), clip, 32, soft=True)
    assert not masks.is_complete(str(tmp_path), clip, 32)

  def test_evaluation_reads_them(self, data_root, tmp_path):
    clip = read_index(data_root, 'test')[0]
    levels = np.arange(5 * 32 * 32).reshape(5, 32, 32).astype(np.uint8)
    masks.write_clip_masks(str(tmp_path), clip, levels)
    task = dataclasses.replace(PLAIN, masks=str(tmp_path), soft=True)
    assert np.array_equal(load_eval_item(clip, clip, Item(0, 0, 5), task)['prior'], levels)

  def test_a_folder_of_the_other_kind_is_refused(self, tmp_path):
    note = {'checkpoint': 'a', 'step': 1, 'digest': 'b'}
    folder = tmp_path / 'masks'
    folder.mkdir()
    for kind in ('hard', 'soft', None, 'unknown'):  # folders of old say nothing, released ones less
      if kind != 'unknown':
        (folder / 'source.json').write_text(json.dumps(note | ({'kind': kind} if kind else {})))
      else:
        (folder / 'source.json').unlink()
      is_soft = kind == 'soft'
      masks.require_kind(folder, is_soft)
      words = f'{folder} holds {"soft" if is_soft else "hard"} masks, but config.prior.soft is'
      with pytest.raises(UserError, match=re.escape(words)) as error:
        masks.require_kind(folder, not is_soft)
      assert '\n' not in str(error.value)


def _stream(clips, task, count, **changes):
  options = dict(item_frames=5, batch_items=2, seed=3, start=0, threads=1) | changes
  return list(itertools.islice(pipeline.training_batches(clips, task, **options), count))


def _same(a, b):
  return len(a) == len(b) and all(
    x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) for k in x) for x, y in zip(a, b)
  )


class TestStream:
  @pytest.fixture
  def clips(self, data_root):
    return read_index(data_root, 'train')

  @pytest.mark.parametrize('item_frames', [5, 0])  # 0: packed, since there is more than one item
  def test_chance_follows_from_seed_and_place(self, clips, item_frames):
    sizes = dict(item_frames=item_frames, batch_items=4)
    whole = _stream(clips, FAULTY, 8, **sizes)
    assert _same(whole, _stream(clips, FAULTY, 8, threads=3, **sizes))
    assert _same(whole[5:], _stream(clips, FAULTY, 3, start=5, **sizes))
    for processes in (2, 4):
      shares = [
        _stream(clips, FAULTY, 8, process=p, processes=processes, **sizes) for p in range(processes)
      ]
      for batch, *parts in zip(whole, *shares):
        together = {name: np.concatenate([part[name] for part in parts]) for name in batch}
        order = np.argsort(together['position'])
        assert _same([batch], [{name: value[order] for name, value in together.items()}])
    plain = _stream(clips, PLAIN, 8, **sizes)
    assert all(np.array_equal(a['frames'], b['frames']) for a, b in zip(whole, plain))
    assert not any(np.array_equal(a['prior'], b['prior']) for a, b in zip(whole, plain))

  def test_every_epoch_draws_anew(self, clips):
    clip = [c for c in clips if c.subset == 'v1m'][:1]
    task = dataclasses.replace(PLAIN, faults=Faults(missing=0.3, moved=0.2))
    first, second = _stream(clip, task, 2, batch_items=1)
    assert np.array_equal(first['labels'], second['labels'])
    assert not np.array_equal(first['prior'], second['prior'])

  def test_a_clip_in_two_slots_has_one_lot(self, clips):
    task = dataclasses.replace(PLAIN, none=0.5)
    found = set()
    for batch in _stream(clips, task, 20, item_frames=0, batch_items=4):
      for group in np.unique(batch['group'][batch['weight'] > 0]):
        of_clip = batch['prior'][batch['group'] == group]
        found.add((len(of_clip), absent := bool((of_clip == prior.UNKNOWN).all())))
        assert absent or not (of_clip == prior.UNKNOWN).any()
    assert found == {(5, True), (5, False), (10, True), (10, False)}

  def test_a_share_of_the_priors_is_that_of_cross_fitted_masks(self, clips, tmp_path):
    for clip in clips:
      levels = np.arange(10, 10 + clip.num_frames, dtype=np.uint8)[:, None, None]
      maps = np.broadcast_to(levels, (clip.num_frames, 32, 32))
      masks.write_clip_masks(str(tmp_path / masks.CROSS_FITTED), clip, maps)
    task = dataclasses.replace(PLAIN, masks=str(tmp_path), soft=True, predicted=0.5, none=0.25)
    counts = dict.fromkeys(('predicted', 'none', 'truth'), 0)
    for batch in _stream(clips, task, 120, batch_items=1, item_frames=1):
      clip, value = clips[batch['clip'][0]], np.unique(batch['prior'])
      if 10 <= value[0] < 20:
        assert len(value) == 1 and (value[0] == 10 or clip.subset != 'v1s')
        counts['predicted'] += 1
      else:
        counts['none' if value[0] == prior.UNKNOWN else 'truth'] += 1
    assert abs(counts['predicted'] - 60) < 20 and abs(counts['none'] - 30) < 18
    lot = Lot((0,), 'predicted')
    v2 = next(clip for clip in clips if clip.subset == 'v2')
    batch = load_training_item(v2, Item(0, 5, 5), task, lot)
    assert batch['prior'][:, 0, 0].tolist() == [15, 16, 17, 18, 19]

  def test_a_negative_sound_has_no_targets_and_no_source_in_the_picture(self, clips):
    task = dataclasses.replace(PLAIN, negative_sound=1.0)
    objects = listening.known_objects(clips)
    sounds = [load_log_mel(clip) for clip in clips]
    kinds = set()
    for batch in _stream(clips, task, 60, batch_items=1):
      place, heard = batch['clip'][0], batch['log_mel']
      assert not batch['labels'].any() and not batch['prior'].any() and batch['weight'].all()
      assert (batch['target_classes'] == [0, -1, -1, -1]).all()
      if (heard == listening.SILENCE).all():
        kinds.add('silence')
        continue
      parts = [(i, s[k : k + 5]) for i, s in enumerate(sounds) for k in (0, 5) if len(s) > k]
      found = [i for i, sound in parts if np.array_equal(sound[: len(heard)], heard)]
      kinds.add('other' if found else 'noise')
      for other in found:
        assert objects[other][0] and not objects[other][0] & objects[place][1]
    assert kinds >= {'silence', 'noise'}
    # In the binary task, too, it counts.
    binary = Task(False, 2, 32, 32, 2, False, '', negative_sound=1.0)
    for batch in _stream(clips, binary, 10):
      assert batch['weight'].all() and not batch['labels'].any()

  def test_another_clip_is_heard_only_where_classes_are_known(self, clips):
    known = [({'dog'}, {'dog'}), ({'dog', 'cat'}, {'cat'}), (set(), set()), ({'car'}, {'car'})]
    split = clips[:4]
    heard = {listening.negative_sound(split, 0, known, _rng(seed)) for seed in range(40)}
    assert heard == {'silence', 'noise', split[3]}
    for objects in ([None] * 4, known[:1] * 4):  # nothing is known, or everything sounds alike
      heard = {listening.negative_sound(split, 0, objects, _rng(seed)) for seed in range(40)}
      assert heard == {'silence', 'noise'}

  def test_what_is_visible_may_be_in_the_prior_of_a_negative(self, clips):
    clip = next(clip for clip in clips if clip.subset == 'v1s')
    task = dataclasses.replace(PLAIN, faults=Faults(added=1.0))
    negative = load_training_item(clip, Item(0, 0, 5), task, Lot((0,), 'predicted', 'silence'))
    true = load_training_item(clip, Item(0, 0, 5), PLAIN)
    assert true['prior'].any() and not negative['labels'].any()
    assert (negative['prior'] <= true['prior']).all() and negative['prior'].any((1, 2)).all()

  def test_evaluation_without_a_prior(self, clips):
    task = dataclasses.replace(PLAIN, masks='/nowhere', no_prior=True)
    batch = load_eval_item(clips[0], clips[0], Item(0, 0, 5), task)
    assert (batch['prior'] == 128).all() and batch['prior'].shape == (5, 32, 32)


def _stand_in(data_root):
  config = tiny.get_config('stage1')
  config.method = 'tests.stand_in'
  config.data.root = data_root
  config.train.epochs = 1.0
  return config


@pytest.fixture(scope='module')
def stage1(data_root, tmp_path_factory):
  folder = tmp_path_factory.mktemp('stage1')
  train(_stand_in(data_root), folder)
  return folder


def test_hard_and_soft_masks_are_not_mixed(stage1, data_root, tmp_path):
  for soft in (False, True):
    out = tmp_path / f'{soft}'
    assert hand_over.write_masks(stage1, data=data_root, out=out, soft=soft) == 10
    assert masks.read_source(out)['kind'] == masks.kind_of(soft)
    assert hand_over.write_masks(stage1, data=data_root, out=out, soft=soft) == 0
    with pytest.raises(UserError, match='masks, and these are'):
      hand_over.write_masks(stage1, data=data_root, out=out, soft=not soft)
  for clip in read_index(data_root, 'test'):
    hard = masks.read_mask(str(tmp_path / 'False'), clip, 3, 32)
    level = masks.read_mask(str(tmp_path / 'True'), clip, 3, 32, soft=True)
    assert np.array_equal(level >= 128, hard == 255)


@pytest.mark.parametrize('soft', [False, True])
def test_a_prediction_hands_over_what_the_config_of_stage_2_asks_for(soft, monkeypatch):
  scores = _rng().random((5, 2, 32, 32), np.float32)
  config, given = tiny.get_config('stage2'), []
  config.prior.soft = soft

  def model(config, _):
    if config.task == 'binary':
      return lambda *_: scores
    return lambda frames, log_mel, mask: given.append(mask)

  stages = work_folder.Trained(tiny.get_config('stage1'), None), work_folder.Trained(config, None)
  monkeypatch.setattr('aavs_jax.predict.load_stages', lambda *_: stages)
  monkeypatch.setattr('aavs_jax.predict._model', model)
  answer, _ = load_models('one', 'two')
  shown, _ = answer([], None)
  assert np.array_equal(given[0], masks.of_scores(scores, soft))
  assert np.array_equal(shown, masks.of_scores(scores, soft=False))


class TestCrossFit:
  FOLDS = 3

  @pytest.fixture(scope='class')
  def fitted(self, data_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp('fitted')
    predicted, write = {}, hand_over.write_clips
    with pytest.MonkeyPatch.context() as patch:

      def record(config, variables, clips, **options):
        predicted[config.data.leave_out[0]] = [f'train/{c.subset}/{c.uid}' for c in clips]
        return write(config, variables, clips, **options)

      patch.setattr(hand_over, 'write_clips', record)
      count = self._run(data_root, folder)
    return folder, predicted, count

  def _run(self, data_root, folder, folds=FOLDS, **options):
    config = _stand_in(data_root)
    return cross_fit(
      config, folder / 'runs', data=data_root, out=folder / 'masks', folds=folds, **options
    )

  def test_no_clip_is_predicted_by_a_model_that_was_trained_on_it(self, fitted, data_root):
    folder, predicted, count = fitted
    clips = read_index(data_root, 'train')
    everything = {f'train/{clip.subset}/{clip.uid}' for clip in clips}
    assert count == len(clips)
    assert sorted(itertools.chain(*predicted.values())) == sorted(everything)
    for k, names in predicted.items():
      trained = json.loads((folder / 'runs' / f'fold{k}' / 'clips.json').read_text())
      assert set(trained) & everything == everything - set(names)
    for clip in clips:
      assert masks.is_complete(str(folder / 'masks' / masks.CROSS_FITTED), clip, 32)

  def test_it_goes_on_where_it_was(self, fitted, data_root):
    folder, _, _ = fitted
    clip = read_index(data_root, 'train')[-1]
    root = str(folder / 'masks' / masks.CROSS_FITTED)
    path = epath.Path(masks.mask_path(root, clip, 3))
    before = path.read_bytes()
    assert self._run(data_root, folder) == 0
    path.unlink()
    assert self._run(data_root, folder) == 1
    assert path.read_bytes() == before

  def test_other_folds_and_kinds_are_refused(self, fitted, data_root):
    folder, _, _ = fitted
    with pytest.raises(UserError, match='begun with folds 3, not 2'):
      self._run(data_root, folder, folds=2)
    with pytest.raises(UserError, match='begun with kind hard, not soft'):
      self._run(data_root, folder, soft=True)
    with pytest.raises(UserError, match='use 2 or more'):
      self._run(data_root, folder, folds=1)
    with pytest.raises(UserError, match=r'100 folds .* leave no clip to part'):
      self._run(data_root, folder / 'many', folds=100)

  def test_a_part_of_ones_own_is_refused(self, data_root, tmp_path):
    config = _stand_in(data_root)
    config.data.leave_out = (0, 2)
    with pytest.raises(UserError, match=r'config.data.leave_out is \(0, 2\)'):
      cross_fit(config, tmp_path / 'runs', data=data_root, out=tmp_path / 'masks')

  def test_a_start_that_has_seen_the_clips_is_refused(self, fitted, data_root, tmp_path):
    config = _stand_in(data_root)
    seen, later = fitted[0] / 'runs' / 'fold0', tmp_path / 'later'
    # Trained on others, but from there.
    config.train.init = str(seen)
    others = work_folder.Clips([SemanticClip('', 'new', 'v1s', 'train', 5)], [], [])
    work_folder.claim(epath.Path(later), config, others, None)
    for config.train.init in (str(seen), str(seen / 'checkpoints' / '1'), str(later)):
      with pytest.raises(UserError, match=r'which was trained on .* not to have seen'):
        cross_fit(config, tmp_path / 'runs', data=data_root, out=tmp_path / 'masks', folds=2)

  def test_masks_of_other_trainings_are_refused_before_one_begins(
    self, fitted, data_root, tmp_path
  ):
    config, runs = _stand_in(data_root), tmp_path / 'runs'
    with pytest.raises(UserError, match=r'cross_fitted holds masks of .*, not of trainings in'):
      cross_fit(config, runs, data=data_root, out=fitted[0] / 'masks', folds=3)
    assert not runs.exists()

  def test_clips_that_training_leaves_out_get_no_masks(self, data_root, tmp_path):
    root = tmp_path / 'data'
    shutil.copytree(data_root, root)
    clip = read_index(root, 'train')[0]
    frame = pathlib.Path(clip.frame_path(0)).read_bytes()
    pathlib.Path(clip.frame_path(0)).write_bytes(b'no picture')
    config = _stand_in(str(root))
    config.data.on_bad_clip, config.data.max_bad_clips = 'skip', 1
    out = tmp_path / 'masks'
    run = functools.partial(cross_fit, config, tmp_path / 'runs', data=str(root), out=out, folds=2)
    assert run() == len(read_index(root, 'train')) - 1
    assert not (out / masks.CROSS_FITTED / clip.subset / clip.uid).exists()
    # Mended since, it has been seen by no training.
    pathlib.Path(clip.frame_path(0)).write_bytes(frame)
    assert run() == 1

  def test_training_compares_what_it_reads_of_them(self, fitted, stage1, data_root, tmp_path):
    folder, _, _ = fitted
    out = str(folder / 'masks')
    hand_over.write_masks(stage1, data=data_root, out=out)
    config = tiny.get_config('stage2')
    config.data.root, config.data.masks, config.prior.predicted = data_root, out, 0.5
    config_lib.check(config)
    clips = work_folder.read_clips(config, epath.Path(tmp_path))
    run = epath.Path(tmp_path / 'run')
    work_folder.claim_inputs(run, config, clips, None, None)
    assert set(json.loads((run / 'inputs.json').read_text())) == {
      'data.root', 'data.root/labels', 'train.init', 'data.masks', 'data.masks/cross_fitted',
      'versions',
    }  # fmt: skip
    clip = next(clip for clip in clips.train if clip.subset == 'v1m')
    root = str(folder / 'masks' / masks.CROSS_FITTED)
    before = np.stack([masks.read_mask(root, clip, t, 32) for t in range(5)])
    masks.write_clip_masks(root, clip, 255 - before)
    with pytest.raises(UserError, match=r'another content of config\.data\.masks/cross_fitted'):
      work_folder.claim_inputs(run, config, clips, None, 4)
    masks.write_clip_masks(root, clip, before)
    work_folder.claim_inputs(run, config, clips, None, 4)
    # A method that sees all frames reads the masks of those without a label as well.
    config.data.all_frames = True
    single = next(clip for clip in clips.train if clip.labelled_frames == (0,))
    path = epath.Path(masks.mask_path(root, single, 3))
    path.rename(run / 'away.png')
    with pytest.raises(UserError, match=r'3\.png is missing'):
      work_folder.claim_inputs(run, config, clips, None, None)
    (run / 'away.png').rename(path)
    config.prior.soft = True
    with pytest.raises(UserError, match=r'holds hard masks, but config\.prior\.soft is True'):
      work_folder.claim_inputs(run, config, clips, None, 4)


def test_parts_of_the_training_clips_do_not_depend_on_the_others(data_root, tiny_stage1, tmp_path):
  clips = read_index(data_root, 'train')
  assert {fold_of(clip, 3) for clip in clips} == {0, 1, 2}
  kept = []
  for k in range(3):
    tiny_stage1.data.leave_out = (k, 3)
    found = work_folder.read_clips(tiny_stage1, epath.Path(tmp_path)).train
    assert {fold_of(clip, 3) for clip in found} == {0, 1, 2} - {k}
    kept += [clip.uid for clip in found]
  assert sorted(kept) == sorted(2 * [clip.uid for clip in clips])
  tiny_stage1.data.subsets, tiny_stage1.data.leave_out = ('v2',), (0, 1)
  with pytest.raises(UserError, match=r'leave_out is \(0, 1\), and all training clips'):
    work_folder.read_clips(tiny_stage1, epath.Path(tmp_path))


def test_windows_of_one_video_are_in_one_part(data_root):
  clip = read_index(data_root, 'train')[0]
  windows = [
    dataclasses.replace(clip, subset=subset, uid=f'-a_b_{start}_{start + 5000}')
    for start in range(0, 50_000, 5000)
    for subset in ('v1s', 'v2')
  ]
  assert len({fold_of(window, 7) for window in windows}) == 1


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'data.leave_out': ()}, 'leave out part k'),
    ({'data.leave_out': (0.5, 3)}, 'leave out part k'),
    ({'data.leave_out': (3, 3)}, 'leave out part k'),
    ({'prior.predicted': 0.7, 'prior.none': 0.4}, 'more than all items'),
    ({'prior.predicted': 0.7, 'oracle_prior': True}, 'reads no masks'),
    ({'prior.moved': 1.5}, 'at most 1'),
  ],
)
def test_shares_that_cannot_be_are_refused(tiny_stage2, changes, words):
  tiny_stage2.update_from_flattened_dict(changes)
  with pytest.raises(UserError, match=words):
    config_lib.check(tiny_stage2)


def test_halves_of_a_clip_have_the_faults_of_the_whole(data_root):
  clip = next(clip for clip in read_index(data_root, 'train') if clip.subset == 'v2')
  task = dataclasses.replace(PLAIN, faults=Faults(missing=0.5, added=0.5, moved=0.2))
  whole, *halves = (
    load_training_item(clip, item, task, Lot(key=(7, 7)))['prior']
    for item in (Item(0, 0, 10), Item(0, 0, 5), Item(0, 5, 5))
  )
  np.testing.assert_array_equal(np.concatenate(halves), whole)


@pytest.mark.parametrize('name', ['aavs', 'tpavi', 'avsegformer'])
def test_a_prior_reaches_the_network_as_a_share(name):
  config = tiny.get_config('stage2') if name == 'aavs' else small_maps.get_config(f'{name}_stage2')
  levels = np.array([0, 128, 255], np.uint8)[:, None, None]
  batch = {
    'frames': np.zeros((3, 32, 32, 3), np.uint8), 'log_mel': np.zeros((3, 96, 64)),
    'prior': np.broadcast_to(levels, (3, 32, 32)),
  }  # fmt: skip
  given = []

  def watched(call, arguments, options, context):
    given.extend(x for x in arguments if getattr(x, 'shape', None) == (3, 32, 32))

  with nn.intercept_methods(watched):
    methods.of(config).apply(({name: {}, 'backbone': {}, 'vggish': {}}, {}), batch)
  (found,) = given
  np.testing.assert_allclose(found, batch['prior'] / 255, rtol=1e-6)


def test_masks_grow_and_shrink_and_go_either_way():
  ids = np.zeros((40, 40), np.uint8)
  ids[15:25, 15:25] = 3
  found = [disturb(ids, [], _rng(seed), Faults(moved=0.05)) > 0 for seed in range(20)]
  sizes = [mask.sum() for mask in found]
  assert min(sizes) < 100 < max(sizes)
  for axis in range(2):
    centres = [np.nonzero(mask)[axis].mean() for mask in found]
    assert min(centres) < 19.5 < max(centres)


def test_pixels_that_do_not_count_are_no_object_to_add():
  ids = np.zeros((40, 40), np.uint8)
  ids[38:] = IGNORE
  assert not disturb(np.zeros_like(ids), [ids], _rng(), Faults(added=1.0)).any()


def test_any_clip_that_fits_may_be_the_negative_sound(data_root):
  split = read_index(data_root, 'train')[:3]
  known = [({name}, {name}) for name in ('dog', 'cat', 'car')]
  heard = {listening.negative_sound(split, 0, known, _rng(seed)) for seed in range(40)}
  assert heard == {'silence', 'noise', *split[1:]}

"""Batches: what is in them, their order, and that evaluation sees every frame once."""

import itertools
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from aavs_jax import config as config_lib
from input_pipeline import avsbench, labels, masks, pipeline
from input_pipeline.errors import UserError


def _stream(clips, task, count, **changes):
  options = dict(item_frames=5, batch_items=2, seed=3, start=0, threads=1) | changes
  return list(itertools.islice(pipeline.training_batches(clips, task, **options), count))


def _same(a, b):
  return len(a) == len(b) and all(
    x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) for k in x) for x, y in zip(a, b)
  )


@pytest.fixture
def train_clips(data_root):
  return avsbench.read_index(data_root, 'train')


def test_the_stream_is_the_same_for_any_number_of_threads_and_from_any_start(
  tiny_stage1, train_clips
):
  task = config_lib.task_of(tiny_stage1)
  whole = _stream(train_clips, task, 12)
  assert _same(whole, _stream(train_clips, task, 12, threads=4))
  assert _same(whole[7:], _stream(train_clips, task, 5, start=7))
  assert not _same(whole, _stream(train_clips, task, 12, seed=4))


def test_processes_share_the_items_of_the_global_batch(tiny_stage1, train_clips):
  task = config_lib.task_of(tiny_stage1)
  alone = _stream(train_clips, task, 6)
  shares = [_stream(train_clips, task, 6, process=p, processes=2) for p in range(2)]
  for step, batch in enumerate(alone):
    together = np.concatenate([share[step]['frames'] for share in shares])
    assert np.array_equal(batch['frames'], together)


def test_an_epoch_takes_every_item_once(tiny_stage1, train_clips):
  items = len(pipeline.make_items(train_clips, 5))
  batches = _stream(train_clips, config_lib.task_of(tiny_stage1), items // 2)
  seen = np.concatenate([batch['clip'][::5] for batch in batches])
  expected = [2 if clip.subset == 'v2' else 1 for clip in train_clips]
  np.testing.assert_array_equal(np.bincount(seen), expected)


def test_v1s_training_repeats_its_labelled_frame_with_each_sound(tiny_stage1, train_clips):
  clip = next(clip for clip in train_clips if clip.subset == 'v1s')
  item = pipeline.Item(0, 0, 5)
  batch = pipeline.load_training_item(clip, item, config_lib.task_of(tiny_stage1))
  assert (batch['frames'] == batch['frames'][:1]).all()
  assert (batch['labels'] == batch['labels'][:1]).all()
  assert len(np.unique(batch['log_mel'][:, 0, 0])) == 5


def test_labels_classes_and_prior_agree_with_the_files(tiny_stage2, train_clips):
  task = config_lib.task_of(tiny_stage2)
  for index, clip in enumerate(train_clips):
    item = pipeline.Item(index, clip.num_frames - 5, 5)
    batch = pipeline.load_training_item(clip, item, task)
    for i in range(5):
      t = 0 if clip.subset == 'v1s' else item.first + i
      ids = labels.resize_ids(avsbench.load_label_ids(clip, t), task.image_size)
      assert np.array_equal(batch['labels'][i], ids)
      classes = batch['target_classes'][i]
      assert list(classes[classes >= 0]) == list(np.unique(ids))
      assert np.array_equal(batch['prior'][i] == 255, ids > 0)  # both 32x32 here
  binary = pipeline.Task(False, 32, 32, 2, False, '')
  batch = pipeline.load_training_item(train_clips[-1], pipeline.Item(0, 0, 5), binary)
  assert set(np.unique(batch['labels'])) <= {0, 1}


def test_more_label_values_than_targets_is_refused(train_clips):
  task = pipeline.Task(True, 32, 32, 1, False, '')
  with pytest.raises(UserError, match=r'labels_semantic.*max_targets is 1'):
    pipeline.load_training_item(train_clips[0], pipeline.Item(0, 0, 5), task)


@pytest.mark.parametrize('batch_items', [1, 3, 4])
@pytest.mark.parametrize('processes', [1, 2])
def test_evaluation_sees_every_frame_once(data_root, tiny_stage1, batch_items, processes):
  clips = avsbench.read_index(data_root, 'test')
  task = config_lib.task_of(tiny_stage1)
  load = lambda item: pipeline.load_eval_item(clips[item.clip], clips[item.clip], item, task)  # noqa: E731
  seen, lengths = [], []
  for process in range(processes):
    batches = list(
      pipeline.eval_batches(
        clips, load, batch_items=batch_items * processes, threads=1,
        process=process, processes=processes,
      )
    )  # fmt: skip
    lengths.append(len(batches))
    for batch in batches:
      assert len(batch['frames']) == batch_items * 5
      real = batch['weight'] > 0
      seen += list(zip(batch['clip'][real], batch['frame'][real]))
  assert len(set(lengths)) == 1
  expected = [(i, t) for i, clip in enumerate(clips) for t in range(clip.num_frames)]
  assert sorted(seen) == expected


def test_other_sounds_come_from_another_clip_of_the_subset(data_root):
  clips = avsbench.read_index(data_root, 'train')
  others = pipeline.other_sounds(clips)
  assert all(o.subset == c.subset and o.uid != c.uid for c, o in zip(clips, others))
  assert sorted(o.uid for o in others) == sorted(c.uid for c in clips)
  with pytest.raises(UserError, match='one clip'):
    pipeline.other_sounds([clip for clip in clips if clip.subset == 'v2'][:1])


def test_mixed_lengths_and_large_batches_are_refused(tiny_stage1, train_clips):
  task = config_lib.task_of(tiny_stage1)
  with pytest.raises(UserError, match='item_frames=5'):
    _stream(train_clips, task, 1, item_frames=0)
  with pytest.raises(UserError, match='batch_items=99'):
    _stream(train_clips, task, 1, batch_items=99)
  with pytest.raises(UserError, match='item_frames=3'):
    pipeline.make_items(train_clips, 3)


class TestMasks:
  @pytest.fixture
  def clip(self, data_root):
    return avsbench.read_index(data_root, 'test')[0]

  @pytest.fixture
  def written(self, clip, tmp_path):
    maps = np.zeros((5, 8, 8), np.uint8)
    maps[2, :4] = 255
    masks.write_clip_masks(str(tmp_path), clip, maps)
    return str(tmp_path), maps

  def test_come_back_as_written(self, clip, written):
    root, maps = written
    assert masks.is_complete(root, clip, 8)
    for t in range(5):
      assert np.array_equal(masks.read_mask(root, clip, t, 8), maps[t])

  @pytest.mark.parametrize(
    ('damage', 'words'),
    [
      (lambda path: path.unlink(), 'missing'),
      (lambda path: path.write_bytes(path.read_bytes()[:40]), 'not a readable PNG'),
      (lambda path: path.write_bytes(b''), 'not a readable PNG'),
      (lambda path: _resave(path, lambda m: m[:4]), '4x8, expected 8x8'),
      (lambda path: _resave(path, lambda m: m // 2), 'other than 0 and 255'),
    ],
  )
  def test_damage_is_named(self, clip, written, damage, words):
    root, _ = written
    path = pathlib.Path(masks.mask_path(root, clip, 2))
    damage(path)
    with pytest.raises(UserError, match=words) as error:
      masks.read_mask(root, clip, 2, 8)
    assert str(path) in str(error.value)
    assert not masks.is_complete(root, clip, 8)

  def test_a_failed_write_leaves_the_old_masks(self, clip, written):
    root, maps = written
    with pytest.raises(AttributeError):
      masks.write_clip_masks(root, clip, [maps[0], 'not an array'])
    assert masks.is_complete(root, clip, 8)
    assert os.listdir(os.path.join(root, clip.subset)) == [clip.uid]


def _resave(path, change):
  Image.fromarray(change(np.array(Image.open(path)))).save(path)

"""Batches: what is in them, their order, and that evaluation sees every frame once."""

import dataclasses
import functools
import itertools
import os
import pathlib
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from aavs_jax import config as config_lib
from aavs_jax.input_pipeline import avsbench, labels, listening, masks, pipeline
from aavs_jax.input_pipeline.bad_clips import find_bad_clips
from aavs_jax.input_pipeline.clips import IGNORE
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.input_pipeline.images import load_frame, load_label_ids
from aavs_jax.input_pipeline.index import read_index
from aavs_jax.input_pipeline.items import Item, Task, load_eval_item, load_training_item, make_items
from aavs_jax.input_pipeline.reader import load_log_mel


def _stream(clips, task, count, **changes):
  options = dict(item_frames=5, batch_items=2, seed=3, start=0, threads=1) | changes
  return list(itertools.islice(pipeline.training_batches(clips, task, **options), count))


def _same(a, b):
  return len(a) == len(b) and all(
    x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) for k in x) for x, y in zip(a, b)
  )


@pytest.fixture
def train_clips(data_root):
  return read_index(data_root, 'train')


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
  items = len(make_items(train_clips, 5))
  batches = _stream(train_clips, config_lib.task_of(tiny_stage1), items // 2)
  seen = np.concatenate([batch['clip'][::5] for batch in batches])
  expected = [2 if clip.subset == 'v2' else 1 for clip in train_clips]
  np.testing.assert_array_equal(np.bincount(seen), expected)


def test_frames_are_grouped_by_item(tiny_stage1, train_clips):
  task = config_lib.task_of(tiny_stage1)
  for process in range(2):
    batch = _stream(train_clips, task, 1, batch_items=4, process=process, processes=2)[0]
    assert batch['group'].tolist() == [process] * 5 + [2 + process] * 5
    assert (batch['group'] == batch['position'] // 5).all()
  lengths = set()
  for batch in _stream(train_clips, task, 10, item_frames=0, batch_items=1):
    lengths.add(len(batch['group']))
    assert not batch['group'].any() and len(set(batch['clip'])) == 1
    assert len(batch['group']) == train_clips[batch['clip'][0]].num_frames
  assert lengths == {5, 10}


@pytest.mark.parametrize('batch_items', [2, 3, 4])
def test_packed_batches_hold_whole_clips(tiny_stage2, train_clips, batch_items):
  task = config_lib.task_of(tiny_stage2)
  for batch in _stream(train_clips, task, 8, item_frames=0, batch_items=batch_items):
    assert batch['position'].tolist() == list(range(5 * batch_items))
    for group in np.unique(batch['group']):
      frames = np.flatnonzero(batch['group'] == group)
      assert frames[0] == 5 * group and (np.diff(frames) == 1).all()
      index = batch['clip'][frames[0]]
      clip = train_clips[index]
      item = Item(index, 0, clip.num_frames)
      alone = load_training_item(clip, item, task)
      full = len(frames) == clip.num_frames and batch['weight'][frames].all()
      assert full or (len(frames) == 5 and group == batch_items - 1)
      for name in alone:
        if full or name != 'weight':
          assert np.array_equal(batch[name][frames], alone[name][: len(frames)])
      assert full or not batch['weight'][frames].any()


def test_packed_batches_do_not_depend_on_start_threads_and_processes(tiny_stage1, train_clips):
  task = config_lib.task_of(tiny_stage1)
  packed = dict(item_frames=0, batch_items=4)
  whole = _stream(train_clips, task, 9, **packed)
  assert _same(whole[5:], _stream(train_clips, task, 4, start=5, threads=3, **packed))
  assert not _same(whole, _stream(train_clips, task, 9, seed=4, **packed))
  for processes in (2, 4):
    shares = [
      _stream(train_clips, task, 9, process=p, processes=processes, **packed)
      for p in range(processes)
    ]
    for batch, *parts in zip(whole, *shares):
      together = {name: np.concatenate([part[name] for part in parts]) for name in batch}
      order = np.argsort(together['position'])
      assert _same([batch], [{name: value[order] for name, value in together.items()}])


def test_clips_of_two_slots_alone_leave_one_of_an_odd_batch_without_weight(
  tiny_stage1, train_clips
):
  clips = [clip for clip in train_clips if clip.subset == 'v2']
  task = config_lib.task_of(tiny_stage1)
  assert pipeline.epoch_size(clips, 0, 3) == (len(clips), 15)
  for batch in _stream(clips, task, 3, item_frames=0, batch_items=3):
    assert batch['weight'].tolist() == [1] * 10 + [0] * 5
    assert batch['group'].tolist() == [0] * 10 + [2] * 5


def test_an_epoch_is_as_many_batches_as_its_clips_fill(train_clips):
  assert pipeline.epoch_size(train_clips, 5, 4) == (3.0, 20)
  assert pipeline.epoch_size(train_clips, 0, 4) == (3.0, 20)
  assert pipeline.epoch_size(train_clips, 0, 1) == (10.0, 5)
  assert pipeline.epoch_size(train_clips, 1, 8) == (7.5, 8)
  # Then what devices can share evenly is not told by the shortest of them.
  mixed = [dataclasses.replace(clip, num_frames=n) for clip, n in zip(train_clips, (4, 6, 8))]
  assert pipeline.epoch_size(mixed, 0, 1) == (3.0, 2)


def test_v1s_training_repeats_its_labelled_frame_with_each_sound(tiny_stage1, train_clips):
  clip = next(clip for clip in train_clips if clip.subset == 'v1s')
  item = Item(0, 0, 5)
  batch = load_training_item(clip, item, config_lib.task_of(tiny_stage1))
  assert (batch['frames'] == batch['frames'][:1]).all()
  assert (batch['labels'] == batch['labels'][:1]).all()
  assert len(np.unique(batch['log_mel'][:, 0, 0])) == 5


def test_labels_classes_and_prior_agree_with_the_files(tiny_stage2, train_clips):
  task = config_lib.task_of(tiny_stage2)
  for index, clip in enumerate(train_clips):
    item = Item(index, clip.num_frames - 5, 5)
    batch = load_training_item(clip, item, task)
    for i in range(5):
      t = 0 if clip.subset == 'v1s' else item.first + i
      ids = labels.resize_ids(load_label_ids(clip, t), task.image_size)
      assert np.array_equal(batch['labels'][i], ids)
      classes = batch['target_classes'][i]
      assert list(classes[classes >= 0]) == list(np.unique(ids))
      assert np.array_equal(batch['prior'][i] == 255, ids > 0)  # both 32x32 here
  binary = Task(False, 2, 32, 32, 2, False, '')
  batch = load_training_item(train_clips[-1], Item(0, 0, 5), binary)
  assert set(np.unique(batch['labels'])) <= {0, 1}


def test_all_frames_stand_for_themselves_where_that_is_asked_for(train_clips):
  clip = next(clip for clip in train_clips if clip.subset == 'v1s')
  task = Task(True, 71, 32, 32, 8, True, '', all_frames=True)
  batch = load_training_item(clip, Item(0, 0, 5), task)
  assert batch['weight'].tolist() == [1, 0, 0, 0, 0]
  for t in range(5):
    assert np.array_equal(batch['frames'][t], load_frame(clip, t, 32))
  for name in ('labels', 'prior'):
    assert batch[name][0].any() and not batch[name][1:].any()
  repeated = load_training_item(clip, Item(0, 0, 5), dataclasses.replace(task, all_frames=False))
  assert repeated['weight'].tolist() == [1] * 5
  assert np.array_equal(repeated['frames'][4], batch['frames'][0])


def test_more_label_values_than_targets_is_refused(train_clips):
  task = Task(True, 71, 32, 32, 1, False, '')
  with pytest.raises(UserError, match=r'labels_semantic.*max_targets is 1'):
    load_training_item(train_clips[0], Item(0, 0, 5), task)


@pytest.mark.parametrize('colours', [False, True])
def test_a_class_that_the_model_lacks_is_refused_by_name(train_clips, tmp_path, colours):
  clip = dataclasses.replace(train_clips[-1], root=str(tmp_path))
  shutil.copytree(train_clips[-1].folder, clip.folder)
  path = clip.label_ids_path(6)
  halves = np.where(np.arange(72) < 40, 70, IGNORE).astype(np.uint8)
  _resave(path, lambda ids: np.broadcast_to(halves[:, None], ids.shape))
  if colours:  # which are read where there are no ids
    os.remove(path)
    path = clip.label_rgb_path(6)
    Image.fromarray(np.broadcast_to(avsbench.PALETTE[70], (72, 96, 3))).save(path)
  item, lacking = Item(0, 5, 5), Task(True, 70, 32, 32, 4, False, '')
  words = f'{path} holds class id 70, config.num_classes is 70: set it to at least 71'
  for task in (lacking, dataclasses.replace(lacking, num_classes=71)):
    bad = find_bad_clips([clip], task, 1)
    assert [row['clip'] for row in bad] == ([f'v2/{clip.uid}'] if task is lacking else [])
    for load in (
      functools.partial(load_training_item, clip, item, task),
      functools.partial(load_eval_item, clip, clip, item, task),
    ):
      if task is lacking:
        assert bad[0]['text'].startswith(words)
        with pytest.raises(UserError, match=re.escape(words)):
          load()
      else:
        assert load()['weight'].all()


@pytest.mark.parametrize('batch_items', [1, 3, 4])
def test_evaluation_sees_every_frame_once(data_root, tiny_stage1, batch_items):
  clips = read_index(data_root, 'test')
  task = config_lib.task_of(tiny_stage1)
  load = lambda item: load_eval_item(clips[item.clip], clips[item.clip], item, task)  # noqa: E731
  seen = []
  for batch in pipeline.eval_batches(clips, load, batch_items=batch_items, threads=1):
    assert len(batch['frames']) == batch_items * 5
    real = batch['weight'] > 0
    seen += list(zip(batch['clip'][real], batch['frame'][real]))
  assert seen == [(i, t) for i, clip in enumerate(clips) for t in range(clip.num_frames)]
  assert not list(pipeline.eval_batches([], load, batch_items=batch_items, threads=1))


def test_large_batches_and_lengths_that_do_not_divide_a_clip_are_refused(tiny_stage1, train_clips):
  task = config_lib.task_of(tiny_stage1)
  for item_frames in (0, 5):
    with pytest.raises(UserError, match='batch_items=99'):
      _stream(train_clips, task, 1, batch_items=99, item_frames=item_frames)
    with pytest.raises(UserError, match='cannot be shared by 2 processes'):
      _stream(train_clips, task, 1, batch_items=3, item_frames=item_frames, processes=2)
  long = [dataclasses.replace(train_clips[0], num_frames=15)]
  with pytest.raises(UserError, match=r'batch_items is 2, slots of 5 frames, .* of 15: use 3 or'):
    _stream(long, task, 1, batch_items=2, item_frames=0)
  for item_frames in (3, 10):  # ten divides v2's clips, but no others
    for use in (_stream, lambda clips, _, __, **sizes: pipeline.epoch_size(clips, **sizes)):
      with pytest.raises(UserError, match=f'config.data.item_frames is {item_frames}'):
        use(train_clips, task, 1, item_frames=item_frames, batch_items=1)


def test_frames_without_a_label_do_not_count_in_evaluation(train_clips, tmp_path):
  clip = next(clip for clip in train_clips if clip.subset == 'v1s')
  for semantic in (False, True):
    task = Task(semantic, 71 if semantic else 2, 32, 32, 4, semantic, '')
    batch = load_eval_item(clip, clip, Item(0, 0, 5), task)
    assert batch['weight'].tolist() == [1, 0, 0, 0, 0]
    assert batch['target'][0].any() and not batch['target'][1:].any()
    assert batch['frame'].tolist() == [0, 1, 2, 3, 4]
    if semantic:
      assert batch['prior'][0].any() and not batch['prior'][1:].any()
    assert (batch['frames'][0] != batch['frames'][4]).any()  # and not the first one five times


def test_the_prior_of_evaluation_is_that_of_the_masks_or_the_truth(data_root, tmp_path):
  clip = read_index(data_root, 'test', ['v2'])[0]
  masks.write_clip_masks(str(tmp_path), clip, np.full((10, 24, 24), 255, np.uint8))
  item = Item(0, 5, 5)
  for folder in (str(tmp_path), ''):
    task = Task(True, 71, 32, 24, 4, True, folder)
    batch = load_eval_item(clip, clip, item, task)
    truth = np.stack([labels.resize_ids(load_label_ids(clip, t), 24) for t in range(5, 10)])
    assert np.array_equal(batch['target'], truth)
    assert (truth == 0).any() and (truth > 0).any()
    assert np.array_equal(batch['prior'], np.full_like(truth, 255) if folder else 255 * (truth > 0))


def test_evaluation_hears_the_clip_it_is_given_or_silence(data_root):
  clip, other = read_index(data_root, 'test', ['v1m'])
  task = Task(False, 2, 32, 32, 2, False, '')
  item = Item(0, 0, 5)
  sound = {c.uid: load_log_mel(c) for c in (clip, other)}
  assert not np.array_equal(sound[clip.uid], sound[other.uid])
  for c in (clip, other):
    heard = load_eval_item(clip, c, item, task)
    assert np.array_equal(heard['log_mel'], sound[c.uid])
    assert np.array_equal(heard['frames'][3], load_frame(clip, 3, 32))
  heard = load_eval_item(clip, 'silence', item, task)
  assert heard['log_mel'].shape == (5, 96, 64) and (heard['log_mel'] == listening.SILENCE).all()


@pytest.mark.parametrize('item_frames', [1, 5])
def test_only_a_clip_in_which_nothing_ever_sounds_has_no_weight(data_root, tmp_path, item_frames):
  clip = read_index(data_root, 'train', ['v1m'])[0]
  shutil.copytree(clip.folder, tmp_path / clip.subset / clip.uid)
  clip = dataclasses.replace(clip, root=str(tmp_path))

  def weights(task):
    items = make_items([clip], item_frames)
    parts = [load_training_item(clip, item, task) for item in items]
    return np.concatenate([part['weight'] for part in parts]).tolist()

  binary, semantic = (Task(s, 71 if s else 2, 32, 32, 4, False, '') for s in (False, True))
  for t in range(5):
    _resave(clip.label_ids_path(t), lambda ids: np.zeros_like(ids))
  assert weights(binary) == [0] * 5
  assert weights(semantic) == [1] * 5
  _resave(clip.label_ids_path(3), lambda ids: np.full_like(ids, 8))
  assert weights(binary) == [1] * 5


class TestMasks:
  @pytest.fixture
  def clip(self, data_root):
    return read_index(data_root, 'test')[0]

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
      (lambda path: _resave(path, lambda m: m[:4]), '8x4, expected 8x8'),
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

  def test_a_bit_that_is_not_as_written_is_found(self, clip, written):
    root, _ = written
    path = pathlib.Path(masks.mask_path(root, clip, 2))
    good = path.read_bytes()
    for i in range(len(good)):
      path.write_bytes(good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :])
      with pytest.raises(UserError, match='not a readable PNG'):
        masks.read_mask(root, clip, 2, 8)

  def test_a_failed_write_leaves_the_old_masks(self, clip, written):
    root, maps = written
    with pytest.raises(AttributeError):
      masks.write_clip_masks(root, clip, [maps[0], 'not an array'])
    assert masks.is_complete(root, clip, 8)
    assert os.listdir(os.path.join(root, clip.subset)) == [clip.uid]

  def test_a_folder_of_something_else_is_not_replaced(self, clip, written):
    root, maps = written
    note = pathlib.Path(root, clip.subset, clip.uid, 'audio.wav')
    note.write_bytes(b'sound')
    with pytest.raises(UserError, match=r'holds audio\.wav, which is no map'):
      masks.write_clip_masks(root, clip, 255 - maps)
    assert note.read_bytes() == b'sound'
    assert np.array_equal(masks.read_mask(root, clip, 2, 8), maps[2])
    note.unlink()
    masks.write_clip_masks(root, clip, 255 - maps)
    assert np.array_equal(masks.read_mask(root, clip, 2, 8), 255 - maps[2])


def _resave(path, change):
  Image.fromarray(change(np.array(Image.open(path)))).save(path)


def test_a_silent_clip_counts_for_methods_that_see_all_frames(data_root, tmp_path):
  clip = read_index(data_root, 'train', ['v1m'])[0]
  shutil.copytree(clip.folder, tmp_path / clip.subset / clip.uid)
  clip = dataclasses.replace(clip, root=str(tmp_path))
  for t in range(5):
    Image.fromarray(np.zeros((72, 96), np.uint8)).save(clip.label_ids_path(t))
  task = Task(False, 2, 32, 32, 2, False, '')
  for all_frames, weight in ((False, [0] * 5), (True, [1] * 5)):
    batch = load_training_item(
      clip, Item(0, 0, 5), dataclasses.replace(task, all_frames=all_frames)
    )
    assert batch['weight'].tolist() == weight


def test_pixels_that_do_not_count_stay_so_in_the_binary_task(data_root, tmp_path):
  clip = next(clip for clip in read_index(data_root, 'train') if clip.subset == 'v1m')
  shutil.copytree(clip.folder, tmp_path / clip.subset / clip.uid)
  clip = dataclasses.replace(clip, root=str(tmp_path))
  ids = np.zeros((72, 96), np.uint8)
  ids[:24], ids[48:] = 8, IGNORE
  Image.fromarray(ids).save(clip.label_ids_path(2))
  batch = load_training_item(clip, Item(0, 0, 5), Task(False, 2, 32, 32, 2, False, ''))
  assert np.unique(batch['labels'][2]).tolist() == [0, 1, IGNORE]
  assert batch['target_classes'][2].tolist() == [0, 1]

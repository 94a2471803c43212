"""The AVSBench-object layout: a small set written path by path, read, and then damaged."""

import dataclasses
import json
import os
import pathlib
import pickle
import shutil

import numpy as np
import pytest
import soundfile
from PIL import Image

from aavs_jax import cli
from aavs_jax.input_pipeline import audio, avsbench_object, check, labels, pipeline
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.input_pipeline.images import (
  load_frame,
  load_label_ids,
  load_label_rgb,
  read_image,
  read_mask,
)
from aavs_jax.input_pipeline.index import read_index
from aavs_jax.input_pipeline.items import Item, Task, load_eval_item, load_training_item
from aavs_jax.input_pipeline.reader import load_log_mel
from aavs_jax.train import train
from tests import tiny

S4 = [  # name, category, split
  ('-aldtLqTVYI_1000_6000', 'horse_clip-clop', 'train'),
  ('_b0', 'dog_barking', 'test'),
  ('-b0', 'dog_barking', 'val'),
]
MS3 = [('--x_1', 'train'), ('_b0', 'test')]  # video_id, split; _b0 is also a name in S4


def frame_pixels(t):
  grid = np.mgrid[0:32, 0:32].transpose(1, 2, 0)
  return np.concatenate([grid * 5, np.full((32, 32, 1), 20 * t)], -1).astype(np.uint8)


def mask_pixels(t):
  """What sounds, 0 or 1; frame t has 40 + t pixels of it."""
  mask = np.zeros((32, 32), np.uint8)
  mask[5:13, 8:13] = 1
  mask[20, :t] = 1
  return mask


def save(path, pixels):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(pixels).save(path)


def write_sound(path, seed):
  path.parent.mkdir(parents=True, exist_ok=True)
  noise = np.random.default_rng(seed).normal(0, 0.1, 80000)
  soundfile.write(path, noise, 16000, subtype='PCM_16')


def write_s4(root, rows=S4):
  data = root / 's4_data'
  for seed, (name, category, split) in enumerate(rows):
    for t in range(1, 6):
      place = pathlib.Path(split, category, name, f'{name}_{t}.png')
      save(data / 'visual_frames' / place, frame_pixels(t))
      if split != 'train' or t == 1:
        save(data / 'gt_masks' / place, mask_pixels(t) * 255)
    write_sound(data / 'audio_wav' / split / category / f'{name}.wav', seed)
  lines = [f'{name},{seed},{category},{split}' for seed, (name, category, split) in enumerate(rows)]
  (root / 's4_meta_data.csv').write_text('\n'.join(['name,start,category,split', *lines]))


def write_ms3(root, rows=MS3):
  data = root / 'ms3_data'
  for seed, (name, split) in enumerate(rows):
    for t in range(1, 6):
      save(data / 'visual_frames' / name / f'{name}.mp4_{t}.png', frame_pixels(t))
      save(data / 'gt_masks' / split / name / f'{name}_{t}.png', mask_pixels(t) * 255)
    write_sound(data / 'audio_wav' / split / f'{name}.wav', 10 + seed)
  lines = [f'{name},{split}' for name, split in rows]
  (root / 'ms3_meta_data.csv').write_text('\n'.join(['video_id,split', *lines]))


@pytest.fixture
def root(tmp_path):
  write_s4(tmp_path)
  write_ms3(tmp_path)
  return tmp_path


def rows_of(clips):
  return [
    (clip.uid, clip.subset, clip.split, clip.num_frames, clip.data_set.label_kind) for clip in clips
  ]


ROWS = [(name, 'v1s', split, 5, 'binary') for name, _, split in S4]
ROWS += [(name, 'v1m', split, 5, 'binary') for name, split in MS3]


def index_error(root, *found, **arguments):
  with pytest.raises(UserError) as caught:
    read_index(root, **arguments)
  message = str(caught.value)
  for part in found:
    assert str(part) in message, message
  assert '\n' not in message


# The index


def test_both_tables_are_one_index(root):
  assert rows_of(read_index(root)) == ROWS
  assert rows_of(read_index(root, 'test')) == [ROWS[1], ROWS[4]]
  assert rows_of(read_index(root, 'train', ('v1m', 'v2'))) == [ROWS[3]]


def test_either_table_alone_is_an_index(tmp_path):
  write_s4(tmp_path / 'one')
  write_ms3(tmp_path / 'two')
  assert rows_of(read_index(tmp_path / 'one')) == ROWS[:3]
  assert rows_of(read_index(tmp_path / 'two')) == ROWS[3:]
  index_error(tmp_path / 'two', tmp_path / 'two' / 'ms3_meta_data.csv', 'v1s', subsets=['v1s'])


def test_the_folders_in_which_it_is_distributed(tmp_path):
  write_s4(tmp_path / 'Single-source')
  write_ms3(tmp_path / 'Multi-sources')
  clips = read_index(tmp_path)
  assert rows_of(clips) == ROWS
  for clip in clips:
    assert load_log_mel(clip).shape == (5, 96, 64)
  write_s4(tmp_path / 'copy')
  index_error(tmp_path, tmp_path / 'copy', tmp_path / 'Single-source', 'twice')
  write_s4(tmp_path)  # what is named itself comes first
  assert {clip.root for clip in read_index(tmp_path, subsets=['v1s'])} == {str(tmp_path)}


def test_two_layouts_in_one_folder(root):
  (root / 'metadata.csv').write_text('uid,label,split\na,v2,val\n')
  index_error(root, root, 'metadata.csv', 'AVSBench-object')


def test_a_semantic_set_may_have_the_other_in_a_folder(root, tmp_path):
  for copy in ('Single-source', 'copy'):
    shutil.copytree(root / 's4_data', tmp_path / 'set' / copy / 's4_data')
    shutil.copy(root / 's4_meta_data.csv', tmp_path / 'set' / copy)
  (tmp_path / 'set' / 'metadata.csv').write_text('uid,label,split\na,v2,val\n')
  assert [clip.uid for clip in read_index(tmp_path / 'set')] == ['a']


def test_neither_layout(tmp_path):
  index_error(tmp_path, tmp_path, 'metadata.csv', 's4_meta_data.csv', 'ms3_meta_data.csv')


def test_columns_in_another_order_and_a_spreadsheets_quirks(root):
  lines = ['split,extra,category,name']
  lines += [f'{split},"a, b",{category},{name}' for name, category, split in S4]
  text = '\ufeff' + '\r\n'.join(lines) + '\r\n'
  (root / 's4_meta_data.csv').write_bytes(text.encode())
  assert rows_of(read_index(root)) == ROWS


def test_the_first_column_is_the_name_whatever_it_is_called(root):
  for table, name in (('s4_meta_data.csv', 'name'), ('ms3_meta_data.csv', 'video_id')):
    path = root / table
    path.write_text(path.read_text().replace(name, 'vid', 1))
  assert rows_of(read_index(root)) == ROWS


@pytest.mark.parametrize(
  'table, row, found',
  [
    ('s4', '../../x,0,dog_barking,test', "name is '../../x'"),
    ('s4', 'x,0,..,test', "category is '..'"),
    ('s4', 'x,0,a/b,test', "category is 'a/b'"),
    ('s4', 'x,0,dog_barking,dev', "split is 'dev'"),
    ('s4', '_b0,0,cat_meowing,val', "'_b0' of v1s stands in line 3"),
    ('s4', 'x,0,dog_barking', "ends before column 'split'"),
    ('ms3', '/etc,test', "video_id is '/etc'"),
    ('ms3', '_b0,val', "'_b0' of v1m stands in line 3"),
  ],
)
def test_bad_row(root, table, row, found):
  path = root / f'{table}_meta_data.csv'
  line = path.read_text().count('\n') + 2
  path.write_text(f'{path.read_text()}\n{row}\n')
  index_error(root, path, f'line {line}', found)


@pytest.mark.parametrize('column', ['category', 'split'])
def test_missing_column(root, column):
  path = root / 's4_meta_data.csv'
  path.write_text(path.read_text().replace(column, 'other', 1))
  index_error(root, path, 'line 1', repr(column))


# Frames, labels, sound


def test_frames_labels_and_sound_are_those_on_disk(root):
  for index, clip in enumerate(read_index(root)):
    assert clip.labelled_frames == ((0,) if index == 0 else (0, 1, 2, 3, 4))
    for t in range(5):
      np.testing.assert_array_equal(load_frame(clip, t, 32), frame_pixels(t + 1))
    for t in clip.labelled_frames:
      ids = load_label_ids(clip, t)
      np.testing.assert_array_equal(ids, mask_pixels(t + 1))
      assert ids.dtype == np.uint8
      rgb = load_label_rgb(clip, t)
      np.testing.assert_array_equal(rgb, np.stack([mask_pixels(t + 1) * 255] * 3, -1))
      assert rgb.dtype == np.uint8
    seed = index if index < 3 else 7 + index
    noise = np.random.default_rng(seed).normal(0, 0.1, 80000)
    pcm = np.round(noise * 32767) / 32768
    want = audio.log_mel_examples(pcm.astype(np.float32))
    np.testing.assert_allclose(load_log_mel(clip), want, atol=2e-2)


@pytest.fixture
def clip(root):
  return read_index(root, 'test', ['v1m'])[0]


def grey(top):
  return Image.fromarray(mask_pixels(1) * np.uint8(top))


@pytest.mark.parametrize(
  'image',
  [
    grey(1),
    grey(255),
    grey(255).convert('1'),
    grey(255).convert('RGB'),
    grey(255).convert('RGBA'),
    Image.merge('RGB', [grey(0), grey(128), grey(0)]),
    grey(38).convert('P'),
  ],
  ids=['0 1', '0 255', 'one bit', 'colour', 'alpha', 'green', 'palette'],
)
def test_masks_in_other_guises(clip, image):
  image.save(clip.label_ids_path(0))
  np.testing.assert_array_equal(load_label_ids(clip, 0), mask_pixels(1))
  assert read_mask(clip.label_ids_path(0))[1] == 0


def test_soft_edges_sound_and_are_counted(clip):
  pixels = mask_pixels(1) * np.uint8(255)
  pixels[25, 3:9] = (1, 50, 127, 128, 200, 254)
  save(pathlib.Path(clip.label_ids_path(0)), pixels)
  ids, doubtful = read_mask(clip.label_ids_path(0))
  assert doubtful == 6
  np.testing.assert_array_equal(ids, pixels > 0)


def test_a_picture_is_no_mask(clip):
  shutil.copy(clip.frame_path(0), clip.label_ids_path(0))
  with pytest.raises(UserError, match=r'_b0_1\.png: 9\d\d of 1024 pixels .*no binary mask'):
    load_label_ids(clip, 0)


@pytest.mark.parametrize('what', ['frame_path', 'label_ids_path'])
def test_missing_files(clip, what):
  path = getattr(clip, what)(3)
  os.remove(path)
  load = load_label_ids if what == 'label_ids_path' else read_image
  with pytest.raises(UserError, match='No such file') as caught:
    load(clip, 3) if what == 'label_ids_path' else load(path)
  assert path in str(caught.value)


class _Trap:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return pathlib.Path.touch, (self.path,)


def test_pickles_are_not_read(root, tmp_path):
  sprung = tmp_path / 'sprung'
  places = [root / f's4_data/audio_log_mel/{s}/{c}/{n}.pkl' for n, c, s in S4]
  places += [root / f'ms3_data/audio_log_mel/{s}/{n}.pkl' for n, s in MS3]
  for path in places:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(_Trap(sprung)))
  assert check.check_data(root)['ok']
  task = Task(False, 2, 32, 32, 2, False, '')
  for index, clip in enumerate(read_index(root)):
    load_training_item(clip, Item(index, 0, 5), task)
  assert not sprung.exists()
  pickle.loads(places[0].read_bytes())
  assert sprung.exists()  # the trap works


# What the pipeline makes of it


def test_training_and_evaluation_items(root):
  task = Task(False, 2, 32, 64, 2, True, '')
  clip = read_index(root, 'test', ['v1s'])[0]
  item = Item(0, 0, 5)
  training = load_training_item(clip, item, task)
  evaluation = load_eval_item(clip, clip, item, task)
  dilated = load_eval_item(clip, clip, item, dataclasses.replace(task, dilated=True))
  for t in range(5):
    np.testing.assert_array_equal(training['labels'][t], mask_pixels(t + 1))
    assert training['target_classes'][t].tolist() == [0, 1]
    twice = mask_pixels(t + 1).repeat(2, 0).repeat(2, 1)
    np.testing.assert_array_equal(training['prior'][t], twice * 255)
    np.testing.assert_array_equal(evaluation['target'][t], twice)
    # As in the other layout AAVS's truth is resized softly, so it is dilated a little.
    assert (dilated['target'][t] >= twice).all()
    colours = np.stack([mask_pixels(t + 1) * np.uint8(255)] * 3, -1)
    want = labels.binary_metric_target(colours, 64)
    np.testing.assert_array_equal(dilated['target'][t], want)
    assert (evaluation['ids'][t] == twice).all() and (dilated['ids'][t] == twice).all()
  assert evaluation['weight'].tolist() == [1] * 5


def test_the_semantic_task_is_refused(root):
  clips = read_index(root, 'test')
  task = Task(True, 71, 32, 32, 4, False, '')
  options = dict(item_frames=5, batch_items=1, seed=0, start=0, threads=1)
  for read in (
    lambda: pipeline.training_batches(clips, task, **options),
    lambda: load_eval_item(clips[0], clips[0], Item(0, 0, 5), task),
  ):
    with pytest.raises(UserError) as caught:
      read()
    message = str(caught.value)
    assert str(root / 's4_meta_data.csv') in message and "task 'binary'" in message
    assert '\n' not in message
  binary = Task(False, 2, 32, 32, 2, False, '')
  assert next(pipeline.training_batches(clips, binary, **options))['frames'].shape == (5, 32, 32, 3)


def test_training_on_classes_is_refused_before_it_begins(root, tmp_path):
  write_ms3(root, [*MS3, ('v', 'val')])
  config = tiny.get_config('stage2')
  config.use_prior = False
  config.data.root = str(root)
  with pytest.raises(UserError, match=r's4_meta_data\.csv: .*not as what.*binary'):
    train(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


# check_data


def kinds(report, part):
  return [(row['kind'], row['clip']) for row in report[part] if row['kind'] != 'clip counts']


def text_of(report, kind):
  (text,) = [f['text'] for f in (*report['problems'], *report['notes']) if f['kind'] == kind]
  return text


def test_check_of_a_clean_set(root):
  report = check.check_data(root)
  assert report['ok'] and report['layout'] == 'AVSBench-object'
  assert kinds(report, 'notes') == []
  counts = {(row['subset'], row['split']): row for row in report['counts']}
  heads = ('clips', 'published', 'frames', 'gt_masks')
  assert [counts['v1s', 'train'][key] for key in heads] == [1, 3452, 5, 1]
  assert [counts['v1s', 'val'][key] for key in heads] == [1, 740, 5, 5]
  assert [counts['v1m', 'test'][key] for key in heads] == [1, 64, 5, 5]
  assert report['image_sizes'] == [{'width': 32, 'height': 32, 'frames': 25}]
  assert report['classes'] == [
    {'id': 0, 'name': 'background', 'train': 6, 'val': 5, 'test': 10},
    {'id': 1, 'name': 'sounding', 'train': 6, 'val': 5, 'test': 10},
  ]
  text = check.format_check(report)
  assert str(root) in text and 'AVSBench-object' in text and 'sounding' in text


def test_check_finds_every_fault_and_nothing_else(root):
  first, second, third, fourth, fifth = read_index(root)
  save(pathlib.Path(first.label_ids_path(0)), mask_pixels(1)[:, :16] * 255)
  edges = mask_pixels(1) * np.uint8(255)
  edges[25, 3:9] = 77
  save(pathlib.Path(second.label_ids_path(0)), edges)
  shutil.copy(second.frame_path(1), second.label_ids_path(1))  # a picture in its place
  for t in range(5):
    speck = np.zeros((32, 32), np.uint8)
    speck[3, 3] = 255
    save(pathlib.Path(third.label_ids_path(t)), speck)
  shutil.rmtree(fourth.folder)
  os.remove(fifth.audio_path)
  short = np.zeros(audio.samples_needed(5) - 1, np.int16)
  soundfile.write(third.audio_path, short, 16000)
  stray = pathlib.Path(second.folder).with_name('nobody')
  stray.mkdir()
  report = check.check_data(root)
  assert kinds(report, 'problems') == [
    ('unreadable file', 'v1s/_b0'),
    ('missing folder', 'v1m/--x_1'),
    ('missing file', 'v1m/_b0'),
  ]
  assert kinds(report, 'notes') == [
    ('label size', 'v1s/-aldtLqTVYI_1000_6000'),
    ('unknown colours', 'v1s/_b0'),
    ('stray specks', 'v1s/-b0'),
    ('short sound', 'v1s/-b0'),
    ('unlisted folder', 'v1s/nobody'),
  ]
  name = first.uid
  assert f'{name}/{name}_1.png is 16x32 and its frame 32x32' in text_of(report, 'label size')
  assert '6 pixels in 1 labels' in text_of(report, 'unknown colours')
  assert report['unknown_colours'] == {'pixels': 6, 'clips': 1}
  assert 'class 1 (sounding) occurs only as 5 regions' in text_of(report, 'stray specks')
  assert 'ms3_meta_data.csv names it' in text_of(report, 'missing folder')
  assert fifth.audio_path in text_of(report, 'missing file')
  assert 's4_meta_data.csv' in text_of(report, 'unlisted folder')


def test_check_finds_the_same_clip_in_two_splits(root):
  _, test, val, *_ = read_index(root)
  shutil.copy(test.audio_path, val.audio_path)  # their frames are the same
  report = check.check_data(root)
  assert kinds(report, 'problems') == [('duplicate across splits', 'v1s/_b0')]
  assert 'v1s/-b0 (val)' in text_of(report, 'duplicate across splits')


@pytest.mark.parametrize('subset, name', [('v1s', 's4'), ('v1m', 'ms3')])
def test_check_compares_with_the_published_numbers(tmp_path, subset, name):
  published = {'v1s': (3452, 740, 740), 'v1m': (296, 64, 64)}[subset]
  lines = ['name,category,split' if name == 's4' else 'video_id,split']
  for split, number in zip(('train', 'val', 'test'), published):
    category = 'c,' if name == 's4' else ''
    lines += [f'{split}{i},{category}{split}' for i in range(number)]
  path = tmp_path / f'{name}_meta_data.csv'
  path.write_text('\n'.join(lines))
  report = check.check_data(tmp_path)
  assert [row['clips'] for row in report['counts']] == list(published)
  assert [row['published'] for row in report['counts']] == list(published)
  assert report['notes'] == []


def test_check_notes_other_numbers(root):
  note = text_of(check.check_data(root), 'clip counts')
  assert '1 of 3452 in v1s train' in note and '0 of 64 in v1m val' in note


def test_compose_and_check_data_on_the_command_line(tmp_path, capsys):
  root, report = tmp_path / 'set', tmp_path / 'check.json'
  few = ['--train', '2,1,3', '--val', '1,1,1', '--test', '1,1,1', '--size', '64x48']
  assert cli.main(['compose', str(root), *few, '--classes', '3', '--layout', 'object']) == 0
  assert '7 clips' in capsys.readouterr().out
  assert cli.main(['check-data', str(root), '--json', str(report)]) == 0
  assert 'AVSBench-object' in capsys.readouterr().out
  assert json.loads(report.read_text())['layout'] == 'AVSBench-object'
  next(root.glob('ms3_data/audio_wav/*/*.wav')).unlink()
  assert cli.main(['check-data', str(root)]) == 1


def test_names_of_the_tables():
  assert avsbench_object.table_path('R', 'v1s') == os.path.join('R', 's4_meta_data.csv')
  assert avsbench_object.ObjectClip.find_tables('/nowhere/at/all') == []

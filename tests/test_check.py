"""check_data on a composed set: a clean copy, and one with a fault of each kind planted."""

import concurrent.futures
import functools
import json
import os
import shutil

import numpy as np
import pytest
import soundfile
from PIL import Image

from aavs_jax.input_pipeline import audio, avsbench, check
from aavs_jax.input_pipeline.compose.dataset import compose
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.input_pipeline.index import read_index

CLIPS = {
  'train': {'v1s': 3, 'v1m': 3, 'v2': 1},
  'val': {'v1m': 2},
  'test': {'v1s': 3, 'v2': 1},
}


@pytest.fixture(scope='module')
def clean(tmp_path_factory):
  root = tmp_path_factory.mktemp('clean') / 'set'
  return compose(root, clips=CLIPS, num_classes=4, size=(64, 48))


@pytest.fixture
def root(clean, tmp_path):
  return shutil.copytree(clean, tmp_path / 'set')


def clips_of(root, subset, split):
  return read_index(root, split, (subset,))


def name(clip):
  return f'{clip.subset}/{clip.uid}'


def found(report, part):
  """What was found apart from the numbers of clips, which no composed set has."""
  return {
    (finding['kind'], finding['clip'])
    for finding in report[part]
    if finding['kind'] != 'clip counts'
  }


def text_of(report, kind):
  texts = [f['text'] for f in (*report['problems'], *report['notes']) if f['kind'] == kind]
  assert len(texts) == 1, texts
  assert '\n' not in texts[0]
  return texts[0]


def edit_image(path, edit):
  pixels = np.array(Image.open(path))
  edit(pixels)
  Image.fromarray(pixels).save(path)


def cut(path, length):
  with open(path, 'r+b') as file:
    file.truncate(length)


def write_sound(path, samples, rate=16000):
  waveform = np.random.default_rng(samples).normal(0, 0.1, samples)
  soundfile.write(path, waveform, rate, subtype='PCM_16')


# A clean set


def test_clean_set_is_ok(clean):
  steps = []
  report = check.check_data(clean, progress=lambda *step: steps.append(step))
  assert report['ok'] is True
  assert report['problems'] == []
  assert found(report, 'notes') == set()
  assert steps == [(done, 13) for done in range(1, 14)]
  assert json.loads(json.dumps(report)) == report

  counts = {(row['subset'], row['split']): row for row in report['counts']}
  assert list(counts)[:4] == [('v1s', 'train'), ('v1s', 'val'), ('v1s', 'test'), ('v1m', 'train')]
  numbers = ('clips', 'published', 'frames', 'labels_semantic', 'labels_rgb')
  assert [counts['v1s', 'train'][key] for key in numbers] == [3, 3452, 15, 3, 3]
  assert [counts['v1s', 'test'][key] for key in numbers] == [3, 740, 15, 15, 15]
  assert [counts['v1m', 'val'][key] for key in numbers] == [2, 64, 10, 10, 10]
  assert [counts['v2', 'test'][key] for key in numbers] == [1, 750, 10, 10, 10]
  assert [counts['v2', 'val'][key] for key in numbers] == [0, 500, 0, 0, 0]
  assert report['image_sizes'] == [{'width': 64, 'height': 48, 'frames': 75}]
  assert report['other_sizes'] == 0
  assert report['unknown_colours'] == {'pixels': 0, 'clips': 0}
  assert '3 of 3452 in v1s train' in text_of(report, 'clip counts')


def test_classes_count_labelled_frames(clean):
  want = np.zeros((len(avsbench.CLASSES), 3), int)
  for clip in read_index(clean):
    for t in clip.labelled_frames:
      with Image.open(clip.label_ids_path(t)) as image:
        for class_id in set(image.tobytes()):
          want[class_id, ('train', 'val', 'test').index(clip.split)] += 1
  report = check.check_data(clean)
  assert [(r['id'], r['name']) for r in report['classes']] == list(enumerate(avsbench.CLASSES))
  got = [[row['train'], row['val'], row['test']] for row in report['classes']]
  np.testing.assert_array_equal(got, want)


def test_the_number_of_threads_changes_nothing(root, monkeypatch):
  for clip in clips_of(root, 'v1m', 'train'):
    cut(clip.frame_path(1), 200)
  report = check.check_data(root)
  one_thread = functools.partial(concurrent.futures.ThreadPoolExecutor, 1)
  monkeypatch.setattr(concurrent.futures, 'ThreadPoolExecutor', one_thread)
  assert check.check_data(root) == report


# Faults


def test_every_fault_is_found_and_nothing_else(root):
  single_train, single_test = clips_of(root, 'v1s', 'train'), clips_of(root, 'v1s', 'test')
  multi, multi_val = clips_of(root, 'v1m', 'train'), clips_of(root, 'v1m', 'val')
  (long,), (long_test,) = clips_of(root, 'v2', 'train'), clips_of(root, 'v2', 'test')
  problems, notes = set(), set()

  def expect(part, kind, clip):
    part.add((kind, name(clip)))

  shutil.rmtree(single_train[0].folder)
  expect(problems, 'missing folder', single_train[0])

  # Twins in other splits; clips that share only the picture or only the sound are none.
  for original, twin in ((single_train[1], single_test[0]), (single_train[2], single_test[1])):
    shutil.copy(original.frame_path(0), twin.frame_path(0))
    shutil.copy(original.audio_path, twin.audio_path)
  write_sound(single_test[1].audio_path, 5 * 16000)
  shutil.copy(single_test[1].audio_path, multi[0].audio_path)
  expect(problems, 'duplicate across splits', single_train[1])

  cut(single_test[2].frame_path(3), 400)
  cut(single_test[2].label_rgb_path(2), 100)
  expect(problems, 'unreadable file', single_test[2])

  os.remove(multi[0].frame_path(4))
  expect(problems, 'missing file', multi[0])
  cut(multi[1].audio_path, 100_000)
  expect(problems, 'truncated file', multi[1])
  write_sound(multi[2].audio_path, audio.samples_needed(1) - 1)
  expect(problems, 'sound too short', multi[2])

  write_sound(multi_val[0].audio_path, audio.samples_needed(5) - 1)
  expect(notes, 'short sound', multi_val[0])
  edit_image(multi_val[1].label_rgb_path(0), lambda rgb: rgb[:25].fill(77))  # 25 of 48 rows
  edit_image(multi_val[1].label_rgb_path(1), lambda rgb: rgb[:2, :50].fill(77))
  expect(problems, 'wrong palette', multi_val[1])
  expect(notes, 'unknown colours', multi_val[1])

  def two_specks(ids):
    ids[0, 0] = ids[47, 63] = 55

  edit_image(long.label_ids_path(7), two_specks)
  expect(notes, 'stray specks', long)
  for folder in ('labels_semantic', 'labels_rgb'):
    path = f'{long_test.folder}/{folder}/9.png'
    Image.open(path).resize((32, 24), Image.Resampling.NEAREST).save(path)
  expect(notes, 'label size', long_test)
  (root / 'v1m' / '_nobody').mkdir()
  notes.add(('unlisted folder', 'v1m/_nobody'))

  report = check.check_data(root)
  assert report['ok'] is False
  assert found(report, 'problems') == problems
  assert found(report, 'notes') == notes

  assert single_train[0].folder in text_of(report, 'missing folder')
  twins = text_of(report, 'duplicate across splits')
  assert f'{name(single_train[1])} (train)' in twins
  assert f'{name(single_test[0])} (test)' in twins
  assert multi[0].frame_path(4) in text_of(report, 'missing file')
  unreadable = [f['text'] for f in report['problems'] if f['kind'] == 'unreadable file']
  assert [text.split(':')[0] for text in unreadable] == [
    single_test[2].frame_path(3),
    single_test[2].label_rgb_path(2),
  ]
  assert f'{multi[1].audio_path} ends 60044 bytes before' in text_of(report, 'truncated file')
  assert multi[2].audio_path in text_of(report, 'sound too short')
  assert multi_val[0].audio_path in text_of(report, 'short sound')
  wrong = f'{multi_val[1].label_rgb_path(0)}: 1600 of 3072 pixels'
  assert wrong in text_of(report, 'wrong palette')
  assert '100 pixels in 1 labels' in text_of(report, 'unknown colours')
  assert report['unknown_colours'] == {'pixels': 1700, 'clips': 1}
  assert 'class 55 (squirrel) occurs only as 2 regions' in text_of(report, 'stray specks')
  assert report['classes'][55]['train'] == 1
  off_size = text_of(report, 'label size')
  assert 'labels_semantic/9.png is 32x24 and its frame 64x48' in off_size
  assert '1 more' in off_size

  counts = {(row['subset'], row['split']): row for row in report['counts']}
  assert (counts['v1s', 'train']['clips'], counts['v1s', 'train']['frames']) == (3, 10)
  assert counts['v1s', 'test']['frames'] == 14
  assert counts['v1s', 'test']['labels_rgb'] == 14
  assert counts['v1s', 'test']['labels_semantic'] == 15

  text = check.format_check(report)
  for finding in (*report['problems'], *report['notes']):
    assert finding['text'] in text
  assert f'problems: {len(report["problems"])}\n' in text


@pytest.mark.parametrize('absent', ['labels_semantic', 'labels_rgb'])
def test_one_kind_of_label_is_enough(root, clean, absent):
  for clip in read_index(root):
    shutil.rmtree(f'{clip.folder}/{absent}')
  report, whole = check.check_data(root), check.check_data(clean)
  assert report['ok']
  assert found(report, 'notes') == set()
  assert report['classes'] == whole['classes']
  assert sum(row[absent] for row in report['counts']) == 0


def test_a_label_of_neither_kind_is_missing(root):
  clip = clips_of(root, 'v1s', 'train')[0]
  shutil.rmtree(f'{clip.folder}/labels_semantic')
  shutil.rmtree(f'{clip.folder}/labels_rgb')
  report = check.check_data(root)
  assert found(report, 'problems') == {('missing file', name(clip))}
  text = text_of(report, 'missing file')
  assert clip.label_ids_path(0) in text
  assert clip.label_rgb_path(0) in text


def test_ids_of_no_class_are_a_problem(root):
  clip = clips_of(root, 'v1m', 'train')[0]
  edit_image(clip.label_ids_path(2), lambda ids: ids[:9].fill(71))
  report = check.check_data(root)
  assert found(report, 'problems') == {('unreadable file', name(clip))}
  assert 'class id 71' in text_of(report, 'unreadable file')


def test_labels_that_show_no_class_are_a_problem(root):
  """As where what sounds is 255, which means ignored."""
  for clip in read_index(root, 'train'):
    for t in clip.labelled_frames:
      ids = np.array(Image.open(clip.label_ids_path(t)))
      Image.fromarray(np.where(ids > 0, 255, 0).astype(np.uint8)).save(clip.label_ids_path(t))
      os.remove(clip.label_rgb_path(t))
  (problem,) = check.check_data(root)['problems']
  assert problem['kind'] == 'no targets' and 'no label of train' in problem['text']


def test_a_small_region_beside_a_large_one_of_its_class_is_no_speck(root):
  clip = clips_of(root, 'v1m', 'train')[0]

  # In another frame, before and after: the clip as a whole decides.
  def plant(ids):
    ids[0, 0] = 55

  edit_image(clip.label_ids_path(0), plant)
  edit_image(clip.label_ids_path(2), lambda ids: ids[:9, :9].fill(55))
  edit_image(clip.label_ids_path(4), plant)
  assert found(check.check_data(root), 'notes') == set()


def test_specks_are_measured_one_by_one(root):
  clip = clips_of(root, 'v1m', 'train')[0]

  def plant(ids):  # 3 pixels are less than 0.1 % of 64 x 48, 4 are more
    ids[0, 0:12:2] = 55

  edit_image(clip.label_ids_path(0), plant)
  assert 'as 6 regions' in text_of(check.check_data(root), 'stray specks')


@pytest.mark.parametrize('length', [0, 0xFFFFFFFF])
def test_a_sound_of_unknown_length_is_not_truncated(root, length):
  clip = clips_of(root, 'v2', 'test')[0]
  with open(clip.audio_path, 'r+b') as file:  # as a program that writes to a pipe leaves it
    file.seek(4)
    file.write(length.to_bytes(4, 'little'))
  assert check.check_data(root)['ok']


def test_length_of_sound_is_that_after_resampling(root):
  clip = clips_of(root, 'v1m', 'val')[0]
  rate = 44100
  # The fewest that give enough after resampling, which rounds up.
  write_sound(clip.audio_path, (audio.samples_needed(5) - 1) * rate // 16000 + 1, rate)
  assert found(check.check_data(root), 'notes') == set()
  write_sound(clip.audio_path, (audio.samples_needed(5) - 1) * rate // 16000, rate)
  assert found(check.check_data(root), 'notes') == {('short sound', name(clip))}


def test_the_same_content_within_a_split_is_no_problem(root):
  first, second = clips_of(root, 'v1m', 'train')[:2]
  shutil.copy(first.frame_path(0), second.frame_path(0))
  shutil.copy(first.audio_path, second.audio_path)
  assert check.check_data(root)['ok']


def test_folder_names_that_cannot_be_printed(root):
  folder = bytes(root / 'v2') + b'/bad\xff\nname'
  os.mkdir(folder)
  report = check.check_data(root)
  text = text_of(report, 'unlisted folder')
  assert 'bad' in text
  check.format_check(report).encode()
  json.dumps(report, ensure_ascii=False).encode()


def test_sizes_beyond_the_commonest_are_summed(root):
  clip = clips_of(root, 'v2', 'train')[0]
  for t in range(7):
    Image.new('RGB', (100 + t, 50)).save(clip.frame_path(t))
  report = check.check_data(root)
  assert report['image_sizes'][0] == {'width': 64, 'height': 48, 'frames': 68}
  assert len(report['image_sizes']) == 5
  assert report['other_sizes'] == 3
  assert report['ok']
  assert 'and so on for 13 more' in text_of(report, 'label size')


# The rest


def test_bad_index_raises(root, tmp_path):
  with pytest.raises(UserError, match=r'metadata\.csv'):
    check.check_data(tmp_path / 'nothing')


def test_text_shows_the_counts_and_ten_of_many(root):
  for clip in read_index(root):
    shutil.rmtree(clip.folder)
  text = check.format_check(check.check_data(root))
  lines = text.splitlines()
  head = next(i for i, line in enumerate(lines) if line.startswith('subset'))
  columns = 'subset split clips published frames labels_semantic labels_rgb'
  assert lines[head].split() == columns.split()
  assert lines[head + 1].split() == ['v1s', 'train', '3', '3452', '0', '0', '0']
  assert 'problems: 13' in lines
  assert '  missing folder (13)' in lines
  assert '    ... and 3 more' in lines
  assert 'image sizes (frames): none' in lines


def test_ten_of_a_kind_are_all_shown(clean):
  report = check.check_data(clean)
  finding = {'kind': 'odd', 'clip': None, 'text': 'odd'}
  assert ' more' not in check.format_check({**report, 'notes': [finding] * 10})
  assert '... and 1 more' in check.format_check({**report, 'notes': [finding] * 11})

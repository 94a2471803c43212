"""Prepared shards: the same batches as from files, whatever happens while they are written."""

import collections
import copy
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from aavs_jax import cli
from aavs_jax import config as config_lib
from aavs_jax.input_pipeline import listening, masks, pipeline, prepare, prepared
from aavs_jax.input_pipeline.bad_clips import find_bad_clips
from aavs_jax.input_pipeline.clips import SPLITS
from aavs_jax.input_pipeline.compose.dataset import compose
from aavs_jax.input_pipeline.errors import UserError, may_pass
from aavs_jax.input_pipeline.index import KINDS, read_index
from aavs_jax.input_pipeline.items import (
  Item,
  Task,
  load_eval_item,
  load_training_item,
  load_unlabelled_item,
  make_items,
)
from aavs_jax.train import train

SIZE, EVAL_SIZE = 32, 24
SIZES = {'image_size': SIZE, 'eval_size': EVAL_SIZE}


@pytest.fixture(scope='module')
def object_root(tmp_path_factory):
  root = tmp_path_factory.mktemp('object') / 'set'
  counts = {'v1s': 2, 'v1m': 2, 'v2': 0}
  compose(root, clips=dict.fromkeys(('train', 'val', 'test'), counts), num_classes=4,
          layout='object')  # fmt: skip
  return str(root)


@pytest.fixture(scope='module')
def pairs(data_root, object_root, tmp_path_factory):
  """For each layout the folder of its files and that of its shards."""
  out = tmp_path_factory.mktemp('shards')
  roots = {'semantic': data_root, 'object': object_root}
  for layout, root in roots.items():
    prepare.prepare(root, out / layout, **SIZES, clips_per_shard=3, workers=1)
  return {layout: (root, str(out / layout)) for layout, root in roots.items()}


@pytest.fixture
def own(pairs, tmp_path):
  """Files of a made data set, and shards of them that a test may spoil."""
  root, out = pairs['semantic']
  return root, pathlib.Path(shutil.copytree(out, tmp_path / 'out'))


def same(a, b):
  return a.keys() == b.keys() and all(
    a[key].dtype == b[key].dtype and np.array_equal(a[key], b[key]) for key in a
  )


def files(folder):
  return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def refusal(function, *found):
  with pytest.raises(UserError) as caught:
    function()
  message = str(caught.value)
  assert '\n' not in message
  for part in found:
    assert str(part) in message, message


@pytest.mark.parametrize(
  ('layout', 'semantic', 'prior'),
  [
    ('semantic', True, True),
    ('semantic', False, False),
    ('object', False, True),
  ],
)
def test_items_are_those_of_the_files(pairs, layout, semantic, prior):
  task = Task(semantic, 71 if semantic else 2, SIZE, EVAL_SIZE, 5, prior, '')
  both = [read_index(root) for root in pairs[layout]]
  assert [(c.split, c.subset, c.uid) for c in both[0]] == [
    (c.split, c.subset, c.uid) for c in both[1]
  ]
  for clips in zip(*both):
    for item_frames in (0, 1):
      for item in make_items(clips[:1], item_frames):
        assert same(*(load_training_item(clip, item, task) for clip in clips))
        assert same(*(load_unlabelled_item(clip, item, task) for clip in clips))
        assert same(*(load_eval_item(clip, clip, item, task) for clip in clips))


@pytest.mark.parametrize('layout', ['semantic', 'object'])
@pytest.mark.parametrize('choice', listening.CHOICES)
def test_every_sound_is_that_of_the_files(pairs, layout, choice):
  heard = []
  for root in pairs[layout]:
    # Of AVSBench-object S4 alone tells what sounds.
    clips = read_index(root, 'train', ['v1s'] if layout == 'object' else ('v1m', 'v2'))
    try:
      chosen = listening.choose_sounds(clips, choice)
    except UserError as error:
      assert choice == 'offscreen'  # there may be none among so few clips
      heard.append([str(error)])
    else:
      heard.append([listening.load_sound(*pair).tolist() for pair in zip(clips, chosen)])
  assert heard[1] == heard[0]


def test_the_stream_is_that_of_the_files(pairs):
  task = Task(True, 71, SIZE, EVAL_SIZE, 5, True, '')
  streams = [
    pipeline.training_batches(
      read_index(root, 'train'), task, item_frames=5, batch_items=2, seed=0, start=3,
      threads=2,
    )
    for root in pairs['semantic']
  ]  # fmt: skip
  for batches in itertools.islice(zip(*streams), 8):
    assert same(*batches)


def test_what_is_refused_of_a_label_names_its_shard(pairs):
  clip = read_index(pairs['semantic'][1], 'train', ['v2'])[0]
  task = Task(True, 71, SIZE, EVAL_SIZE, 1, False, '')
  item = Item(0, 5, 5)
  name = f'{clip.shard}: frame 5 of v2/{clip.uid} has'
  refusal(lambda: load_training_item(clip, item, task), name, 'max_targets is 1')


def test_a_class_that_the_model_lacks_is_refused_by_name(pairs):
  clips = read_index(pairs['semantic'][1], 'train')
  task = Task(True, 71, SIZE, EVAL_SIZE, 5, False, '')
  items = [load_training_item(c, Item(0, 0, 5), task) for c in clips]
  highest = [item['labels'].max() for item in items]
  clip, top = clips[np.argmax(highest)], max(highest)
  lacking = dataclasses.replace(task, num_classes=int(top))
  words = f'of {clip.subset}/{clip.uid} holds class id {top}, config.num_classes is {top}:'
  item = Item(0, 0, 5)
  refusal(lambda: load_training_item(clip, item, lacking), clip.shard_path, words)
  refusal(lambda: load_eval_item(clip, clip, item, lacking), clip.shard_path, words)
  bad = find_bad_clips(clips, lacking, 2)
  assert f'{clip.subset}/{clip.uid}' in [row['clip'] for row in bad]
  assert all('config.num_classes is' in row['text'] for row in bad)
  assert not find_bad_clips(clips, dataclasses.replace(task, num_classes=int(top) + 1), 2)


@pytest.mark.parametrize('size', [1, 2, 33])
def test_frames_come_back_as_they_were(size):
  frame = np.random.default_rng(size).integers(0, 256, (size, size, 3), np.uint8)
  data = prepared.encode_frame(frame, prepared.LOSSLESS)
  np.testing.assert_array_equal(prepared.decode_frame(data, size, prepared.LOSSLESS), frame)


_PREPARE = """
import sys
from aavs_jax.input_pipeline.prepare import prepare
prepare(*sys.argv[1:], image_size=32, eval_size=24, clips_per_shard=1, workers=2)
"""


def test_a_killed_run_goes_on_to_the_same_bytes(data_root, tmp_path):
  prepare.prepare(data_root, tmp_path / 'whole', **SIZES, clips_per_shard=1, workers=1)
  out = tmp_path / 'out'
  process = subprocess.Popen(
    [sys.executable, '-c', _PREPARE, data_root, str(out)], start_new_session=True
  )
  deadline = time.monotonic() + 300
  while len(list(out.glob('*-of-*.json'))) < 3:
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.005)
  os.kill(process.pid, signal.SIGKILL)
  process.wait()
  while True:  # the processes that it started end by themselves
    try:
      os.killpg(process.pid, 0)
    except ProcessLookupError:
      break
    assert time.monotonic() < deadline
    time.sleep(0.05)

  done = {path.name: path.stat().st_mtime_ns for path in out.glob('*-of-*.json')}
  assert 3 <= len(done) < 20 and not (out / 'prepared.json').exists()
  refusal(lambda: read_index(out), 'is no folder of a data set')
  for note in (tmp_path / 'whole').glob('*-of-*.json'):
    if note.name not in done:
      left = out / f'.{note.stem}.array_record.writing'
      left.mkdir(exist_ok=True)
      (left / 'part').write_bytes(b'half')
  prepare.prepare(data_root, out, **SIZES, clips_per_shard=1, workers=1)
  assert files(out) == files(tmp_path / 'whole')
  assert all((out / name).stat().st_mtime_ns == when for name, when in done.items())


def test_two_runs_do_not_write_to_one_folder(data_root, tmp_path):
  def second(done, total):
    with pytest.raises(UserError, match='is being written by another process'):
      prepare.prepare(data_root, tmp_path, image_size=32, eval_size=32, workers=1)
    refused.append(done)

  refused = []
  prepare.prepare(data_root, tmp_path, image_size=32, eval_size=32, workers=1, progress=second)
  assert refused


def test_other_settings_and_other_clips_are_refused(own, object_root, tmp_path):
  root, out = own
  before = files(out)
  settings = dict(SIZES, clips_per_shard=3, workers=1)
  for change, *found in (
    ({'image_size': 64}, 'image_size 32, not 64'),
    ({'eval_size': 32}, 'eval_size 24, not 32'),
    ({'jpeg': 95}, "frames 'lossless', not 'jpeg 95'"),
    ({'clips_per_shard': 4}, 'clips_per_shard 3, not 4'),
    ({'jpeg': 101}, 'jpeg is 101: use 0 to 100'),
    ({'workers': 0}, 'workers is 0'),
    ({'on_bad_clip': 'ignore'}, "on_bad_clip is 'ignore'"),
  ):
    refusal(lambda change=change: prepare.prepare(root, out, **settings | change), *found)
  refusal(lambda: prepare.prepare(object_root, out, **settings), 'other clips, not those of')
  refusal(lambda: prepare.prepare(out, tmp_path / 'again', **settings), 'holds prepared shards')
  assert files(out) == before
  foreign = tmp_path / 'foreign'
  foreign.mkdir()
  (foreign / 'thesis.tex').write_text('words')
  refusal(lambda: prepare.prepare(root, foreign, **settings), 'holds something')
  refusal(lambda: prepare.prepare(root, 'nowhere', image_size=0), 'image_size is 0')


def _flip(path, place):
  data = bytearray(path.read_bytes())
  data[place] ^= 4
  path.write_bytes(data)


def test_damage_is_named_and_mended(own):
  root, out = own
  whole = files(out)
  task = Task(True, 71, SIZE, EVAL_SIZE, 5, True, '')
  clips = read_index(out, 'train')
  first = [clip for clip in clips if clip.shard == clips[0].shard]
  path = out / first[0].shard
  for place in range(200, 20_000, 3000):
    _flip(path, place)
  prepared._open.cache_clear()  # of this process, which has read the file before
  for clip in first[:1]:
    refusal(
      lambda clip=clip: [
        load_training_item(clip, item, task) for item in make_items([clip], 5)
      ],
      path, f'v1s/{clip.uid} cannot be read', 'hash mismatch', 'run `aavs prepare` again',
    )  # fmt: skip
  batches = pipeline.training_batches(
    first, task, item_frames=5, batch_items=1, seed=0, start=0, threads=2
  )
  refusal(lambda: [next(batches) for _ in first], path, 'cannot be read')

  with open(path, 'r+b') as file:
    file.truncate(path.stat().st_size // 2)
  refusal(lambda: read_index(out), path, 'bytes: run `aavs prepare` again')
  path.unlink()
  refusal(lambda: read_index(out), path, 'has no of')
  prepare.prepare(root, out, **SIZES, clips_per_shard=3, workers=1)
  assert files(out) == whole
  prepared._open.cache_clear()
  assert load_training_item(first[0], Item(0, 0, 5), task)['weight'].all()


def test_a_manifest_of_another_kind_is_refused(own):
  _, out = own
  path = out / prepared.MANIFEST
  manifest = json.loads(path.read_text())
  path.write_text(json.dumps(manifest | {'format': 99}))
  refusal(lambda: read_index(out), path, 'format 99')
  path.write_text('{')
  refusal(lambda: read_index(out), path, 'is not valid JSON')


def _places(value, place=()):
  """Where every value of a JSON document stands, itself included."""
  yield place
  if isinstance(value, (dict, list)):
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
      yield from _places(inner, (*place, key))


def _mutants(document):
  """The document with each value in turn changed, lost, or joined by an unknown one."""
  strange = (None, True, -1, 0, 10**7, 1e999, 1.5, '', '../../x', 'v1s', '\n\ud800', [], {}, [[0]])
  for place in _places(document):
    for value in (*strange, KeyError):
      mutant = {'': copy.deepcopy(document)}
      inner, key = mutant, ''
      for step in place:
        inner, key = inner[key], step
      if value is KeyError:
        del inner[key]
      else:
        inner[key] = value
      yield place, mutant.get('')
    if isinstance(inner := functools.reduce(lambda v, k: v[k], place, document), dict):
      mutant = copy.deepcopy(document)
      functools.reduce(lambda v, k: v[k], place, mutant)['new'] = len(inner)
      yield place, mutant


def test_any_manifest_is_read_or_refused_by_key(own):
  _, out = own
  path = out / prepared.MANIFEST
  manifest = json.loads(path.read_text())
  manifest['clips'] = manifest['clips'][:3]
  used = {clip['shard'] for clip in manifest['clips']}
  manifest['shards'] = [shard for shard in manifest['shards'] if shard['file'] in used]
  manifest['counts'] = manifest['counts'][:1]
  counts = collections.Counter()
  for place, mutant in _mutants(manifest):
    path.write_text(json.dumps(mutant))
    try:
      clips = prepared.read_index(str(out), KINDS)
    except UserError as error:
      counts['refused'] += 1
      key = next((step for step in reversed(place) if isinstance(step, str)), '')
      assert str(out / key if key == 'bytes' else path).removesuffix('bytes') in str(error)
      assert key.rstrip('s') in str(error) and '\n' not in str(error), (place, str(error))
      continue
    counts['read'] += 1
    for clip, row in zip(clips, manifest['clips']):
      assert clip.num_frames == row['num_frames'] and clip.position == row['position']
      assert clip.shard == row['shard'] and clip.settings == prepared.Settings(**SIZES)
      assert pathlib.PurePath(masks.mask_path('masks', clip, 0)).parent.parent == pathlib.PurePath(
        'masks', clip.subset
      )
      assert '..' not in clip.uid and clip.split in SPLITS
  assert counts['refused'] > 700 and 20 < counts['read'] < 200, counts


def test_the_note_of_a_shard_is_not_trusted(own):
  """A note of another shape, or of other clips: the shard is written anew."""
  root, out = own
  whole = files(out)
  path = sorted(out.glob('train-*-of-*.json'))[0]
  note = json.loads(path.read_text())
  for wrong in (
    [], {}, note | {'clips': None}, note | {'clips': note['clips'][::-1]}, note | {'file': '../x'},
    note | {'clips': note['clips'][1:]}, note | {'bad_clips': [{'clip': note['clips'][0]}]},
  ):  # fmt: skip
    path.write_text(json.dumps(wrong))
    prepare.prepare(root, out, **SIZES, clips_per_shard=3, workers=1)
    assert files(out) == whole


def test_a_disk_that_fails_is_no_damaged_shard(pairs, monkeypatch):
  """ArrayRecord raises the same for both; only its words tell them apart."""
  clip = read_index(pairs['semantic'][1], 'train')[0]

  def failing(words):
    def read(_):
      raise RuntimeError(f'{words}; reading {clip.shard_path}; at byte 65536; Failed to read')

    monkeypatch.setattr(prepared, '_open', lambda *_: types.SimpleNamespace(read=read))

  for number in (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT):
    failing(f'read() failed: {os.strerror(number)}')
    with pytest.raises(OSError, match=clip.shard) as failure:
      prepared.read_log_mel(clip)
    assert failure.value.errno == number and may_pass(failure.value)
  for words in (f'open() failed: {os.strerror(errno.ENOENT)}', 'hash mismatch'):
    failing(words)
    refusal(lambda: prepared.read_log_mel(clip), clip.shard_path, words)


def test_shards_that_take_the_place_of_others_are_read_anew(pairs, tmp_path):
  root, shards = pairs['object'][0], tmp_path / 'shards'
  item, task = Item(0, 0, 1), Task(False, 2, SIZE, EVAL_SIZE, 5, False, '')
  frames = []
  for jpeg in (5, 90):
    prepare.prepare(root, shards, **SIZES, clips_per_shard=3, workers=1, jpeg=jpeg)
    frames.append(load_training_item(read_index(shards)[0], item, task)['frames'])
    shutil.rmtree(shards)
  assert not np.array_equal(*frames)


def test_a_shard_that_is_written_anew_under_a_reader_is_refused(own):
  clips = read_index(own[1], 'train')
  last = [clip for clip in clips if clip.shard == clips[0].shard][-1]
  prepared.read_frame(last, 0)
  with open(last.shard_path, 'ab') as file:
    file.write(bytes(8))
  refusal(lambda: prepared.read_frame(last, 0), last.shard_path, 'start this command again')


def test_a_disk_that_fills_up_is_no_fault_of_the_program(data_root, tmp_path, monkeypatch):
  class Full:
    def __init__(self, *_):
      pass

    def write(self, _):
      raise RuntimeError('write() failed: No space left on device; writing at position 65536')

  monkeypatch.setattr(prepare, 'ArrayRecordWriter', Full)
  with pytest.raises(OSError, match=r'No space left on device: .*array_record') as error:
    prepare.prepare(data_root, tmp_path / 'out', **SIZES, workers=1)
  assert error.value.errno == errno.ENOSPC


@pytest.mark.parametrize(('size', 'warned'), [('95', True), ('96', False)])
def test_a_size_that_no_method_here_takes_is_warned_of(size, warned, data_root, tmp_path, capsys):
  root = str(tmp_path / 'out')
  assert cli.main(['prepare', data_root, root, '--image-size', size, '--workers=1']) == 0
  assert capsys.readouterr().out.startswith('  WARNING: --image-size 95 is no multiple') == warned


def test_jpeg_is_smaller_close_and_said_to_be_lossy(data_root, tmp_path, capsys):
  for name, options in (('lossy', ['--jpeg', '95']), ('exact', [])):
    arguments = ['prepare', data_root, str(tmp_path / name), '--image-size', '128', '--workers=1']
    assert cli.main([*arguments, *options]) == 0
    said = capsys.readouterr().out
    assert '20 clips in 3 shards' in said
    assert 'were there' not in said
    assert ('JPEG of quality 95' in said and 'not the same' in said) == (name == 'lossy')
  manifest = json.loads((tmp_path / 'lossy' / 'prepared.json').read_text())
  assert manifest['settings'] == {'image_size': 128, 'eval_size': 224, 'frames': 'jpeg 95'}
  task = Task(True, 71, 128, 224, 5, True, '')
  lossy, exact = (read_index(tmp_path / name, 'test') for name in ('lossy', 'exact'))
  for pair in zip(lossy, exact):
    item = Item(0, 0, 5)
    a, b = (load_training_item(clip, item, task) for clip in pair)
    difference = np.abs(a.pop('frames').astype(int) - b.pop('frames'))
    assert 0 < difference.mean() < 3
    assert same(a, b)
  assert cli.main(arguments) == 0
  assert '3 of them were there and are kept' in capsys.readouterr().out


def test_a_config_of_other_sizes_is_refused(pairs, tiny_stage1, tmp_path):
  out = pairs['semantic'][1]
  tiny_stage1.data.root = out
  found = f'config.data.eval_size is 32, but {out} was prepared with 24', '--eval-size 32'
  refusal(lambda: train(tiny_stage1, tmp_path / 'run'), *found)
  assert not (tmp_path / 'run').exists()
  tiny_stage1.data.eval_size = 24
  tiny_stage1.data.image_size = 64
  clips = read_index(out)
  refusal(lambda: config_lib.require_fit(clips, tiny_stage1), 'image_size is 64', 'with 32')
  task = config_lib.task_of(tiny_stage1)
  item = Item(0, 0, 5)
  refusal(lambda: load_unlabelled_item(clips[0], item, task), 'image_size is 64')


def test_what_needs_the_files_refuses_shards(pairs, tmp_path, capsys):
  out = pairs['semantic'][1]
  for arguments in (
    ['check-data', out],
    ['quickstart', '--data', out, '--workdir', str(tmp_path / 'study')],
    ['predict', out, '--stage1', 'none', '--out', str(tmp_path / 'prediction')],
  ):
    assert cli.main(arguments) == 2
    assert out in capsys.readouterr().err
  refusal(lambda: read_index('gs://bucket/shards'), 'gs://bucket/shards is in a bucket')


def test_bad_clips_are_left_out_where_allowed(data_root, tmp_path):
  root = pathlib.Path(shutil.copytree(data_root, tmp_path / 'set'))
  clips = read_index(root)
  bad = [next(clip for clip in clips if clip.split == split) for split in ('train', 'test')]
  for clip in bad:
    os.truncate(clip.audio_path, 0)
  out = tmp_path / 'out'
  settings = dict(SIZES, clips_per_shard=3, workers=1)
  refusal(lambda: prepare.prepare(root, out, **settings), bad[0].audio_path)
  skip = settings | {'on_bad_clip': 'skip'}
  refusal(lambda: prepare.prepare(root, out, **skip, max_bad_clips=1), 'max_bad_clips is 1')
  manifest = prepare.prepare(root, out, **skip, max_bad_clips=2)
  names = {f'{clip.split}/{clip.subset}/{clip.uid}' for clip in bad}
  assert {row['clip'] for row in manifest['bad_clips']} == names
  assert sum(row['clips'] for row in manifest['counts']) == 18
  assert [prepared.left_out(out, split) for split in SPLITS] == [1, 0, 1]
  found = read_index(out)
  assert [clip.uid for clip in found] == [clip.uid for clip in clips if clip not in bad]
  task = Task(True, 71, SIZE, EVAL_SIZE, 5, False, '')
  by_name = {(clip.subset, clip.uid): clip for clip in clips}
  for clip in found:  # the places of those after a bad one as well
    raw = by_name[clip.subset, clip.uid]
    item = Item(0, 0, 5)
    assert same(*(load_training_item(c, item, task) for c in (raw, clip)))

  for clip in bad:
    shutil.copyfile(dataclasses.replace(clip, root=data_root).audio_path, clip.audio_path)
  prepare.prepare(root, out, **skip)
  prepare.prepare(root, tmp_path / 'mended', **settings)
  assert files(out) == files(tmp_path / 'mended')


def test_a_bucket_gets_the_same_files(own, bucket, tmp_path):
  root, local = own
  for _ in range(2):  # the second time all is there
    prepare.prepare(root, bucket / 'shards', **SIZES, clips_per_shard=3, workers=1)
    assert files(tmp_path / 'bucket' / 'run' / 'shards') == files(local)

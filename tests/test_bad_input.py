"""Bad and unusual files: each is read right, or refused in one sentence that names it.

What concerns one reader alone is in its own test file; here is what cuts across them, with
properties of random files, random damage, and the clips that training leaves out.
"""

import contextlib
import csv
import errno
import io
import itertools
import json
import os
import pathlib
import resource
import shutil
import signal
import struct
import subprocess
import sys
import zlib

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from aavs_jax import cli
from aavs_jax.input_pipeline import (
  audio,
  avsbench,
  check,
  files,
  labels,
  masks,
  pipeline,
  prepared,
)
from aavs_jax.input_pipeline.bad_clips import find_bad_clips, leave_out
from aavs_jax.input_pipeline.clips import IGNORE, SPLITS
from aavs_jax.input_pipeline.compose.dataset import compose
from aavs_jax.input_pipeline.errors import UserError, may_pass
from aavs_jax.input_pipeline.images import (
  load_frame,
  load_label_ids,
  load_label_rgb,
  read_image,
  read_mask,
)
from aavs_jax.input_pipeline.index import read_index
from aavs_jax.input_pipeline.items import Item, Task, load_training_item
from aavs_jax.input_pipeline.reader import load_log_mel
from aavs_jax.train import train
from aavs_jax.training import checkpoint, wandb_run
from tests import tiny

TASK = Task(True, 71, 32, 32, 4, False, '')
FEW = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('files')


@pytest.fixture
def root(data_root, tmp_path):
  return shutil.copytree(data_root, tmp_path / 'set')


@contextlib.contextmanager
def at_once():
  """Fails if what is inside takes a minute, as it does where it waits for ever."""

  def stop(*_):
    raise TimeoutError('still waiting')

  before = signal.signal(signal.SIGALRM, stop)
  signal.alarm(60)
  try:
    yield
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refusal(function, *found):
  with at_once(), pytest.raises(UserError) as caught:
    function()
  message = str(caught.value)
  for part in found:
    assert str(part) in message, message
  assert '\n' not in message
  return message


def cut(path, length):
  with open(path, 'r+b') as file:
    file.truncate(length)


# Sound in every form, against arithmetic on the bytes


def wav(data, *, bits=16, channels=1, rate=16000, tag=1, extensible=False, claimed=None):
  """A WAV file around samples that are encoded already; `claimed` is the length it states."""
  block = channels * bits // 8
  header = struct.pack('<HHIIHH', tag, channels, rate, rate * block, block, bits)
  if extensible:
    guid = struct.pack('<H', tag) + bytes.fromhex('000000001000800000aa00389b71')
    header = struct.pack('<H', 0xFFFE) + header[2:] + struct.pack('<HHI', 22, bits, 0) + guid
  claimed = len(data) if claimed is None else claimed
  chunks = b'fmt ' + struct.pack('<I', len(header)) + header
  chunks += b'data' + struct.pack('<I', claimed) + data
  return b'RIFF' + struct.pack('<I', min(4 + len(chunks), 0xFFFFFFFF)) + b'WAVE' + chunks


def encode(values, form):
  """Samples of full scale 1, float64 [n, channels]: bytes of a form, and what they stand for."""
  if form in ('f4', 'f8'):
    stored = values.astype(f'<{form}')
    return stored.tobytes(), stored.astype(np.float64)
  bits = int(form)
  full = 2 ** (bits - 1)
  whole = np.clip(np.round(values * full), -full, full - 1).astype(np.int64)
  if bits == 8:  # the only form without a sign
    return (whole + 128).astype(np.uint8).tobytes(), whole / full
  low_bytes = whole.astype('<i8').reshape(-1, 1).view(np.uint8)[:, : bits // 8]
  return low_bytes.tobytes(), whole / full


FORMS = {'8': 8, '16': 16, '24': 24, '32': 32, 'f4': 32, 'f8': 64}  # and bits


@given(
  form=st.sampled_from(sorted(FORMS)),
  channels=st.integers(1, 6),
  length=st.integers(1, 200),
  extensible=st.booleans(),
  seed=st.integers(0, 1000),
)
@FEW
def test_every_form_of_wav_is_the_mean_of_its_channels(
  folder, form, channels, length, extensible, seed
):
  values = np.random.default_rng(seed).uniform(-1, 1, (length, channels))
  data, meant = encode(values, form)
  tag = 3 if form.startswith('f') else 1
  path = folder / 'a.wav'
  path.write_bytes(wav(data, bits=FORMS[form], channels=channels, tag=tag, extensible=extensible))
  waveform, rate = audio.read_wav(path)
  assert rate == 16000 and waveform.dtype == np.float32
  np.testing.assert_allclose(waveform, meant.mean(axis=1), rtol=0, atol=2e-7)


def test_8_khz_is_doubled(tmp_path):
  def tones(rate):
    seconds = np.arange(5 * rate) / rate
    return 0.4 * np.sin(2 * np.pi * 440 * seconds) + 0.2 * np.sin(2 * np.pi * 2500 * seconds)

  for name, rate in (('low', 8000), ('full', 16000)):
    (tmp_path / f'{name}.wav').write_bytes(wav(encode(tones(rate)[:, None], '16')[0], rate=rate))
  low = audio.resample(*audio.read_wav(tmp_path / 'low.wav'))
  np.testing.assert_allclose(low[800:-800], tones(16000)[800:-800], atol=1e-3)
  got, want = (audio.clip_log_mel(tmp_path / f'{name}.wav', 5) for name in ('low', 'full'))
  assert got.shape == want.shape == (5, 96, 64)
  assert np.abs(got - want)[1:-1, :, :45].max() < 0.05  # bands below 3.5 kHz


@pytest.mark.parametrize('claimed', [0, 1 << 20, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_wav_that_lies_about_its_length_is_read_to_its_end(tmp_path, claimed):
  data, meant = encode(np.random.default_rng(0).uniform(-1, 1, (16000, 1)), '16')
  (tmp_path / 'a.wav').write_bytes(wav(data, claimed=claimed))
  with at_once():
    try:
      waveform, _ = audio.read_wav(tmp_path / 'a.wav')
    except UserError as error:  # nothing, as a length of nothing may be taken at its word
      assert claimed == 0 and '0 samples' in str(error)
    else:
      np.testing.assert_allclose(waveform, meant[:, 0], atol=1e-7)


@pytest.mark.parametrize(
  'place, value', [(22, 0), (22, 0xFFFF), (24, 0), (32, 0), (34, 0), (34, 9999), (20, 0x1234)]
)
def test_a_wav_with_an_impossible_header(tmp_path, place, value):
  path = tmp_path / 'a.wav'
  data = bytearray(wav(encode(np.zeros((16000, 1)), '16')[0]))
  data[place : place + 2] = struct.pack('<H', value)
  path.write_bytes(data)
  with at_once():
    try:
      waveform, rate = audio.read_wav(path)
      assert np.isfinite(waveform).all() and 1000 <= rate <= 768000
    except UserError as error:
      assert str(path) in str(error)


# Images


def png_header(width, height):
  body = b'IHDR' + struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
  start = b'\x89PNG\r\n\x1a\n' + struct.pack('>I', len(body) - 4)
  return start + body + struct.pack('>I', zlib.crc32(body))


def test_an_image_of_60000_x_60000_takes_no_memory(tmp_path):
  path = tmp_path / 'bomb.png'
  path.write_bytes(png_header(60000, 60000) + bytes(4) + b'IDAT')
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  for read in (read_image, read_mask):
    assert 'shrink it' in refusal(lambda read=read: read(str(path)), path, '3600000000')
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes


def test_grey_of_16_bits_is_scaled_in_frames_and_stays_in_labels(root):
  clip = read_index(root, 'train', ['v1m'])[0]
  ramp = np.tile(np.arange(256, dtype=np.uint16), (64, 1))
  for dtype, scale in ((np.uint8, 1), (np.uint16, 257)):
    Image.fromarray((ramp * scale).astype(dtype)).save(clip.frame_path(0), format='PNG')
    pixels = read_image(clip.frame_path(0))
    np.testing.assert_array_equal(pixels, np.repeat(ramp[..., None], 3, axis=2))
    resized = load_frame(clip, 0, 32)
    assert (np.diff(resized[0, :, 0].astype(int)) > 5).all() and resized.max() > 250
  Image.fromarray(ramp * 257 + 128).save(clip.frame_path(0), format='PNG')
  assert np.abs(read_image(clip.frame_path(0))[0, :255, 0] - ramp[0, :255]).max() == 0

  ids = np.minimum(ramp, 70)
  ids[0] = IGNORE
  Image.fromarray(ids).save(clip.label_ids_path(0))
  np.testing.assert_array_equal(load_label_ids(clip, 0), ids)
  assert load_label_ids(clip, 0).dtype == np.uint8
  for wrong in (71, 256, 65535):  # none of them becomes 255, which is to be ignored
    ids[5, 5] = wrong
    Image.fromarray(ids).save(clip.label_ids_path(0))
    refusal(lambda: load_label_ids(clip, 0), clip.label_ids_path(0), f'class id {wrong} ')
  for sounding in (1, 255, 65535):
    Image.fromarray((ramp > 99).astype(np.uint16) * sounding).save(clip.label_ids_path(0))
    mask, doubtful = read_mask(clip.label_ids_path(0))
    assert np.array_equal(mask, ramp > 99) and not doubtful


@pytest.mark.parametrize('share', [0.02, 0.3, 0.6, 0.97])
@pytest.mark.parametrize('kind', ['jpg', 'png'])
def test_a_truncated_image(tmp_path, kind, share):
  path = tmp_path / f'a.{kind}'
  Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)).save(path)
  cut(path, int(share * path.stat().st_size))
  assert 'again' in refusal(lambda: read_image(path), path)


def test_a_chunk_that_claims_gigabytes(root, tmp_path):
  # Pillow asks the file for as many bytes as the chunk claims to have.
  clip = read_index(root, 'train', ['v1m'])[0]
  path = tmp_path / clip.subset / clip.uid / '0.png'
  path.parent.mkdir(parents=True)
  data = png_header(64, 64) + struct.pack('>I', 0x7FFFFFF0) + b'IDAT' + zlib.compress(bytes(99))
  path.write_bytes(data)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  refusal(lambda: read_image(path), path)
  refusal(lambda: masks.read_mask(str(tmp_path), clip, 0, 64), path, 'aavs masks')
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_a_label_of_another_size_is_resized_on_its_own(root):
  clip = read_index(root, 'train', ['v1m'])[0]
  task = Task(True, 71, 32, 32, 4, False, '')
  whole = load_training_item(clip, Item(0, 0, 5), task)
  for t in range(5):
    for path in (clip.label_ids_path(t), clip.label_rgb_path(t)):
      with Image.open(path) as image:
        twice = image.resize((192, 144), Image.Resampling.NEAREST)
      twice.save(path)
  item = load_training_item(clip, Item(0, 0, 5), task)
  np.testing.assert_array_equal(item['frames'], whole['frames'])
  assert (item['labels'] == whole['labels']).mean() > 0.99  # nearest pixels of a finer grid
  notes = [note for note in check.check_data(root)['notes'] if note['kind'] == 'label size']
  (note,) = notes
  assert '0.png is 192x144 and its frame 96x72' in note['text'] and clip.folder in note['text']


# Tables


@pytest.mark.parametrize(
  'data, found',
  [
    ('uid,label,split\na,v2,val\n'.encode('utf-16'), 'byte 0xff is not UTF-8'),
    (b'uid;label;split\na;v2;val\n', "no column 'uid' among 'uid;label;split'"),
    (b'\x1f\x8b\x08\x00' + bytes(20), 'not UTF-8'),
    (b'uid,label,split\n' + b'a' * 200_000 + b',v2,val\n', 'field larger than field limit'),
    (b'uid,label,split\n' + b'\n' * 16_000_000, 'too many for a table'),
  ],
)
def test_a_table_that_is_none(tmp_path, data, found):
  (tmp_path / 'metadata.csv').write_bytes(data)
  refusal(lambda: read_index(tmp_path), tmp_path / 'metadata.csv', found)


names = st.text(
  st.characters(exclude_categories=('C', 'Z'), exclude_characters='/\\'), min_size=1, max_size=12
).filter(lambda name: name not in ('.', '..'))
rows = st.lists(
  st.tuples(names, st.sampled_from(['v1s', 'v1m', 'v2']), st.sampled_from(SPLITS)),
  min_size=1,
  max_size=8,
  unique_by=lambda row: row[:2],
)


@given(
  rows=rows,
  order=st.permutations(['uid', 'label', 'split', 'a_obj', '']),
  end=st.sampled_from(['\n', '\r\n']),
  mark=st.booleans(),
  quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
@FEW
def test_an_index_is_read_however_it_is_written(folder, rows, order, end, mark, quoting):
  text = io.StringIO()
  writer = csv.DictWriter(text, order, lineterminator=end, quoting=quoting)
  writer.writeheader()
  for uid, subset, split in rows:
    writer.writerow({'uid': uid, 'label': subset, 'split': split, 'a_obj': 'a, "b"\nc', '': ''})
  (folder / 'metadata.csv').write_bytes((('\ufeff' if mark else '') + text.getvalue()).encode())
  clips = read_index(folder)
  assert [(clip.uid, clip.subset, clip.split) for clip in clips] == rows
  for clip in clips:
    place = pathlib.PurePath(clip.frame_path(0))
    assert place.parents[2] == folder / clip.subset and place.parts[-3] == clip.uid


@given(
  uid=st.one_of(
    st.sampled_from(['', '.', '..', '../../x', '/etc/passwd', 'a\\b', 'x/', '\u202e', '\x00']),
    st.text(max_size=8).map(lambda text: text + '/' + text),
  )
)
@FEW
def test_a_uid_that_is_no_name_of_a_folder(folder, uid):
  text = io.StringIO()
  csv.writer(text, quoting=csv.QUOTE_ALL).writerows(
    [('uid', 'label', 'split'), (uid, 'v1s', 'val')]
  )
  (folder / 'metadata.csv').write_bytes(text.getvalue().encode('utf-8', 'ignore'))
  refusal(lambda: read_index(folder), folder / 'metadata.csv', 'uid is', 'folder')


# The palette


@given(
  ids=st.lists(st.integers(0, 70), min_size=1, max_size=50),
  strange=st.lists(st.tuples(*[st.integers(0, 255)] * 3), max_size=20),
)
@FEW
def test_colours_stand_for_one_class_or_none(ids, strange):
  rgb = np.array([*avsbench.PALETTE[ids].tolist(), *strange], np.uint8)[None]
  meaning = {tuple(colour): class_id for class_id, colour in enumerate(avsbench.PALETTE.tolist())}
  want = [meaning.get(tuple(colour)) for colour in rgb[0].tolist()]
  got, unknown = labels.colours_to_ids(rgb, avsbench.PALETTE)
  assert got[0].tolist() == [0 if class_id is None else class_id for class_id in want]
  assert unknown == want.count(None)
  assert got[0, : len(ids)].tolist() == ids
  known, none = labels.colours_to_ids(
    labels.ids_to_colours(got, avsbench.PALETTE), avsbench.PALETTE
  )
  assert none == 0 and (known == got).all()


@given(
  values=st.lists(st.integers(0, 255), min_size=1, max_size=40),
  channel=st.integers(0, 3),
)
@FEW
def test_a_mask_sounds_where_it_is_not_black(values, channel):
  rgb = np.zeros((1, len(values), 3), np.uint8)
  rgb[0][:, [channel] if channel < 3 else [0, 1, 2]] = np.array(values)[:, None]
  ids, doubtful = labels.mask_to_ids(rgb)
  assert ids[0].tolist() == [int(value > 0) for value in values]
  assert doubtful == sum(0 < value < max(values) for value in values)


# Links, pipes and folders in the place of files


def test_links_are_followed_and_those_that_lead_out_are_named(root, tmp_path):
  clip, other, *_ = read_index(root, 'train', ['v1m'])
  elsewhere = tmp_path / 'elsewhere'
  shutil.move(clip.folder, elsewhere)
  os.symlink(elsewhere, clip.folder)
  target = other.frame_path(0)
  os.rename(target, target + '.kept')
  os.symlink(os.path.basename(target) + '.kept', target)  # stays inside
  load_label_ids(clip, 0)
  load_log_mel(clip)
  load_frame(other, 0, 32)
  report = check.check_data(root)
  assert report['ok']
  (note,) = (n for n in report['notes'] if n['kind'] == 'link out of the data set')
  assert note['clip'] == f'v1m/{clip.uid}'
  assert clip.frame_path(0) in note['text'] and str(elsewhere) in note['text']
  assert '15 more files' in note['text']

  shutil.rmtree(elsewhere)
  problems = check.check_data(root)['problems']
  assert [problem['kind'] for problem in problems] == ['missing folder']


def test_a_subset_may_lie_on_another_disk(root, tmp_path):
  shutil.move(root / 'v2', tmp_path / 'disk')
  os.symlink(tmp_path / 'disk', root / 'v2')
  assert {note['kind'] for note in check.check_data(root)['notes']} == {'clip counts'}


@pytest.mark.parametrize('make', [os.mkfifo, os.mkdir], ids=['pipe', 'folder'])
def test_what_is_no_file_is_not_waited_for(root, make):
  clip = read_index(root, 'test', ['v1m'])[0]
  for path, read in (
    (clip.frame_path(0), lambda: load_frame(clip, 0, 32)),
    (clip.label_ids_path(0), lambda: load_label_ids(clip, 0)),
    (clip.audio_path, lambda: load_log_mel(clip)),
    (clip.table, lambda: read_index(root)),
  ):
    os.remove(path)
    make(path)
    refusal(read, path)


# Random damage


def test_a_flipped_bit_of_a_label_is_no_other_class(root):
  """Of some flips decoders notice nothing, and the checksum of the part of the file is all."""
  clip = read_index(root, 'train', ['v2'])[0]
  path = pathlib.Path(clip.label_ids_path(0))
  data, want = path.read_bytes(), load_label_ids(clip, 0)
  start = data.index(b'IDAT') + 4
  length = int.from_bytes(data[start - 8 : start - 4])
  for place in range(start, start + length):
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    refusal(lambda: load_label_ids(clip, 0), path, 'the image cannot be read')
  path.write_bytes(data)
  np.testing.assert_array_equal(load_label_ids(clip, 0), want)


@pytest.mark.parametrize(('mode', 'kind'), [('1', 'of one bit'), ('P', 'in a palette')])
def test_ids_that_may_be_indices_or_colours_are_refused(root, mode, kind):
  clip = read_index(root, 'train', ['v2'])[0]
  path = clip.label_ids_path(0)
  image = Image.new(mode, (96, 72), 1)
  if mode == 'P':
    image.putpalette([0, 0, 0, 64, 64, 64])
  image.save(path)
  refusal(lambda: load_label_ids(clip, 0), path, kind, 'class ids as grey values')


def test_damaged_files_are_read_or_refused(tmp_path):
  compose(tmp_path / 'set', clips={'test': {'v1s': 1}}, size=(64, 48))
  command = [sys.executable, '-m', 'tests.fuzz_readers', str(tmp_path / 'set'), '100']
  place = pathlib.Path(__file__).parents[1]
  run = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=600)
  assert run.returncode == 0, run.stderr
  counts = json.loads(run.stdout)
  assert counts.keys() == {'jpg', 'png', 'mask', 'wav', 'csv'}
  for kind, count in counts.items():
    assert count['read'] + count['refused'] == 100 and count['refused'] > 20, (kind, count)
  # The checksums of a PNG leave next to nothing unnoticed.
  assert all(counts[kind]['read'] > 3 for kind in ('jpg', 'wav', 'csv'))


# What a command has noted for the next one


@pytest.mark.parametrize(
  'name, read, wrong, found',
  [
    ('source.json', masks.source_digest, '[]', 'the content is [], not an object'),
    ('source.json', masks.source_digest, '{"checkpoint": "a", "step": 1}', 'lacks digest'),
    ('converted.json', checkpoint.converted, '[' * 100_000, 'not valid JSON'),
    ('converted.json', checkpoint.converted, '\x80', 'not valid JSON'),
    (
      'converted.json',
      checkpoint.converted,
      '{"kind": "aavs", "source": "a", "vggish": "b", "lacking": [1], "names": [], "unused": []}',
      'lacking[0] is 1, not a text',
    ),
    (
      'bad_clips.json',
      lambda folder: files.read_json(folder / 'bad_clips.json', prepared.BAD_CLIPS, 'restore it'),
      '[{"clip": "v1s/a"}]',
      'lacks [0].text',
    ),
    (
      'wandb.json',
      lambda folder: wandb_run._run_id(folder, 'mine'),
      '{"mine": {"id": true}}',
      'mine is',
    ),
  ],
)
def test_a_note_of_another_shape_is_refused(tmp_path, name, read, wrong, found):
  (tmp_path / name).write_bytes(wrong.encode('latin-1'))
  refusal(lambda: read(tmp_path), tmp_path / name, found)


# Disks that fail


def _of(clip, root):
  return {
    'frame': (clip.frame_path(0), lambda: load_frame(clip, 0, 32)),
    'ids': (clip.label_ids_path(0), lambda: load_label_ids(clip, 0)),
    'colours': (clip.label_rgb_path(0), lambda: load_label_rgb(clip, 0)),
    'sound': (clip.audio_path, lambda: load_log_mel(clip)),
    'mask': (masks.mask_path(root, clip, 0), lambda: masks.read_mask(root, clip, 0, 32)),
    'table': (clip.table, lambda: read_index(root)),
    'manifest': (f'{root}/prepared.json', lambda: read_index(root)),
  }


@pytest.mark.parametrize('kind', ['frame', 'ids', 'colours', 'sound', 'mask', 'table', 'manifest'])
def test_a_disk_that_fails_makes_no_file_bad(root, kind, capsys):
  clip = read_index(root, 'train', ['v1m'])[0]
  path, read = _of(clip, str(root))[kind]
  pathlib.Path(path).unlink(missing_ok=True)
  os.symlink('/proc/self/mem', path)  # a file whose first byte cannot be read: EIO
  with pytest.raises(OSError) as failure:
    read()
  assert failure.value.errno == errno.EIO and may_pass(failure.value)
  if kind in ('frame', 'ids', 'sound'):
    with pytest.raises(OSError, match='Input/output error'):
      find_bad_clips([clip], TASK, 1)
    assert cli.main(['check-data', str(root)]) == 1
    assert 'Input/output error' in capsys.readouterr().err


def test_nothing_is_missing_where_the_disk_fails(root, monkeypatch):
  clip = read_index(root, 'train', ['v1m'])[0]
  stat_ = os.stat

  def stale(path, *args, **options):
    if clip.uid in os.fspath(path):
      raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
    return stat_(path, *args, **options)

  monkeypatch.setattr(os, 'stat', stale)
  for read in (load_label_ids, load_label_rgb):
    with pytest.raises(OSError) as failure:
      read(clip, 0)
    assert failure.value.errno == errno.ESTALE


# Clips that training leaves out


@pytest.fixture
def damaged(root):
  """A data set with four bad training clips, and what is bad about them, in order."""
  single, _, third, _ = read_index(root, 'train', ['v1s'])
  multi = read_index(root, 'train', ['v1m'])[2]
  long = read_index(root, 'train', ['v2'])[1]
  cut(third.frame_path(0), 300)
  cut(multi.audio_path, 0)
  Image.fromarray(np.full((72, 96), 99, np.uint8)).save(long.label_ids_path(9))
  os.remove(single.frame_path(3))  # which has no label, but masks are made of it
  return root, [
    (single, single.frame_path(3)),
    (third, third.frame_path(0)),
    (multi, multi.audio_path),
    (long, long.label_ids_path(9)),
  ]


def test_bad_clips_are_found_and_named(damaged):
  root, faults = damaged
  clips = read_index(root, 'train')
  for threads in (1, 4):
    bad = find_bad_clips(clips, TASK, threads)
    assert [row['clip'] for row in bad] == [f'{clip.subset}/{clip.uid}' for clip, _ in faults]
    for row, (_, path) in zip(bad, faults):
      assert path in row['text'] and '\n' not in row['text']
  good = leave_out(clips, bad, 4)
  left = {clip for clip, _ in faults}
  assert good == [clip for clip in clips if clip not in left]
  refusal(lambda: leave_out(clips, bad, 3), '4 of 10', 'max_bad_clips is 3', faults[0][1])
  refusal(lambda: leave_out(list(left), bad, 4), 'no training clip', faults[0][1])


def test_the_stream_is_that_of_a_data_set_without_them(damaged):
  root, faults = damaged
  clips = read_index(root, 'train')
  good = leave_out(clips, find_bad_clips(clips, TASK, 2), 4)
  table = root / 'metadata.csv'
  lines = table.read_text().splitlines()
  table.write_text('\n'.join(line for line in lines if not any(c.uid in line for c, _ in faults)))
  without = read_index(root, 'train')
  assert len(without) == len(clips) - 4
  task = Task(False, 2, 32, 32, 2, False, '')

  def stream(clips, start, threads):
    options = dict(item_frames=5, batch_items=2, seed=1, start=start, threads=threads)
    return list(itertools.islice(pipeline.training_batches(clips, task, **options), 6 - start))

  want = stream(without, 0, 1)
  for start, threads in ((0, 3), (4, 1)):
    for batch, same in zip(stream(good, start, threads), want[start:], strict=True):
      for name, values in same.items():
        np.testing.assert_array_equal(batch[name], values)


def test_a_config_that_does_not_fit_is_no_bad_clip(data_root):
  clips = read_index(data_root, 'train', ['v1m'])
  assert find_bad_clips(clips, TASK, 1) == []
  task = Task(True, 71, 32, 32, 1, False, '')
  options = dict(item_frames=5, batch_items=1, seed=0, start=0, threads=1)
  stream = pipeline.training_batches(clips, task, **options)
  refusal(lambda: list(itertools.islice(stream, 4)), 'max_targets is 1')


def _final(workdir):
  with checkpoint.make_manager(workdir / 'checkpoints', 2) as manager:
    step = manager.latest_step()
  return step, checkpoint.read_arrays(workdir / 'checkpoints' / str(step) / 'state')


def test_training_counts_bad_clips_before_it_begins(damaged, tmp_path):
  root, faults = damaged
  config = tiny.get_config('stage1')
  config.data.root = str(root)
  config.data.on_bad_clip = 'skip'
  config.data.max_bad_clips = 3
  refusal(lambda: train(config, tmp_path / 'run'), faults[0][1], '4 of 10', 'max_bad_clips is 3')
  for key, value in (('on_bad_clip', 'ignore'), ('max_bad_clips', -1)):
    wrong = config.copy_and_resolve_references()
    wrong.data[key] = value
    refusal(lambda wrong=wrong: train(wrong, tmp_path / 'run'), f'config.data.{key} is {value!r}')
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_a_run_leaves_out_what_it_found_bad_when_it_began(root, tmp_path):
  clip = read_index(root, 'train', ['v1m'])[1]
  sound = pathlib.Path(clip.audio_path).read_bytes()
  cut(clip.audio_path, 0)
  config = tiny.get_config('stage1')
  config.data.root = str(root)
  config.data.on_bad_clip = 'skip'
  config.data.max_bad_clips = 1
  train(config, tmp_path / 'run')
  (row,) = json.loads((tmp_path / 'run' / 'bad_clips.json').read_text())
  assert row['clip'] == f'v1m/{clip.uid}' and clip.audio_path in row['text']
  lines = [json.loads(line) for line in open(tmp_path / 'run' / 'metrics.jsonl')]
  assert [line['bad_clips'] for line in lines if line['kind'] == 'data'] == [1]
  step, want = _final(tmp_path / 'run')
  assert step == 11  # 11 items, 2 a batch, 2 epochs

  # Mended meanwhile, the clip stays out when the run goes on from an earlier checkpoint.
  pathlib.Path(clip.audio_path).write_bytes(sound)
  shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '11')
  train(config, tmp_path / 'run')
  step, got = _final(tmp_path / 'run')
  assert step == 11 and jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    np.testing.assert_array_equal(a, b)

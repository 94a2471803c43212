"""The AVSBench-semantic layout: a small data set is written, read, and then damaged."""

import logging
import os
import struct
import zlib

import numpy as np
import pytest
import soundfile
from PIL import Image

from aavs_jax.input_pipeline import audio, avsbench, labels
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.input_pipeline.images import load_frame, load_label_ids, load_label_rgb
from aavs_jax.input_pipeline.index import read_index
from aavs_jax.input_pipeline.reader import load_log_mel

ROWS = [  # uid, subset, split
  ('-aldtLqTVYI_1000_11000', 'v2', 'train'),
  ('_b0', 'v1s', 'train'),
  ('-c=x', 'v1s', 'test'),
  ('d, with "commas"', 'v1m', 'val'),
  ('_b0', 'v2', 'test'),
]


def write_metadata(root, rows=ROWS):
  """As a spreadsheet would: a byte order mark, CRLF, other columns, another order."""
  lines = ['split,name,label,a_obj,uid']
  for uid, subset, split in rows:
    quoted = uid.replace('"', '""')
    lines.append(f'{split},"a, b",{subset},man_Gerät,"{quoted}"')
  (root / 'metadata.csv').write_bytes(('\ufeff' + '\r\n'.join(lines) + '\r\n').encode())


def frame_pixels(t):
  grid = np.mgrid[0:45, 0:80].transpose(1, 2, 0)
  return np.stack([grid[..., 0] * 5, grid[..., 1] * 3, np.full((45, 80), t * 20)], -1).astype('u1')


def label_pixels(t):
  ids = np.zeros((45, 80), np.uint8)
  ids[10:30, 20 + t : 50 + t] = 41
  ids[35:, :9] = 28
  return ids


def write_clip(root, uid, subset, split):
  folder = root / subset / uid
  for name in ('frames', 'labels_semantic', 'labels_rgb'):
    (folder / name).mkdir(parents=True)
  num_frames = 10 if subset == 'v2' else 5
  for t in range(num_frames):
    Image.fromarray(frame_pixels(t)).save(folder / 'frames' / f'{t}.jpg')
    if (subset, split) != ('v1s', 'train') or t == 0:
      ids = label_pixels(t)
      Image.fromarray(ids).save(folder / 'labels_semantic' / f'{t}.png')
      Image.fromarray(labels.ids_to_colours(ids, avsbench.PALETTE)).save(
        folder / 'labels_rgb' / f'{t}.png'
      )
  samples = np.random.default_rng(0).normal(0, 0.1, num_frames * 16000)
  soundfile.write(folder / 'audio.wav', samples, 16000, subtype='PCM_16')


@pytest.fixture
def root(tmp_path):
  write_metadata(tmp_path)
  for row in ROWS:
    write_clip(tmp_path, *row)
  return tmp_path


@pytest.fixture
def clip(root):
  return read_index(root, 'test', ['v1s'])[0]


def index_error(root, *found, **arguments):
  with pytest.raises(UserError) as caught:
    read_index(root, **arguments)
  message = str(caught.value)
  for part in found:
    assert part in message, message
  assert '\n' not in message


def file_error(function, path, *found):
  with pytest.raises(UserError) as caught:
    function()
  for part in (str(path), *found):
    assert part in str(caught.value), caught.value


# The index


def test_index_keeps_the_order_of_the_file(root):
  clips = read_index(root)
  assert [(clip.uid, clip.subset, clip.split) for clip in clips] == ROWS
  assert [clip.num_frames for clip in clips] == [10, 5, 5, 5, 10]
  assert {clip.root for clip in clips} == {str(root)}


def test_index_chooses_split_and_subsets(root):
  train = read_index(root, 'train')
  assert [clip.subset for clip in train] == ['v2', 'v1s']
  singles = read_index(root, subsets=('v1s', 'v1m'))
  assert [clip.uid for clip in singles] == ['_b0', '-c=x', 'd, with "commas"']


def test_index_without_mark_and_with_plain_newlines(tmp_path):
  (tmp_path / 'metadata.csv').write_text('uid,label,split\na,v2,val\n\nb,v2,val')
  assert [clip.uid for clip in read_index(tmp_path)] == ['a', 'b']


def test_only_the_first_frame_of_v1s_train_is_labelled(root):
  want = {('v1s', 'train'): 1, ('v1s', 'test'): 5, ('v1m', 'val'): 5}
  for clip in read_index(root):
    count = want.get((clip.subset, clip.split), 10)
    assert clip.labelled_frames == tuple(range(count))
    for t in clip.labelled_frames:
      load_label_ids(clip, t)


def test_missing_index(tmp_path):
  index_error(tmp_path, str(tmp_path), 'metadata.csv')
  (tmp_path / 'metadata.csv').symlink_to('moved.csv')
  index_error(tmp_path, str(tmp_path / 'metadata.csv'), 'No such file')


def test_missing_column(tmp_path):
  (tmp_path / 'metadata.csv').write_text('uid,subset,split\na,v2,val\n')
  index_error(tmp_path, str(tmp_path / 'metadata.csv'), 'line 1', "'label'", "'subset'")


def test_a_column_twice(tmp_path):
  (tmp_path / 'metadata.csv').write_text('uid,label,split,split\na,v2,val,train\n')
  index_error(tmp_path, str(tmp_path / 'metadata.csv'), 'line 1', "2 columns are called 'split'")


def test_empty_index(tmp_path):
  (tmp_path / 'metadata.csv').write_text('')
  index_error(tmp_path, str(tmp_path / 'metadata.csv'), "'uid'", 'none')


def test_short_row(tmp_path):
  (tmp_path / 'metadata.csv').write_text('uid,label,split\na,v2,val\nb,v2\n')
  index_error(tmp_path, str(tmp_path / 'metadata.csv'), 'line 3', "'b'", "'split'")


def test_open_quote(tmp_path):
  # Without a check the last column would swallow the rest of the file.
  (tmp_path / 'metadata.csv').write_text('uid,label,split,a_obj\na,v2,val,"man\nb,v2,val,dog\n')
  index_error(tmp_path, str(tmp_path / 'metadata.csv'), 'line 3', 'not readable as CSV')


def test_bad_encoding(root):
  data = (root / 'metadata.csv').read_bytes()
  (root / 'metadata.csv').write_bytes(data + 'test,x,v2,Gerät,z\r\n'.encode('latin-1'))
  index_error(root, str(root / 'metadata.csv'), 'line 7', '0xe4')


@pytest.mark.parametrize(
  'row, found',
  [
    (('z', 'v3', 'test'), "label is 'v3'"),
    (('z', 'v2', 'testing'), "split is 'testing'"),
    (('_b0', 'v2', 'val'), "'_b0' of v2 stands in line 6"),
    (('', 'v2', 'test'), "uid is ''"),
    (('..', 'v2', 'test'), "uid is '..'"),
    (('.', 'v2', 'test'), "uid is '.'"),
    (('../../etc', 'v2', 'test'), "uid is '../../etc'"),
    (('/etc', 'v2', 'test'), "uid is '/etc'"),
    (('a\\b', 'v2', 'test'), r"uid is 'a\\b'"),
    (('a\0b', 'v2', 'test'), r"uid is 'a\x00b'"),
  ],
)
def test_bad_row(tmp_path, row, found):
  write_metadata(tmp_path, [*ROWS, row])
  # Found also where only another subset is wanted.
  index_error(tmp_path, str(tmp_path / 'metadata.csv'), 'line 7', found, subsets=['v1m'])


def test_nothing_left(root):
  index_error(
    root, str(root / 'metadata.csv'), 'train', 'v1m', '1 of v1m val', split='train', subsets=['v1m']
  )


def test_unknown_choice(root):
  index_error(root, "'dev'", split='dev')
  index_error(root, "'s4'", subsets=['v2', 's4'])


# Frames


@pytest.mark.parametrize('size', [24, 64, 96])
def test_frame_is_the_antialiased_bilinear_of_pillow(clip, size):
  with Image.open(clip.frame_path(3)) as image:
    whole = Image.fromarray(np.array(image.convert('RGB')))
  want = np.array(whole.resize((size, size), Image.Resampling.BILINEAR))
  got = load_frame(clip, 3, size)
  np.testing.assert_array_equal(got, want)
  assert got.dtype == np.uint8 and got.shape == (size, size, 3)
  got[0] = 0  # the caller may write into it


def test_large_jpeg_is_decoded_whole(clip):
  # Draft mode would decode an eighth of each side: other pixels.
  pixels = np.random.default_rng(0).integers(0, 256, (720, 1280, 3), dtype=np.uint8)
  Image.fromarray(pixels).save(clip.frame_path(0), quality=95)
  with Image.open(clip.frame_path(0)) as image:
    whole = Image.fromarray(np.array(image))
  want = np.array(whole.resize((32, 32), Image.Resampling.BILINEAR))
  np.testing.assert_array_equal(load_frame(clip, 0, 32), want)


def test_grey_frame_becomes_rgb(clip):
  Image.fromarray(np.full((9, 9), 77, np.uint8)).save(clip.frame_path(0))
  assert (load_frame(clip, 0, 4) == 77).all()


def test_missing_frame(clip):
  file_error(lambda: load_frame(clip, 5, 32), clip.frame_path(5), 'No such file')


def test_truncated_frame(clip):
  with open(clip.frame_path(1), 'r+b') as file:
    file.truncate(600 + 200)
  file_error(lambda: load_frame(clip, 1, 32), clip.frame_path(1), 'truncated')


@pytest.mark.parametrize('data', [b'', b'<html>not found</html>', b'GIF89a' + bytes(50)])
def test_unreadable_frame(clip, data):
  with open(clip.frame_path(1), 'wb') as file:
    file.write(data)
  file_error(lambda: load_frame(clip, 1, 32), clip.frame_path(1), 'cannot identify')


def png_of(width, height, chunks=()):
  header = (b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0))
  data = b'\x89PNG\r\n\x1a\n'
  for name, body in (header, *chunks, (b'IDAT', zlib.compress(bytes(100))), (b'IEND', b'')):
    data += struct.pack('>I', len(body)) + name + body
    data += struct.pack('>I', zlib.crc32(name + body))
  return data


@pytest.mark.parametrize(
  'size, found', [((10000, 5001), '10000 x 5001'), ((40000, 40000), '1600000000')]
)
def test_decompression_bomb(clip, size, found):
  # Our limit, and Pillow's own, which strikes first where an image is larger still. The pixels are
  # not there: had decoding begun, the error would speak of a truncated file.
  with open(clip.frame_path(1), 'wb') as file:
    file.write(png_of(*size))
  file_error(lambda: load_frame(clip, 1, 32), clip.frame_path(1), found)


def test_damaged_bytes_give_user_errors_only(clip):
  # Whatever the decoder stumbles over, the error names the file.
  rng = np.random.default_rng(0)
  for path, load in (
    (clip.frame_path(0), lambda: load_frame(clip, 0, 32)),
    (clip.label_ids_path(0), lambda: load_label_ids(clip, 0)),
  ):
    with open(path, 'rb') as file:
      good = file.read()
    errors = 0
    for _ in range(150):
      bad = bytearray(good[: rng.integers(1, len(good) + 1)])
      for place in rng.integers(0, len(bad), 4):
        bad[place] = rng.integers(0, 256)
      with open(path, 'wb') as file:
        file.write(bad)
      try:
        load()
      except UserError as error:
        assert path in str(error)
        errors += 1
    assert errors > 50


# Labels


def test_ids_and_colours(clip):
  ids = load_label_ids(clip, 2)
  np.testing.assert_array_equal(ids, label_pixels(2))
  assert ids.dtype == np.uint8
  rgb = load_label_rgb(clip, 2)
  np.testing.assert_array_equal(rgb, avsbench.PALETTE[label_pixels(2)])
  assert rgb.dtype == np.uint8


def test_ids_win_over_colours(clip):
  Image.fromarray(np.full((45, 80, 3), 200, np.uint8)).save(clip.label_rgb_path(2))
  np.testing.assert_array_equal(load_label_ids(clip, 2), label_pixels(2))
  assert (load_label_rgb(clip, 2) == 200).all()


def test_ids_come_from_colours_where_there_are_none(clip):
  os.remove(clip.label_ids_path(2))
  np.testing.assert_array_equal(load_label_ids(clip, 2), label_pixels(2))


def test_colours_come_from_ids_where_there_are_none(clip):
  ids = label_pixels(2)
  ids[0] = 255
  Image.fromarray(ids).save(clip.label_ids_path(2))
  os.remove(clip.label_rgb_path(2))
  want = avsbench.PALETTE[label_pixels(2)]
  want[0] = 0
  np.testing.assert_array_equal(load_label_rgb(clip, 2), want)
  np.testing.assert_array_equal(load_label_ids(clip, 2), ids)


def test_grey_label_saved_in_colour_is_read(clip):
  Image.fromarray(label_pixels(2)).convert('RGB').save(clip.label_ids_path(2))
  np.testing.assert_array_equal(load_label_ids(clip, 2), label_pixels(2))


def test_no_label(clip):
  os.remove(clip.label_ids_path(2))
  os.remove(clip.label_rgb_path(2))
  for load in (load_label_ids, load_label_rgb):
    file_error(lambda load=load: load(clip, 2), clip.label_ids_path(2), clip.label_rgb_path(2))


@pytest.mark.parametrize('value', [71, 128, 254])
def test_id_of_no_class(clip, value):
  ids = label_pixels(2)
  ids[3, 4:6] = value
  Image.fromarray(ids).save(clip.label_ids_path(2))
  found = (f'class id {value} ', '2 pixels')
  file_error(lambda: load_label_ids(clip, 2), clip.label_ids_path(2), *found)
  os.remove(clip.label_rgb_path(2))
  file_error(lambda: load_label_rgb(clip, 2), clip.label_ids_path(2), *found)


def test_colours_where_ids_belong(clip):
  Image.fromarray(labels.ids_to_colours(label_pixels(2), avsbench.PALETTE)).save(
    clip.label_ids_path(2)
  )
  file_error(lambda: load_label_ids(clip, 2), clip.label_ids_path(2), 'coloured')


def test_a_few_unknown_colours_are_background_and_logged_once(clip, caplog):
  os.remove(clip.label_ids_path(2))
  rgb = labels.ids_to_colours(label_pixels(2), avsbench.PALETTE)
  rgb[15, 25:32] = (100, 50, 3)
  Image.fromarray(rgb).save(clip.label_rgb_path(2))
  want = label_pixels(2)
  want[15, 25:32] = 0
  with caplog.at_level(logging.INFO):
    np.testing.assert_array_equal(load_label_ids(clip, 2), want)
    load_label_ids(clip, 2)
  messages = [record.getMessage() for record in caplog.records]
  assert len(messages) == 1
  assert clip.label_rgb_path(2) in messages[0] and '7 of 3600' in messages[0]


def test_a_wrong_palette(clip):
  os.remove(clip.label_ids_path(2))
  rgb = np.zeros((45, 80, 3), np.uint8)
  rgb[:23] = (100, 50, 3)
  Image.fromarray(rgb).save(clip.label_rgb_path(2))
  file_error(lambda: load_label_ids(clip, 2), clip.label_rgb_path(2), '1840 of 3600')


def test_truncated_label(clip):
  with open(clip.label_ids_path(1), 'r+b') as file:
    file.truncate(60)
  file_error(lambda: load_label_ids(clip, 1), clip.label_ids_path(1))


# Sound


def test_log_mel_has_an_example_a_frame(root):
  for clip in read_index(root):
    got = load_log_mel(clip)
    assert got.shape == (clip.num_frames, 96, 64) and got.dtype == np.float32
    want = audio.log_mel_examples(audio.read_wav(root / clip.subset / clip.uid / 'audio.wav')[0])
    np.testing.assert_array_equal(got, want)


def test_missing_sound(clip):
  os.remove(clip.audio_path)
  file_error(lambda: load_log_mel(clip), clip.audio_path, 'No such file')


def test_half_of_unknown_colours_is_not_too_much(clip):
  os.remove(clip.label_ids_path(2))
  rgb = np.zeros((46, 80, 3), np.uint8)
  rgb[:23] = (100, 50, 3)
  Image.fromarray(rgb).save(clip.label_rgb_path(2))
  assert not load_label_ids(clip, 2).any()

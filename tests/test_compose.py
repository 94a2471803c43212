import csv
import functools
import hashlib
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
import wave

import cv2
import numpy as np
import pytest
import soundfile

from aavs_jax.input_pipeline import avsbench, labels
from aavs_jax.input_pipeline.compose import scenes, sounds
from aavs_jax.input_pipeline.compose.dataset import compose
from aavs_jax.input_pipeline.errors import UserError

SIZE = (64, 48)
CLIPS = {
  'train': {'v1s': 24, 'v1m': 6, 'v2': 5},
  'val': {'v1s': 2, 'v1m': 2},
  'test': {'v1s': 2, 'v1m': 4, 'v2': 4},
}
SMALL = {'train': {'v1s': 2, 'v1m': 1}, 'test': {'v2': 1}}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  return compose(tmp_path_factory.mktemp('set'), clips=CLIPS, size=SIZE)


def rows_of(root):
  with open(root / 'metadata.csv', newline='', encoding='utf-8') as file:
    return list(csv.DictReader(file))


def tree_hash(root):
  total = hashlib.sha256()
  for path in sorted(p for p in root.rglob('*') if p.is_file()):
    total.update(path.relative_to(root).as_posix().encode() + b'\0' + path.read_bytes())
  return total.hexdigest()


def read_ids(root, row, t):
  return cv2.imread(str(root / row['label'] / row['uid'] / f'labels_semantic/{t}.png'), -1)


def read_audio(root, row):
  with wave.open(str(root / row['label'] / row['uid'] / 'audio.wav')) as file:
    assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16000, 1, 2)
    return np.frombuffer(file.readframes(10**7), '<i2') / 32768


def seconds_of(row):
  """Names of the classes that sound in each second, a set a second."""
  return [set(filter(None, second.split('_'))) for second in row['seconds'].split('|')]


def test_layout(root):
  rows = rows_of(root)
  assert len(rows) == sum(sum(counts.values()) for counts in CLIPS.values())
  assert len({row['uid'] for row in rows}) == len(rows)
  for first in '-_':
    assert any(row['uid'].startswith(first) for row in rows)
  for row in rows:
    seconds = {'v1s': 5, 'v1m': 5, 'v2': 10}[row['label']]
    vid, start, end = row['uid'].rsplit('_', 2)
    assert (row['vid'], row['s_min'], row['s_max']) == (vid, start, end) and len(vid) == 11
    assert int(end) - int(start) == 1000 * seconds
    folder = root / row['label'] / row['uid']
    labelled = 1 if row['label'] == 'v1s' and row['split'] == 'train' else seconds
    for name, ending, count in (
      ('frames', 'jpg', seconds),
      ('labels_rgb', 'png', labelled),
      ('labels_semantic', 'png', labelled),
    ):
      assert {p.name for p in (folder / name).iterdir()} == {f'{t}.{ending}' for t in range(count)}
    assert len(read_audio(root, row)) == 16000 * seconds
    assert cv2.imread(str(folder / 'frames/0.jpg')).shape == (48, 64, 3)
    rgb = cv2.imread(str(folder / 'labels_rgb/0.png'))[..., ::-1]
    ids, unknown = labels.colours_to_ids(rgb, avsbench.PALETTE)
    assert unknown == 0
    np.testing.assert_array_equal(ids, read_ids(root, row, 0))
  indices = json.loads((root / 'label2idx.json').read_text())
  assert indices['background'] == 1 and indices['woman'] == 71 and len(indices) == 71
  assert {p.name for p in root.iterdir()} == {
    'compose.json', 'label2idx.json', 'metadata.csv', 'v1s', 'v1m', 'v2'
  }  # fmt: skip


def test_labels_show_who_sounds(root):
  silent = distractors = both = 0
  areas = []
  for row in rows_of(root):
    seconds, audio = seconds_of(row), read_audio(root, row)
    for t, names in enumerate(seconds):
      rms = np.sqrt(np.mean(audio[16000 * t : 16000 * (t + 1)] ** 2))
      assert rms > 0.01 if names else rms < 0.004
      if t and row['label'] == 'v1s' and row['split'] == 'train':
        continue
      ids = read_ids(root, row, t)
      present = set(np.unique(ids)) - {0}
      assert {avsbench.CLASSES[i] for i in present} == names
      areas += [np.mean(ids == i) for i in present]
    assert set(row['a_obj'].split('_')) == set().union(*seconds)
    if row['label'] == 'v1s':
      assert all(len(names) == 1 for names in seconds)
      continue
    assert 2 <= len(row['visible'].split('_')) <= 3
    silent += sum(not names for names in seconds)
    both += sum(len(names) == 2 for names in seconds)
    distractors += len(set(row['visible'].split('_')) - set(row['a_obj'].split('_')))
  assert silent > 5 and both > 5 and distractors > 3
  assert 0.04 < np.median(areas) < 0.16


def test_all_that_is_visible_can_be_labelled_and_nothing_sounds(tmp_path):
  clips = {'train': {'v1m': 3}}
  silent = compose(tmp_path / 'visible', clips=clips, size=SIZE, visible=True)
  heard = compose(tmp_path / 'some', clips=clips, size=SIZE)
  for row, twin in zip(rows_of(silent), rows_of(heard), strict=True):
    assert row['uid'] == twin['uid'] and row['a_obj'] == row['visible'] == twin['visible']
    assert seconds_of(row) == [set()] * 5
    assert np.abs(read_audio(silent, row)).max() < 0.02 < np.abs(read_audio(heard, twin)).max()
    for t in range(5):
      frames = [root / 'v1m' / row['uid'] / f'frames/{t}.jpg' for root in (silent, heard)]
      assert frames[0].read_bytes() == frames[1].read_bytes()
      everything, some = read_ids(silent, row, t), read_ids(heard, twin, t)
      assert (everything[some > 0] == some[some > 0]).all()
      assert len(np.unique(everything)) >= 3  # the background and two objects or more


def test_each_vggish_example_hears_its_own_second_only(root):
  row = next(r for r in rows_of(root) if r['label'] == 'v2' and '||' in r['seconds'])
  audio = read_audio(root, row)
  for i, names in enumerate(seconds_of(row)):
    example = audio[round(0.96 * i * 16000) :][: round(0.96 * 16000)]
    assert (np.sqrt(np.mean(example**2)) > 0.01) == bool(names)


def spectrum(second):
  """Log power in 40 bands, 125 to 7500 Hz: mean and spread over 25 ms windows."""
  windows = second[: 400 * (len(second) // 400)].reshape(-1, 400) * np.hanning(400)
  power = np.abs(np.fft.rfft(windows, 512)) ** 2
  edges = np.geomspace(125, 7500, 41) / 31.25
  bands = [power[:, int(a) : int(b) + 1].mean(1) for a, b in itertools.pairwise(edges)]
  loudness = np.log(np.stack(bands, 1) + 1e-3)
  return np.concatenate([loudness.mean(0), loudness.std(0)])


def test_the_sound_tells_the_class(root):
  # Learnt on clips of one object; the test split has sounds that training has not.
  known, heard, truth, found = [], [], [], []
  rows = rows_of(root)
  for row in rows:
    audio = read_audio(root, row)
    for t, names in enumerate(seconds_of(row)):
      if len(names) == 1:
        feature = spectrum(audio[16000 * t :][:10240])
        if row['label'] == 'v1s' and row['split'] == 'train':
          known.append(feature)
          heard.append(*names)
        elif row['split'] == 'test':
          found.append(feature)
          truth.append(*names)
  distances = np.abs(np.array(found)[:, None] - np.array(known)).sum(-1)
  right = [heard[i] == name for i, name in zip(distances.argmin(1), truth) if name in set(heard)]
  assert len(right) > 20 and np.mean(right) > 0.95


def test_test_split_has_its_own_variants():
  for thing in scenes.drawn_things(70):
    for shared, reserved in (
      (thing.pictures, thing.test_pictures),
      (thing.sounds, thing.test_sounds),
    ):
      assert len(shared) > 1 and len(reserved) > 1
      ways = [repr(variant.args) for variant in shared + reserved]
      assert len(set(ways)) == len(ways)


def test_the_seed_decides_every_byte(tmp_path):
  for name, seed in (('a', 3), ('b', 3), ('c', 4)):
    compose(tmp_path / name, clips=SMALL, size=SIZE, seed=seed)
  assert tree_hash(tmp_path / 'a') == tree_hash(tmp_path / 'b')
  assert not {r['uid'] for r in rows_of(tmp_path / 'a')} & {
    r['uid'] for r in rows_of(tmp_path / 'c')
  }


def test_the_bytes_are_those_of_earlier_versions(tmp_path):
  # Sets that exist are reused and compared, so what the settings mean must not change unnoticed.
  root = compose(tmp_path / 'set', clips=SMALL, size=SIZE, seed=3)
  for name, digest in (
    ('metadata.csv', '2323c9c004097d42'),
    ('compose.json', 'b17cddf7a75765cb'),
    ('label2idx.json', 'db9d8dff05a08131'),
  ):
    assert hashlib.sha256((root / name).read_bytes()).hexdigest()[:16] == digest


def test_a_clip_does_not_depend_on_the_others(tmp_path, root):
  compose(tmp_path / 'few', clips={'test': {'v1m': 1}}, size=SIZE)
  (row,) = rows_of(tmp_path / 'few')
  alone, among = (r / 'v1m' / row['uid'] for r in (tmp_path / 'few', root))
  assert tree_hash(alone) == tree_hash(among)


def test_reuse_and_conflict(tmp_path):
  make = functools.partial(compose, tmp_path / 'set', clips=SMALL, size=SIZE)
  make()
  times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')}
  calls = []
  make(progress=lambda *args: calls.append(args))
  assert not calls and times == {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')}
  with pytest.raises(UserError, match=r'set holds.*\(seed differ.*choose another folder'):
    make(seed=1)
  gone = next((tmp_path / 'set' / 'v2').iterdir())
  before = tree_hash(tmp_path / 'set')
  shutil.rmtree(gone)
  make()
  assert tree_hash(tmp_path / 'set') == before
  with pytest.raises(UserError, match='gs://bucket/set'):
    compose('gs://bucket/set', clips=SMALL)
  (tmp_path / 'other').mkdir()
  (tmp_path / 'other' / 'metadata.csv').write_text('mine')
  with pytest.raises(UserError, match='not composed here'):
    compose(tmp_path / 'other', clips=SMALL)
  assert [p.name for p in (tmp_path / 'other').iterdir()] == ['metadata.csv']


def test_an_interrupted_set_is_finished_with_the_same_bytes(tmp_path):
  def stop(done, total):
    assert total == 4
    if done == 2:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    compose(tmp_path / 'a', clips=SMALL, size=SIZE, progress=stop)
  assert {p.name for p in (tmp_path / 'a').iterdir()} == {'compose.json', 'label2idx.json', 'v1s'}
  compose(tmp_path / 'a', clips=SMALL, size=SIZE)
  compose(tmp_path / 'b', clips=SMALL, size=SIZE)
  assert tree_hash(tmp_path / 'a') == tree_hash(tmp_path / 'b')


OBJECT = {'train': {'v1s': 3, 'v1m': 2}, 'test': {'v1s': 1, 'v1m': 1}}


def test_the_object_layout_has_the_same_clips(tmp_path):
  semantic = compose(tmp_path / 'semantic', clips=OBJECT, size=SIZE, seed=2)
  root = compose(tmp_path / 'object', clips=OBJECT, size=SIZE, seed=2, layout='object')
  top = {'compose.json', 's4_meta_data.csv', 's4_data', 'ms3_meta_data.csv', 'ms3_data'}
  assert {path.name for path in root.iterdir()} == top
  tables = {}
  for name in ('s4', 'ms3'):
    with open(root / f'{name}_meta_data.csv', newline='') as file:
      tables[name] = list(csv.reader(file))
  assert tables['s4'].pop(0) == ['name', 'category', 'split']
  assert tables['ms3'].pop(0) == ['video_id', 'split']

  sounding = 0
  for row in rows_of(semantic):
    uid, split, single = row['uid'], row['split'], row['label'] == 'v1s'
    found = tables['s4' if single else 'ms3'].pop(0)
    assert found == ([uid, row['a_obj'], split] if single else [uid, split])
    data = root / ('s4_data' if single else 'ms3_data')
    place = f'{split}/{row["a_obj"]}/{uid}' if single else f'{split}/{uid}'
    pictures = data / 'visual_frames' / (place if single else uid)
    wav = data / 'audio_wav' / f'{place}.wav'
    old = semantic / row['label'] / uid
    assert wav.read_bytes() == (old / 'audio.wav').read_bytes()
    ending = '' if single else '.mp4'
    assert {p.name for p in pictures.iterdir()} == {f'{uid}{ending}_{t}.png' for t in range(1, 6)}
    labelled = 1 if single and split == 'train' else 5
    masks = data / 'gt_masks' / place
    names = {f'{uid}_{t}.png' for t in range(1, labelled + 1)}
    assert {p.name for p in masks.iterdir()} == names
    for t in range(5):
      frame = cv2.imread(str(pictures / f'{uid}{ending}_{t + 1}.png'), -1)
      assert frame.shape == (224, 224, 3)
      jpeg = cv2.resize(cv2.imread(str(old / f'frames/{t}.jpg')), (224, 224))
      assert np.abs(frame.astype(int) - jpeg).mean() < 6
      if t < labelled:
        mask = cv2.imread(str(masks / f'{uid}_{t + 1}.png'), -1)
        ids = read_ids(semantic, row, t)
        assert mask.shape == (224, 224) and set(np.unique(mask)) <= {0, 255}
        rows, columns = ((np.arange(224) + 0.5) * n / 224 for n in ids.shape)
        nearest = ids[rows.astype(int)[:, None], columns.astype(int)]
        assert ((mask > 0) == (nearest > 0)).mean() > 0.99  # ties on the edges
        sounding += mask.any()
  assert not any(tables.values()) and sounding > 10


def test_the_object_layout_is_reproducible_reused_and_finished(tmp_path):
  make = functools.partial(compose, clips=OBJECT, size=SIZE, layout='object')

  def stop(done, total):
    if done == 4:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    make(tmp_path / 'a', progress=stop)
  assert not list((tmp_path / 'a').glob('*.csv'))
  # As if stopped between the moves of one clip: its sound and masks are there, its frames not.
  frames = sorted((tmp_path / 'a' / 's4_data' / 'visual_frames').glob('*/*/*'))
  assert len(frames) == 3
  shutil.rmtree(frames[1])
  make(tmp_path / 'a')
  make(tmp_path / 'b')
  assert tree_hash(tmp_path / 'a') == tree_hash(tmp_path / 'b')
  times = {p: p.stat().st_mtime_ns for p in (tmp_path / 'a').rglob('*')}
  make(tmp_path / 'a')
  assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / 'a').rglob('*')}
  with pytest.raises(UserError, match=r'\(layout differ'):
    compose(tmp_path / 'a', clips=OBJECT, size=SIZE)
  compose(tmp_path / 'c', clips=OBJECT, size=SIZE)
  with pytest.raises(UserError, match=r'\(layout differ'):
    make(tmp_path / 'c')


def test_one_subset_of_the_object_layout(tmp_path):
  root = compose(tmp_path, clips={'val': {'v1m': 1}}, size=SIZE, layout='object')
  assert {path.name for path in root.glob('*m*')} == {
    'compose.json',
    'ms3_meta_data.csv',
    'ms3_data',
  }


def test_a_killed_run_leaves_whole_clips_only(tmp_path):
  clips = {'train': {'v2': 40}}
  code = (
    'from aavs_jax.input_pipeline.compose.dataset import compose; '
    f'compose({str(tmp_path / "a")!r}, clips={clips})'
  )
  child = subprocess.Popen([sys.executable, '-c', code])
  while child.poll() is None and len(list(tmp_path.glob('a/v2/[!.]*'))) < 2:
    time.sleep(0.005)
  child.send_signal(signal.SIGKILL)
  child.wait()
  done = list(tmp_path.glob('a/v2/[!.]*'))
  assert 2 <= len(done) < 40 and not (tmp_path / 'a/metadata.csv').exists()
  for folder in done:
    assert sum(p.is_file() for p in folder.rglob('*')) == 31
  compose(tmp_path / 'a', clips=clips)
  assert not list(tmp_path.glob('a/**/.*'))
  assert len(rows_of(tmp_path / 'a')) == len(list(tmp_path.glob('a/v2/*'))) == 40


@pytest.mark.parametrize(
  'change, text',
  [
    ({'clips': {'train': {'v3': 1}}}, 'v3'),
    ({'clips': {'train': {'v1s': 0}}}, 'at least one clip'),
    ({'clips': {'train': {'v1s': -1}}}, r"clips\['train'\]\['v1s'\] is -1"),
    ({'num_classes': 71}, 'num_classes is 71'),
    ({'size': (8, 64)}, 'size is'),
    ({'size': (64, 100_000)}, 'size is'),
    ({'seed': -1}, 'seed is -1'),
    ({'layout': 's4'}, "layout is 's4'"),
    ({'layout': 'object'}, r"clips\['test'\]\['v2'\] is 1, but AVSBench-object has no v2"),
    ({'sprites': 'nowhere'}, 'nowhere does not exist'),
  ],
)
def test_bad_settings(tmp_path, change, text):
  with pytest.raises(UserError, match=text):
    compose(tmp_path / 'a', **{'clips': SMALL, **change})
  assert not (tmp_path / 'a').exists()


@pytest.fixture
def sprites(tmp_path):
  """Two classes: a green square that hums at 440 Hz, a blue one (two pictures) at 3 kHz."""
  for name, colours, pitch, rate, ending in (
    ('lion', [(0, 255, 0)], 440, 16000, 'wav'),
    ('tuba', [(255, 0, 0), (0, 0, 255)], 3000, 44100, 'flac'),
  ):
    folder = tmp_path / 'sprites' / name
    folder.mkdir(parents=True)
    for i, bgr in enumerate(colours):
      image = np.zeros((50, 40, 4), np.uint8)
      image[10:40, 5:35] = (*bgr, 255)
      cv2.imwrite(str(folder / f'{i}.png'), image)
    time_axis = np.arange(rate // 4) / rate  # shorter than a window: looped
    soundfile.write(folder / f'0.{ending}', 0.3 * np.sin(2 * np.pi * pitch * time_axis), rate)
  return tmp_path / 'sprites'


def test_sprites(tmp_path, sprites):
  clips = {'train': {'v1m': 4}, 'test': {'v1m': 4}}
  root = compose(tmp_path / 'set', clips=clips, size=SIZE, sprites=sprites)
  for row in rows_of(root):
    audio = read_audio(root, row)
    for t, names in enumerate(seconds_of(row)):
      ids = read_ids(root, row, t)
      assert {avsbench.CLASSES[i] for i in np.unique(ids) if i} == names
      power = np.abs(np.fft.rfft(audio[16000 * t :][:10240] * np.hanning(10240))) ** 2
      hertz = np.fft.rfftfreq(10240, 1 / 16000)
      for name, pitch in (('lion', 440), ('tuba', 3000)):
        near = power[np.abs(hertz - pitch) < 50].sum() / power.sum()
        assert (near > 0.1) == (name in names)
      frame = cv2.imread(str(root / 'v1m' / row['uid'] / f'frames/{t}.jpg'))
      if 'tuba' in names:  # the last picture, red, is for test only
        core = cv2.erode((ids == avsbench.CLASSES.index('tuba')).astype(np.uint8), np.ones((5, 5)))
        expected = (0, 0, 255) if row['split'] == 'test' else (255, 0, 0)
        assert np.abs(frame[core > 0].mean(0) - expected).max() < 40
  cv2.imwrite(str(sprites / 'lion' / '1.png'), np.full((9, 9, 4), 255, np.uint8))
  with pytest.raises(UserError, match='sprites differ'):
    compose(root, clips=clips, size=SIZE, sprites=sprites)


def test_bad_sprites(tmp_path, sprites):
  def fails(text):
    with pytest.raises(UserError, match=text):
      compose(tmp_path / 'set', clips=SMALL, sprites=sprites)

  (sprites / 'dragon').mkdir()
  fails('dragon is not named after a class')
  (sprites / 'dragon').rename(sprites / 'dog')
  fails('dog holds 0 .*at least one of each')
  (sprites / 'dog' / 'a.png').touch()
  (sprites / 'dog' / 'a.wav').touch()
  fails(r'a\.png is not an 8-bit PNG')
  cv2.imwrite(str(sprites / 'dog' / 'a.png'), np.zeros((9, 9, 3), np.uint8))
  (sprites / 'dog' / 'a.wav').write_bytes(b'noise')
  fails(r'a\.png has no alpha')
  cv2.imwrite(str(sprites / 'dog' / 'a.png'), np.zeros((9, 9, 4), np.uint8))
  fails(r'a\.png is transparent')
  cv2.imwrite(str(sprites / 'dog' / 'a.png'), np.full((9, 9, 4), 255, np.uint8))
  fails(r'a\.wav is not a readable sound file')
  soundfile.write(sprites / 'dog' / 'a.wav', np.zeros(16000), 16000)
  fails(r'a\.wav is silent')
  for value in (np.nan, np.inf):
    soundfile.write(sprites / 'dog' / 'a.wav', np.full(16000, value), 16000, subtype='FLOAT')
    fails(r'a\.wav: sample 0 is (nan|inf)')
  soundfile.write(sprites / 'dog' / 'a.wav', np.ones(sounds.LENGTH) * 0.1, 16000)
  compose(tmp_path / 'set', clips=SMALL, sprites=sprites)

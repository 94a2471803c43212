"""Prediction on sources of one's own: the files written, against the models called directly."""

import errno
import functools
import gc
import json
import os
import re
import signal
import threading
import time

import jax
import numpy as np
import optax
import pytest
import soundfile
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

from aavs_jax import cli, methods
from aavs_jax import predict as predict_lib
from aavs_jax.configs import quick_stage1, quick_stage2
from aavs_jax.devices.mesh import make_mesh
from aavs_jax.input_pipeline import audio
from aavs_jax.input_pipeline.avsbench import CLASSES
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.input_pipeline.files import write_json
from aavs_jax.media.overlay import SOUNDING_COLOUR, overlay
from aavs_jax.media.video import read_windows
from aavs_jax.predict import expand, load_models, predict, predict_all, read_clip_folder
from aavs_jax.scoring.predictor import Predictor
from aavs_jax.training import checkpoint
from aavs_jax.training.state import create, flat_shapes
from aavs_jax.training.work_folder import load_trained
from tests.test_video import COLOURS, decode, write_video

RATE = audio.SAMPLE_RATE


@pytest.fixture(scope='module', autouse=True)
def compile_once(tmp_path_factory):
  """Every prediction compiles its models anew; from the second time on they come from here."""
  jax.config.update('jax_compilation_cache_dir', str(tmp_path_factory.mktemp('compiled')))
  compilation_cache.reset_cache()
  yield
  jax.config.update('jax_compilation_cache_dir', None)
  compilation_cache.reset_cache()


def make_workdir(folder, config, seed, **changes):
  """A work folder as training leaves it, of a model as small as it can be, with random weights."""
  config.data.image_size = 32
  config.data.eval_size = 16
  config.model.swin.update(embed_dim=8, depths=(1, 0, 0, 0), heads=(1, 1, 2, 2), window=3)
  config.model.hidden = 32
  config.model.heads = 2
  config.model.encoder_layers = 0
  config.model.decoder_layers = 1
  config.model.decoder_ffn = 32
  config.vggish.conv_widths = (2,) * 6
  config.vggish.dense_widths = (8,)
  config.vggish.embedding = 8
  config.update_from_flattened_dict(changes)
  rng = np.random.default_rng(seed)
  abstract = flat_shapes(methods.of(config))
  params = {
    path: jax.numpy.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype)
    for path, leaf in abstract.items()
  }
  write_json(folder / 'config.json', config.to_dict())
  manager = checkpoint.make_manager(folder / 'checkpoints', 1)
  checkpoint.save(manager, create(params, list(params)[:3], optax.sgd(1.0)), 1, {'miou': 0.5})
  manager.wait_until_finished()
  manager.close()
  return folder


@pytest.fixture(scope='module')
def stage1(tmp_path_factory):
  # Of most seeds the masks are full or empty whatever the input; of these they depend on all of it.
  return make_workdir(tmp_path_factory.mktemp('models') / 'stage1', quick_stage1.get_config(), 25)


@pytest.fixture(scope='module')
def stage2(tmp_path_factory):
  return make_workdir(tmp_path_factory.mktemp('models') / 'stage2', quick_stage2.get_config(), 10)


@pytest.fixture(scope='module')
def end_to_end(tmp_path_factory):
  folder = tmp_path_factory.mktemp('models') / 'end_to_end'
  return make_workdir(folder, quick_stage2.get_config(), 10, use_prior=False)


def make_clip(folder, numbers, seconds, suffix='.png', seed=0):
  """Frames of noise in two sizes, and sound that changes every second."""
  rng = np.random.default_rng(seed)
  (folder / 'frames').mkdir(parents=True)
  frames = []
  for i, number in enumerate(numbers):
    coarse = rng.integers(0, 256, (4, 5 + i % 2, 3), dtype=np.uint8)
    frames.append(coarse.repeat(12, 0).repeat(16, 1))
    Image.fromarray(frames[-1]).save(folder / 'frames' / f'{number}{suffix}')
  times = np.arange(round(seconds * RATE)) / RATE
  loudness = 0.05 + 0.1 * (np.floor(times) % 5)
  wave = loudness * np.sin(2 * np.pi * (300 + 350 * np.floor(times)) * times)
  soundfile.write(folder / 'audio.wav', wave, RATE)
  return frames


@functools.cache
def loaded(workdir):
  config, params, _ = load_trained(workdir)
  # Placed as `predict` does, so that the compiled model is found again.
  replicated = NamedSharding(make_mesh(), PartitionSpec())
  return config, jax.device_put(params, replicated), Predictor(methods.of(config))


def call_directly(workdir, frames, log_mel, prior=None):
  """What a model gives for frames of any size, five at a time, the last five perhaps again."""
  config, params, predictor = loaded(workdir)
  size = (config.data.image_size,) * 2
  small = [Image.fromarray(f).resize(size, Image.Resampling.BILINEAR) for f in frames]
  batch = {'frames': np.stack(small), 'log_mel': log_mel}
  if prior is not None:
    batch['prior'] = prior
  result = [None] * len(frames)
  for start in range(0, len(frames), 5):
    places = (np.arange(5) + min(start, max(len(frames) - 5, 0))) % len(frames)
    answer = predictor(params, {name: value[places] for name, value in batch.items()})
    answer = np.asarray(answer)
    for place, row in zip(places, answer):
      result[place] = row
  return np.stack(result)


def stage1_masks(workdir, frames, log_mel):
  return (call_directly(workdir, frames, log_mel).argmax(1) * 255).astype(np.uint8)


def enlarge(ids, height, width):
  rows = ((np.arange(height) + 0.5) * ids.shape[0] / height).astype(int)
  columns = ((np.arange(width) + 0.5) * ids.shape[1] / width).astype(int)
  return ids[rows[:, None], columns]


def read(path):
  with Image.open(path) as image:
    return np.asarray(image)


def names(folder):
  return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope='module')
def video(tmp_path_factory):
  return write_video(tmp_path_factory.mktemp('video') / 'twelve.mp4', 12)


@pytest.fixture(scope='module')
def answered(video, stage1, stage2, tmp_path_factory):
  """The output folder of a video of 12 s."""
  parent = tmp_path_factory.mktemp('answered')
  out = predict(video, stage1=stage1, stage2=stage2, out=parent / 'a' / 'out')
  assert out == parent / 'a' / 'out' and names(parent) == ['a'] and names(out.parent) == ['out']
  return out


@pytest.fixture(scope='module')
def by_hand(video, stage1, stage2):
  """Frames, log-mels, masks and classes of the same video."""
  windows = list(read_windows(video, 10))
  frames = np.concatenate([window[0] for window in windows])
  log_mel = np.concatenate([audio.log_mel_examples(w)[: len(f)] for f, w, _ in windows])
  masks = stage1_masks(stage1, frames, log_mel)
  return frames, log_mel, masks, call_directly(stage2, frames, log_mel, masks)


def test_masks_of_two_windows_are_the_models_own(answered, by_hand, stage1):
  out = answered
  frames, log_mel, masks, _ = by_hand
  assert sorted(map(int, (p.stem for p in (out / 'masks').iterdir()))) == list(range(12))
  shifted = stage1_masks(stage1, frames, np.roll(log_mel, 1, 0))
  assert (shifted != masks).any((1, 2)).sum() >= 6  # so it matters which second is heard
  for t in range(12):
    written = read(out / 'masks' / f'{t}.png')
    assert written.dtype == np.uint8
    np.testing.assert_array_equal(written, enlarge(masks[t], 48, 64))


def test_stage_2_starts_from_the_masks_of_stage_1(answered, by_hand, stage2):
  out = answered
  frames, log_mel, masks, classes = by_hand
  assert len(names(out / 'classes')) == 12
  for t in range(12):
    np.testing.assert_array_equal(read(out / 'classes' / f'{t}.png'), enlarge(classes[t], 48, 64))
  for other in (np.zeros_like(masks), 255 - masks):
    assert (call_directly(stage2, frames, log_mel, other) != classes).any()


def test_overlays_show_the_classes_over_the_frames(answered, by_hand):
  out = answered
  frames, _, _, classes = by_hand
  assert len(names(out / 'overlays')) == 12
  for t in range(12):
    drawn = read(out / 'overlays' / f'{t}.jpg').astype(int)
    expected = overlay(frames[t], enlarge(classes[t], 48, 64))
    assert np.abs(drawn - expected).mean() < 12  # JPEG halves the resolution of colours
    assert np.abs(drawn - frames[t]).mean() > 20


def test_overlay_video_plays_as_long_with_sound(answered):
  out = answered
  frames, sound, rate = decode(out / 'overlay.mp4')
  assert len(frames) == 60 and frames[0][1].shape == (48, 64, 3)
  assert sound.shape[1] / rate == pytest.approx(12, abs=0.1) and np.abs(sound).max() > 0.1
  for second in (0, 11):
    picture = frames[5 * second + 2][1].astype(int)
    still = read(out / 'overlays' / f'{second}.jpg')
    assert np.abs(picture - still).mean() < 15
    assert np.abs(picture - COLOURS[second % 6]).mean() > 20  # something is drawn


def test_summary_counts_the_pixels_of_the_files(answered, video, stage1, stage2):
  out = answered
  summary = json.loads((out / 'summary.json').read_text())
  frames, digests = summary.pop('frames'), summary.pop('digests')
  assert digests.keys() == {'source', 'stage1', 'stage2'} and len(set(digests.values())) == 3
  assert summary == {
    'source': str(video),
    'seconds': 12,
    'every': 1,
    'stage1': str(stage1),
    'stage2': str(stage2),
  }
  assert [frame['second'] for frame in frames] == list(range(12))
  for t, frame in enumerate(frames):
    mask, ids = read(out / 'masks' / f'{t}.png'), read(out / 'classes' / f'{t}.png')
    assert frame['sounding_share'] == pytest.approx((mask == 255).mean())
    assert {c['id'] for c in frame['classes']} == set(np.unique(ids)) - {0}
    shares = [c['share'] for c in frame['classes']]
    assert shares == sorted(shares, reverse=True)
    for entry in frame['classes']:
      assert entry['name'] == CLASSES[entry['id']]
      assert entry['share'] == pytest.approx((ids == entry['id']).mean())


def test_clip_folder_in_numeric_order_with_stage_1_alone(stage1, tmp_path):
  clip, out = tmp_path / 'clip', tmp_path / 'out'
  # By name 10.png would come before 8.png. Names of the system's own files do not count.
  frames = make_clip(clip, range(8, 14), 6)
  (clip / 'frames' / '._8.png').write_bytes(b'not an image')
  out.mkdir()  # an empty folder will do
  predict(clip, stage1=stage1, out=out)
  assert names(out) == ['masks', 'overlays', 'summary.json']
  masks = stage1_masks(stage1, frames, audio.clip_log_mel(clip / 'audio.wav', 6))
  for t, frame in enumerate(frames):
    written = read(out / 'masks' / f'{t}.png')
    np.testing.assert_array_equal(written, enlarge(masks[t], *frame.shape[:2]))
    drawn = read(out / 'overlays' / f'{t}.jpg')
    assert drawn.shape == frame.shape
  assert len(names(out / 'masks')) == 6
  frames_told = json.loads((out / 'summary.json').read_text())['frames']
  assert all(frame['classes'] == [] for frame in frames_told)
  t = max(range(6), key=lambda t: frames_told[t]['sounding_share'])
  distance = np.abs(read(out / 'overlays' / f'{t}.jpg').astype(int) - SOUNDING_COLOUR)
  assert distance.mean() < np.abs(frames[t].astype(int) - SOUNDING_COLOUR).mean()


def test_frames_of_a_clip_folder_are_turned_as_a_phone_marks_them(tmp_path):
  (stored,) = make_clip(tmp_path, [0], 1)
  mark = Image.Exif()
  mark[0x0112] = 6  # orientation: its first row is at the right
  Image.fromarray(stored).save(tmp_path / 'frames' / '0.png', exif=mark)
  (((frame,), _, _),) = read_clip_folder(tmp_path)
  np.testing.assert_array_equal(frame, np.rot90(stored, -1))


def test_model_trained_end_to_end_needs_no_stage_1(end_to_end, tmp_path):
  frames = make_clip(tmp_path / 'clip', [0], 1)
  out = predict(tmp_path / 'clip', stage1=None, stage2=end_to_end, out=tmp_path / 'out')
  log_mel = audio.clip_log_mel(tmp_path / 'clip' / 'audio.wav', 1)
  classes = enlarge(call_directly(end_to_end, frames, log_mel)[0], *frames[0].shape[:2])
  np.testing.assert_array_equal(read(out / 'classes' / '0.png'), classes)
  np.testing.assert_array_equal(read(out / 'masks' / '0.png'), np.where(classes > 0, 255, 0))
  assert json.loads((out / 'summary.json').read_text())['stage1'] is None


def break_clip(clip, how):
  frame, sound = clip / 'frames' / '1.png', clip / 'audio.wav'
  if how == 'folder':
    (clip / 'frames').rename(clip / 'pictures')
  elif how == 'empty':
    for path in (clip / 'frames').iterdir():
      path.unlink()
  elif how == 'gap':
    frame.unlink()
  elif how == 'twice':
    (clip / 'frames' / '1.jpg').write_bytes(b'')
  elif how == 'name':
    frame.rename(clip / 'frames' / 'one.png')
  elif how == 'mute':
    sound.unlink()
  elif how == 'blip':
    soundfile.write(sound, np.ones(100) / 2, RATE)


@pytest.mark.parametrize(
  ('how', 'words'),
  [
    ('folder', 'no folder named frames'),
    ('empty', 'no JPEG or PNG'),
    ('gap', r'2\.png comes after 0\.png'),
    ('twice', 'comes after'),
    ('name', 'one.png is not named by a number'),
    ('mute', 'audio.wav: the sound file cannot be read'),
    ('blip', 'lasts 0.006 s'),
  ],
)
def test_broken_clip_folders_are_refused(how, words, stage1, tmp_path):
  make_clip(tmp_path / 'clip', range(3), 3)
  break_clip(tmp_path / 'clip', how)
  with pytest.raises(UserError, match=words):
    predict(tmp_path / 'clip', stage1=stage1, out=tmp_path / 'out')
  assert names(tmp_path) == ['clip']


def test_damage_met_half_way_leaves_nothing_behind(stage1, tmp_path):
  make_clip(tmp_path / 'clip', range(11), 11)
  (tmp_path / 'clip' / 'frames' / '10.png').write_bytes(b'not an image')
  with pytest.raises(UserError, match=r'10\.png: the image cannot be read'):
    predict(tmp_path / 'clip', stage1=stage1, out=tmp_path / 'new' / 'out')
  assert names(tmp_path) == ['clip']


@pytest.fixture
def no_model(monkeypatch):
  """Everything sounds, whatever the model."""

  def full(frames, log_mel):
    return np.full((len(frames), 4, 4), 255, np.uint8), None

  def load(stage1, stage2):
    return full, {'stage1': stage1}

  monkeypatch.setattr('aavs_jax.predict.load_models', load)


@pytest.mark.parametrize(('number', 'status'), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_ended_leaves_nothing_behind(
  number, status, no_model, tmp_path, monkeypatch, capsys
):
  make_clip(tmp_path / 'clip', range(2), 2)
  monkeypatch.setattr(
    'aavs_jax.predict.overlay_binary', lambda frame, mask: os.kill(os.getpid(), number)
  )
  assert _predict_until_a_signal(tmp_path) == status and names(tmp_path) == ['clip']
  assert len(capsys.readouterr().err.splitlines()) <= 1


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize(('number', 'status'), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_heard_while_garbage_is_collected(
  number, status, no_model, tmp_path, monkeypatch
):
  """Python drops what is raised in the collector's callbacks."""
  make_clip(tmp_path / 'clip', range(2), 2)
  sent = []

  def callback(phase, info):
    if not sent:
      sent.append(number)
      os.kill(os.getpid(), number)

  def collect(frame, mask):
    gc.callbacks.append(callback)
    gc.collect()
    gc.callbacks.remove(callback)
    time.sleep(20)  # unless the signal comes

  monkeypatch.setattr('aavs_jax.predict.overlay_binary', collect)
  assert _predict_until_a_signal(tmp_path) == status and names(tmp_path) == ['clip']


def _predict_until_a_signal(tmp_path):
  # A shell's background job ignores SIGINT.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  before = signal.getsignal(signal.SIGTERM)
  try:
    return cli.main(
      ['predict', str(tmp_path / 'clip'), '--stage1', 'any', '--out', str(tmp_path / 'out')]
    )
  except SystemExit as error:
    return error.code
  finally:
    assert signal.getsignal(signal.SIGTERM) == before
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_windows_are_read_answered_and_written_side_by_side(tmp_path, monkeypatch):
  make_clip(tmp_path / 'clip', range(12), 12)  # two windows
  second_read, second_answered = threading.Event(), threading.Event()

  def windows(folder):
    for window in read_clip_folder(folder):
      if window[2]:
        second_read.set()
      yield window

  def answer(frames, log_mel):
    assert second_read.wait(20), 'the second window is not read before the first is answered'
    if len(frames) == 2:
      second_answered.set()
    return np.full((len(frames), 4, 4), 255, np.uint8), None

  def draw(frame, mask):
    assert second_answered.wait(20), 'the second one is not answered before the first is written'
    return frame

  monkeypatch.setattr('aavs_jax.predict.read_clip_folder', windows)
  monkeypatch.setattr('aavs_jax.predict.load_models', lambda stage1, stage2: (answer, {}))
  monkeypatch.setattr('aavs_jax.predict.overlay_binary', draw)
  out = predict(tmp_path / 'clip', stage1='any', out=tmp_path / 'out')
  assert len(names(out / 'masks')) == 12


def test_frames_of_other_sizes_are_answered_at_their_own(no_model, tmp_path):
  source = tmp_path / 'v.ts'
  sizes = [(48, 64), (64, 48)]
  pieces = [write_video(tmp_path / f'{size}.ts', 0.8, size=size) for size in sizes]
  source.write_bytes(b''.join(piece.read_bytes() for piece in pieces))
  out = predict(source, stage1='any', out=tmp_path / 'out')
  assert [read(out / 'masks' / f'{second}.png').shape for second in range(2)] == sizes
  assert {frame.shape[:2] for _, frame in decode(out / 'overlay.mp4')[0]} == {(48, 64)}


def test_a_source_that_may_not_be_read_does_not_keep_others(
  no_model, tmp_path, monkeypatch, capsys
):
  for name in 'ab':
    make_clip(tmp_path / name, range(1), 1)
  listed = predict_lib._frame_paths

  def refuse(folder):
    if folder.name in refused:
      raise PermissionError(errno.EACCES, 'Permission denied', str(folder / 'frames'))
    return listed(folder)

  monkeypatch.setattr(predict_lib, '_frame_paths', refuse)
  command = ['predict', str(tmp_path / 'a'), str(tmp_path / 'b'), '--stage1', 'any']
  refused = 'ab'
  assert cli.main([*command, '--out', str(tmp_path / 'none')]) == 2
  assert '2 of 2 sources failed' in (said := capsys.readouterr().err) and 'others' not in said
  refused = 'a'
  assert cli.main([*command, '--out', str(tmp_path / 'out')]) == 2
  told = capsys.readouterr()
  assert 'Permission denied' in told.out and 'the others are in' in told.err
  assert names(tmp_path / 'out') == ['b']


def test_several_sources_are_answered_each_in_a_folder_of_its_own(no_model, tmp_path, capsys):
  folder, clip, out = tmp_path / 'videos', tmp_path / 'clip', tmp_path / 'out'
  folder.mkdir()
  write_video(folder / 'a.mp4', 1)
  write_video(folder / 'b.mkv', 2)
  (folder / 'c.mov').write_bytes(b'this is no video' * 100)
  (folder / 'notes.txt').write_text('no video either')
  make_clip(clip, range(3), 3)
  command = ['predict', str(folder), str(clip), '--stage1', 'any', '--out', str(out)]
  assert cli.main(command) == 2
  told = capsys.readouterr()
  assert '1 of 4 sources failed' in told.err and 'c.mov' in told.err
  assert 'FAILED: ' in told.out and 'c.mov cannot be read as a video' in told.out
  assert re.search(r'b\.mkv: 2 frames in 0:\d\d, [\d.]+/s', told.out)
  assert 'passed over: notes.txt' in told.out
  assert names(out) == ['a', 'b', 'clip']
  assert [len(names(out / name / 'masks')) for name in names(out)] == [1, 2, 3]

  # The same command goes on with what is not there.
  write_video(folder / 'c.mov', 1)
  kept = (out / 'b' / 'summary.json').stat().st_mtime_ns
  assert cli.main(command) == 0
  assert capsys.readouterr().out.count('is there') == 3
  assert names(out) == ['a', 'b', 'c', 'clip']
  assert (out / 'b' / 'summary.json').stat().st_mtime_ns == kept
  # Elsewhere, the same videos are the same; another one under a name is not.
  moved = folder.rename(tmp_path / 'moved')
  command[1] = str(moved)
  assert cli.main(command) == 0
  assert capsys.readouterr().out.count('is there') == 4
  write_video(moved / 'a.mp4', 2)
  assert cli.main(command) == 2
  told = capsys.readouterr().out
  assert told.count('is there') == 3 and 'a is not what this command gives' in told
  command[command.index('any')] = 'another'
  assert cli.main(command) == 2 and 'b is not what this command gives' in capsys.readouterr().out
  (out / 'mine').mkdir()
  assert cli.main(command) == 2 and 'out is not empty' in capsys.readouterr().err


def test_two_sources_of_one_name_are_refused(no_model, tmp_path):
  sources = [write_video(tmp_path / 'a.mp4', 1), tmp_path / 'a.mkv']
  with pytest.raises(UserError, match=r'a\.mp4 and .*a\.mkv would both be written to .*out/a:'):
    predict_all(sources, stage1='any', out=tmp_path / 'out')
  assert names(tmp_path) == ['a.mp4']


def test_more_frames_a_second_hear_what_begins_with_them(tmp_path, monkeypatch):
  heard = []

  def listen(frames, log_mel):
    heard.extend(zip(frames, log_mel))
    return np.full((len(frames), 4, 4), 255, np.uint8), None

  monkeypatch.setattr('aavs_jax.predict.load_models', lambda stage1, stage2: (listen, {}))
  source = write_video(tmp_path / 'v.mkv', 6)
  out = predict(source, stage1='any', out=tmp_path / 'out', every=0.4)
  assert len(heard) == 15 == len(names(out / 'masks'))
  (_, waveform, _), *_ = read_windows(source, 6)
  for t, (frame, log_mel) in enumerate(heard):
    colour = COLOURS[int(t * 0.4 + 1e-6)]
    np.testing.assert_allclose(frame[24:, 32:].mean((0, 1)), colour, atol=12)
    start, last = round(t * 0.4 * RATE), len(waveform) - audio.samples_needed(1)
    off = np.abs(log_mel - audio.log_mel_examples(waveform[min(start, last) :])[0])
    # The sound of the file ends some milliseconds after its last second.
    assert off.max() == 0 if start <= last else off.mean() < 0.2
  summary = json.loads((out / 'summary.json').read_text())
  assert (summary['seconds'], summary['every']) == (pytest.approx(6), 0.4)
  assert [frame['second'] for frame in summary['frames'][:3]] == [0, 0.4, 0.8]


def test_fewer_frames_a_second(no_model, tmp_path):
  source = write_video(tmp_path / 'v.mp4', 5.4)
  out = predict(source, stage1='any', out=tmp_path / 'out', every=2)
  assert len(names(out / 'masks')) == 3  # 2.7, rounded
  for t in range(3):
    drawn = read(out / 'overlays' / f'{t}.jpg')[24:, 32:]
    expected = 0.45 * COLOURS[2 * t] + 0.55 * np.array(SOUNDING_COLOUR)
    np.testing.assert_allclose(drawn[4:-4, 4:-4].mean((0, 1)), expected, atol=12)


@pytest.mark.parametrize('every', [0, -1, 1 / 3, float('nan'), 1e9])
def test_times_between_frames_that_cannot_be(every, no_model, tmp_path):
  for call, sources in ((predict, tmp_path / 'v.mp4'), (predict_all, [tmp_path / 'v.mp4'])):
    with pytest.raises(UserError, match='is no time from a frame to the next'):
      call(sources, stage1='any', out=tmp_path / 'out', every=every)


def test_a_clip_folder_has_one_frame_a_second(no_model, tmp_path):
  make_clip(tmp_path / 'clip', range(2), 2)
  with pytest.raises(UserError, match='one frame a second: --every is for videos'):
    predict(tmp_path / 'clip', stage1='any', out=tmp_path / 'out', every=2)


def test_sources_that_do_not_exist_or_are_no_video(stage1, tmp_path):
  junk = tmp_path / 'junk.mp4'
  junk.write_bytes(b'this is no video' * 100)
  for source, words in ((tmp_path / 'none', 'does not exist'), (junk, 'cannot be read')):
    with pytest.raises(UserError, match=words):
      predict(source, stage1=stage1, out=tmp_path / 'out')
  assert names(tmp_path) == ['junk.mp4']


def test_output_must_be_a_new_or_empty_folder(stage1, tmp_path):
  make_clip(tmp_path / 'clip', [0], 1)
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'thesis.txt').write_text('mine')
  (tmp_path / 'file').write_text('mine')
  for out, words in (
    ('full', 'is not empty'),
    ('file', 'is a file'),
    ('file/below', 'cannot be written'),
  ):
    with pytest.raises(UserError, match=words):
      predict(tmp_path / 'clip', stage1=stage1, out=tmp_path / out)
  assert names(tmp_path) == ['clip', 'file', 'full'] and names(tmp_path / 'full') == ['thesis.txt']
  with pytest.raises(UserError, match='would be standard output'):
    predict(tmp_path / 'clip', stage1=stage1, out='-')


def test_models_must_fit_their_stages(stage1, stage2, tmp_path):
  other_size = make_workdir(
    tmp_path / 'other', quick_stage1.get_config(), 0, **{'data.eval_size': 32}
  )
  for first, second, words in (
    (None, None, 'no model is given'),
    (stage2, None, 'semantic task, but --stage1'),
    (stage1, stage1, 'binary task, but --stage2'),
    (None, stage2, 'starts from masks of stage 1'),
    (other_size, stage2, 'eval_size is 32 in'),
    (tmp_path / 'nowhere', None, 'config.json is missing'),
  ):
    with pytest.raises(UserError, match=words):
      load_models(first, second)


def test_an_answer_to_other_sound_or_other_times_is_none(no_model, tmp_path):
  clip = tmp_path / 'clip'
  make_clip(clip, range(2), 2)
  out = tmp_path / 'out'
  predict_all([clip], stage1='any', out=out)
  sound = (clip / 'audio.wav').read_bytes()
  (clip / 'audio.wav').write_bytes(sound[:-2] + b'\1\1')
  with pytest.raises(UserError, match='1 of 1 sources failed'):
    predict_all([clip], stage1='any', out=out)
  (clip / 'audio.wav').write_bytes(sound)
  summary = json.loads((out / 'clip' / 'summary.json').read_text())
  predict_all([clip], stage1='any', out=out)
  (out / 'clip' / 'summary.json').write_text(json.dumps(summary | {'every': 0.5}))
  with pytest.raises(UserError, match='1 of 1 sources failed'):
    predict_all([clip], stage1='any', out=out)


def test_short_sound_is_heard_to_its_last_example_in_later_windows_too(
  tmp_path, monkeypatch, capsys
):
  heard = []

  def listen(frames, log_mel):
    heard.extend(log_mel)
    return np.full((len(frames), 4, 4), 255, np.uint8), None

  monkeypatch.setattr('aavs_jax.predict.load_models', lambda stage1, stage2: (listen, {}))
  clip = tmp_path / 'clip'
  make_clip(clip, range(13), 7.5)
  predict(clip, stage1='any', out=tmp_path / 'out')
  expected = audio.clip_log_mel(clip / 'audio.wav', 13)
  assert (expected[:6] != expected[6]).any((1, 2)).all()
  np.testing.assert_array_equal(heard, expected)
  assert '6 s too short' in capsys.readouterr().out


def test_videos_of_a_folder_whatever_their_suffix_looks_like(tmp_path):
  for name in ('b.mp4', 'a.MOV', '._a.MOV', '.DS_Store', 'notes.txt'):
    (tmp_path / name).touch()
  assert expand(tmp_path) == [tmp_path / 'a.MOV', tmp_path / 'b.mp4']
  assert expand(tmp_path / 'notes.txt') == [tmp_path / 'notes.txt']

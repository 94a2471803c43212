"""The page of `aavs demo`: what it refuses, and what a browser makes of a video on it.

The models are of a method in this file, which no rounding of a colour confuses much, as it would
one of random weights.
"""

import functools
import http.server
import importlib.util
import json
import shutil
import threading
from fractions import Fraction

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from aavs_jax import demo
from aavs_jax.configs import quick_stage1, quick_stage2
from aavs_jax.input_pipeline import audio
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.input_pipeline.files import write_json
from aavs_jax.input_pipeline.images import read_image, resize_frame
from aavs_jax.input_pipeline.index import read_index
from aavs_jax.media.overlay import legend_colour
from aavs_jax.methods import aavs
from aavs_jax.methods.method import Method
from aavs_jax.predict import predict
from aavs_jax.types import Variables
from tests import browser
from tests.test_predict import make_workdir

NAME = 'tests.test_demo'
SIZE = 96  # as the quickstart's; of which the sides of the video, 384x288, are multiples
MAY_BE_ZERO = aavs.MAY_BE_ZERO
READY = "!document.getElementById('file').disabled"
DONE = r"/all \d+ seconds done/.test(document.getElementById('status').textContent)"
# Until a condition holds, or the page shows an error, which is thrown.
UNTIL = """
  const error = document.getElementById('error');
  while (!(%s)) {
    if (!error.hidden) throw error.textContent;
    await new Promise((done) => setTimeout(done, 50));
  }
"""


def check(config, need):
  pass


def method(config) -> Method:
  """What is colourful sounds, the louder its second the more so; redder and greener are classes."""

  def init(key):
    return Variables({'aavs': {'weights': jax.random.normal(key, (2,))}}, {})

  def apply(variables, batch, key=None):
    frames = batch['frames'].astype(jnp.float32) / 255
    loudness = batch['log_mel'].mean((1, 2))[:, None, None]
    # The weights, near nought in make_workdir, are there to be saved.
    weights = 1e-3 * variables.params['aavs']['weights']
    colourful = frames.max(-1) - frames.min(-1) + weights[0]
    quiet = jnp.broadcast_to(-0.2 * loudness + weights[1], colourful.shape)
    if config.task == 'binary':
      return jnp.stack([quiet, colourful], 1), {}
    kind = 1 + (frames[..., 0] > frames[..., 1])
    return jnp.where(batch['prior'] > 0, kind, 0).astype(jnp.uint8), {}

  inputs = ('frames', 'log_mel') + ('prior',) * config.use_prior
  return Method(init, apply, None, None, lambda outputs: outputs, inputs=inputs)


def until(condition):
  return UNTIL % condition


@pytest.fixture
def no_models(monkeypatch):
  """Exports nothing but a description, of models that see `unit` frames together."""

  def use(unit=1):
    def export(workdir, out, form, stage1=None):
      out.mkdir()
      inputs = [{'name': 'frames', 'shape': [unit, 8, 8, 3]}]
      write_json(out / 'model.json', {'stages': {'stage1': {'inputs': inputs}}})

    monkeypatch.setattr(demo, 'export', export)

  use()
  return use


@pytest.fixture
def runtime(tmp_path_factory):
  """What stands for the unpacked npm package."""
  folder = tmp_path_factory.mktemp('package')
  (folder / 'dist').mkdir()
  for name in demo._RUNTIME_FILES:
    (folder / name).write_text(name)
  return folder


def test_the_folder_holds_all_that_the_page_names(no_models, runtime, tmp_path):
  out = demo.write_demo(tmp_path / 'page', stage1='any', runtime=runtime)
  found = {str(path.relative_to(out)) for path in out.rglob('*') if path.is_file()}
  assert found == {
    'index.html', 'page.css', 'page.js', 'worker.js', 'inputs.js', 'microphone.js',
    'models/model.json', 'onnxruntime/package.json',
    'onnxruntime/ort.wasm.bundle.min.mjs', 'onnxruntime/ort-wasm-simd-threaded.wasm',
  }  # fmt: skip


def test_what_cannot_be_is_refused_and_leaves_nothing(no_models, runtime, tmp_path, monkeypatch):
  def refused(words, out='page', **options):
    with pytest.raises(UserError, match=words):
      demo.write_demo(tmp_path / out, stage1='any', **options)
    assert [path.name for path in tmp_path.iterdir()] == ['mine']

  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'thesis.txt').write_text('mine')
  refused('mine is not empty', out='mine', runtime=runtime)
  no_models(unit=5)
  refused('any sees 5 frames of a clip together', runtime=runtime)
  # What lacks is found before a model is exported, which takes long.
  monkeypatch.setattr(demo, 'export', None)
  monkeypatch.setenv('PATH', '')
  refused('there is no npm to fetch it: name the unpacked .*--onnxruntime')
  (runtime / 'package.json').unlink()
  refused('has no package.json', runtime=runtime)


def test_npm_that_fails_is_quoted(no_models, tmp_path, monkeypatch):
  npm = tmp_path / 'bin' / 'npm'
  npm.parent.mkdir()
  npm.write_text('#!/bin/sh\necho "npm ERR! network is down" >&2\nexit 1\n')
  npm.chmod(0o755)
  monkeypatch.setenv('PATH', f'{npm.parent}:/usr/bin:/bin')
  with pytest.raises(UserError, match=r'could not fetch onnxruntime-web@.*network is down'):
    demo.write_demo(tmp_path / 'page', stage1='any')
  assert not (tmp_path / 'page').exists()


def write_clip_video(path, clip, seconds, sound=True):
  """A composed clip, four times as large, as H.264 with AAC at 44.1 kHz, as phones make it."""
  rate = 44100
  waveform, stored = audio.read_wav(clip.audio_path)
  times = np.arange(seconds * rate) / rate
  wave = np.interp(times, np.arange(len(waveform)) / stored, waveform).astype(np.float32)
  with av.open(str(path), 'w') as container:
    frames = [read_image(clip.frame_path(t)) for t in range(seconds)]
    frames = [frame.repeat(4, 0).repeat(4, 1) for frame in frames]
    picture = container.add_stream('libx264', rate=5, options={'crf': '12'})
    picture.height, picture.width, picture.pix_fmt = *frames[0].shape[:2], 'yuv420p'
    tone = container.add_stream('aac', rate=rate, layout='mono') if sound else None
    for i in range(5 * seconds):
      frame = av.VideoFrame.from_ndarray(frames[i // 5], format='rgb24')
      frame.pts, frame.time_base = i, Fraction(1, 5)
      container.mux(picture.encode(frame))
    container.mux(picture.encode(None))
    for start in range(0, len(wave) if sound else 0, 1024):
      piece = np.ascontiguousarray(wave[None, start : start + 1024])
      frame = av.AudioFrame.from_ndarray(piece, format='fltp', layout='mono')
      frame.pts, frame.sample_rate, frame.time_base = start, rate, Fraction(1, rate)
      container.mux(tone.encode(frame))
    if sound:
      container.mux(tone.encode(None))
  return path


@pytest.fixture(scope='module')
def served(tmp_path_factory):
  """The work folders of both stages, and the address of their page."""
  if not (browser.CHROMIUM and browser.DRIVER and shutil.which('npm')):
    pytest.skip('there is no Chromium with chromedriver, or no npm')
  if importlib.util.find_spec('jax2onnx') is None:
    pytest.skip('the extra `onnx` is not installed')
  folder = tmp_path_factory.mktemp('demo')
  sizes = {'method': NAME, 'data.image_size': SIZE, 'data.eval_size': SIZE}
  stage1 = make_workdir(folder / 'stage1', quick_stage1.get_config(), 0, **sizes)
  stage2 = make_workdir(folder / 'stage2', quick_stage2.get_config(), 0, **sizes)
  out = demo.write_demo(folder / 'page', stage1=stage1, stage2=stage2)
  handler = functools.partial(Quiet, directory=out)
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield stage1, stage2, f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
  def log_message(self, *_):
    pass


@pytest.fixture(scope='module')
def page(served, tmp_path_factory):
  """The browser with the page, when the models are loaded."""
  fake = ('--use-fake-device-for-media-stream', '--use-fake-ui-for-media-stream')
  chromium = browser.Browser(tmp_path_factory.mktemp('profile'), *fake)
  try:
    chromium.open(served[2])
    chromium.run(until(READY))
    yield chromium
    assert not [text for level, text in chromium.console() if level == 'SEVERE']
  finally:
    chromium.close()


# Seeks every second; gives the pixels of the canvas and the names that are shown.
READ_SECONDS = """
  const player = document.getElementById('player'), canvas = document.getElementById('marks');
  const answers = [];
  for (let second = 0; second < given[0]; second++) {
    const arrived = new Promise((done) => player.addEventListener('seeked', done, { once: true }));
    player.currentTime = second + 0.5;
    await arrived;
    const { width, height } = canvas;
    const { data } = canvas.getContext('2d').getImageData(0, 0, width, height);
    const names = [...document.querySelectorAll('#classes li')].map((row) => row.textContent);
    answers.push({ width, height, names, pixels: Array.from(new Uint32Array(data.buffer)) });
  }
  return answers;
"""


def at_frame(answer, height, width):
  """RGBA of the canvas at the centre of each pixel of a frame, uint8 [H W 4]."""
  pixels = np.array(answer['pixels'], np.uint32).reshape(answer['height'], answer['width'])
  rows = ((np.arange(height) + 0.5) * answer['height'] / height).astype(int)
  columns = ((np.arange(width) + 0.5) * answer['width'] / width).astype(int)
  return np.ascontiguousarray(pixels[rows[:, None], columns])[..., None].view(np.uint8)


@pytest.mark.browser
def test_masks_and_classes_are_those_of_predict(served, page, data_root, tmp_path):
  stage1, stage2, _ = served
  clip = next(clip for clip in read_index(data_root, 'test') if clip.num_frames == 10)
  video = write_clip_video(tmp_path / 'clip.mp4', clip, 10)
  out = predict(video, stage1=stage1, stage2=stage2, out=tmp_path / 'predicted')
  page.choose_file('#file', video)
  page.run(until(DONE))
  shared = either = same = 0
  told = json.loads((out / 'summary.json').read_text())['frames']
  answers = page.run(READ_SECONDS, 10)
  for t, answer in enumerate(answers):
    ids = np.asarray(Image.open(out / 'classes' / f'{t}.png'))
    rgba = at_frame(answer, *ids.shape)
    colour, drawn = rgba[..., :3].astype(int), rgba[..., 3] > 0
    marked = drawn & (colour > 0).any(-1)  # black is the outer contour
    shared += (marked & (ids > 0)).sum()
    either += (marked | (ids > 0)).sum()
    inside = marked & (colour < 255).any(-1)  # white is the inner one
    expected = np.array([legend_colour(i) for i in range(ids.max() + 1)])[ids]
    same += (np.abs(colour - expected).max(-1) <= 2)[inside].mean()
    assert {row.rpartition(' (')[0] for row in answer['names']} >= {
      entry['name'] for entry in told[t]['classes'] if entry['share'] > 0.02
    }
  assert either > 0 and shared / either >= 0.98
  assert same / len(answers) >= 0.98
  # What it hears matters.
  page.run("document.querySelector('[value=silence]').click();" + until(DONE))
  silent = page.run(READ_SECONDS, 10)
  assert sum(a['pixels'] != b['pixels'] for a, b in zip(answers, silent)) >= 3
  page.run("document.querySelector('[value=true]').click();")


LOG_MEL = """
  const { logMel } = await import('./inputs.js');
  return Array.from(logMel(Float32Array.from(given[0])));
"""
HALVE = """
  const { halve, logMel } = await import('./inputs.js');
  return Array.from(logMel(halve(Float32Array.from(given[0]))));
"""
RESIZE = """
  const { resize } = await import('./inputs.js');
  return Array.from(resize(new ImageData(Uint8ClampedArray.from(given[0]), given[1]), given[2]));
"""


@pytest.mark.browser
def test_log_mel_and_small_frames_are_the_packages(page):
  rng = np.random.default_rng(0)
  loudness = np.linspace(0, 0.5, audio.samples_needed(1)) ** 2
  tone = np.sin(2 * np.pi * 440 * np.arange(len(loudness)) / audio.SAMPLE_RATE)
  for wave in (loudness * rng.normal(size=len(loudness)), loudness * tone, 0 * loudness):
    wave = wave.astype(np.float32)
    heard = np.reshape(page.run(LOG_MEL, wave.tolist()), (96, 64))
    np.testing.assert_allclose(heard, audio.log_mel_examples(wave)[0], rtol=0, atol=1e-3)
  wave = rng.normal(scale=0.1, size=2 * len(loudness)).astype(np.float32)  # at 32 kHz
  heard = np.reshape(page.run(HALVE, wave.tolist()), (96, 64))
  expected = audio.log_mel_examples(audio.resample(wave, 2 * audio.SAMPLE_RATE))[0]
  np.testing.assert_allclose(heard, expected, rtol=0, atol=2e-2)
  assert np.abs(heard - expected).mean() < 1e-3
  for height, width, size in ((90, 160, 32), (20, 24, 32), (33, 65, 32), (32, 32, 32)):
    frame = rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
    frame[..., 3] = 255
    small = np.reshape(page.run(RESIZE, frame.ravel().tolist(), width, size), (size, size, 3))
    expected = resize_frame(Image.fromarray(frame[..., :3]), size)
    np.testing.assert_array_equal(small, expected)


@pytest.mark.browser
def test_camera_and_microphone_are_seen_and_heard(page):
  """Chromium's stand-ins: a clock that turns, and a beep."""
  mel = "document.getElementById('mel').getContext('2d').getImageData(0, 0, 96, 64).data.buffer"
  heard = f'new Set(new Uint32Array({mel})).size > 2'
  second = "document.getElementById('second').textContent >= 2"
  page.run(f"document.getElementById('camera').click(); {until(f'{second} && {heard}')}")
  seen = 'document.getElementById("marks").getContext("2d").getImageData(0, 0, 640, 480).data'
  assert page.run(f'return {seen}.every((value, i) => i % 4 < 3 || value === 255)')  # all of it


@pytest.mark.browser
def test_faults_are_one_sentence_on_the_page(page, data_root, tmp_path):
  junk = tmp_path / 'junk.mp4'
  junk.write_bytes(b'this is no video' * 100)
  clip = next(clip for clip in read_index(data_root, 'test') if clip.num_frames >= 5)
  mute = write_clip_video(tmp_path / 'mute.mp4', clip, 2, sound=False)
  large = tmp_path / 'large.mp4'
  with open(large, 'wb') as file:
    file.truncate(2**31)  # takes no place on the disk
  damaged = write_clip_video(tmp_path / 'damaged.mp4', clip, 5)
  content = damaged.read_bytes()
  half, tenth = len(content) // 2, len(content) // 10
  noise = np.random.default_rng(0).bytes(tenth)
  damaged.write_bytes(content[:half] + noise + content[half + tenth :])
  for path, words in (
    (junk, 'cannot show junk.mp4'),
    (mute, 'mute.mp4 has no sound that'),
    (large, 'large.mp4 has more than 2 GB'),
    (damaged, 'damaged.mp4 is damaged: second'),
  ):
    page.choose_file('#file', path)
    shown = page.run(
      "const error = document.getElementById('error');"
      'while (!error.textContent.includes(given[0])) await new Promise((r) => setTimeout(r, 50));'
      'return error.hidden ? "" : error.textContent',
      path.name,
    )
    assert words in shown
  video = write_clip_video(tmp_path / 'whole.mp4', clip, 2)
  page.choose_file('#file', video)
  page.run(until(DONE))  # goes on as if nothing had been

"""Artefacts for serving, against `aavs predict` and the rules of the host."""

import json
import runpy
import shutil
import subprocess
import sys
import wave
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax import export as jax_export
from PIL import Image

from aavs_jax import cli, export, methods, serving
from aavs_jax.configs import quick_stage1, quick_stage2
from aavs_jax.input_pipeline import audio, files
from aavs_jax.input_pipeline.avsbench import CLASSES
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.input_pipeline.images import resize_frame
from aavs_jax.input_pipeline.masks import of_scores
from aavs_jax.media.overlay import SOUNDING_COLOUR, legend_colour
from aavs_jax.methods.aavs import class_scores
from aavs_jax.predict import load_models
from aavs_jax.training.work_folder import Trained, load_stages, load_trained
from tests import small_maps, tiny
from tests.runs import ROOT
from tests.test_predict import make_workdir

pytest.importorskip('flatbuffers')  # of the extra `dev`
safetensors = pytest.importorskip('safetensors.numpy')

FRAMES = 5  # `aavs predict` sends so many through a model at once


@pytest.fixture(scope='module')
def stages(tmp_path_factory):
  folder = tmp_path_factory.mktemp('models')
  stage1 = make_workdir(folder / 'stage1', quick_stage1.get_config(), 25)
  return stage1, make_workdir(folder / 'stage2', quick_stage2.get_config(), 10)


@pytest.fixture(scope='module')
def artefact(stages, tmp_path_factory):
  out = tmp_path_factory.mktemp('artefacts') / 'both'
  return export.export(stages[1], out, 'stablehlo', stages[0])


@pytest.fixture(scope='module')
def inputs():
  """At the model's size, so that nothing is resized."""
  rng = np.random.default_rng(0)
  coarse = rng.integers(0, 256, (FRAMES, 4, 4, 3), dtype=np.uint8)
  log_mel = rng.normal(-2, 2, (FRAMES, 96, 64)).astype(np.float32)
  return {'frames': coarse.repeat(8, 1).repeat(8, 2), 'log_mel': log_mel}


@pytest.fixture(scope='module')
def predicted(stages, inputs):
  answer, _ = load_models(*stages)
  return answer(inputs['frames'], inputs['log_mel'])


def test_maps_are_those_of_predict_bit_for_bit(artefact, inputs, predicted):
  maps = serving.load(artefact).predict(inputs)
  assert 0 < (predicted[0] > 0).mean() < 1 and len(np.unique(predicted[1])) > 1
  np.testing.assert_array_equal(maps['mask'], predicted[0])
  np.testing.assert_array_equal(maps['classes'], predicted[1])
  one = serving.load(artefact).predict({name: value[:1] for name, value in inputs.items()})
  assert one['classes'].shape == (1, 16, 16)


def test_device_prepares_as_the_host_does(artefact):
  rng = np.random.default_rng(1)
  frames = rng.integers(0, 256, (4, 45, 131, 3), dtype=np.uint8)
  samples = rng.uniform(-1, 1, audio.samples_needed(3) + 7).astype(np.float32)
  prepared = serving.load(artefact).prepare({'frames': frames, 'samples': samples})
  host = np.stack([resize_frame(Image.fromarray(frame), 32) for frame in frames])
  off = np.abs(np.asarray(prepared['frames']).astype(int) - host)
  # Where a byte is half-way between two, the last bits decide: 0.14 % of these.
  assert off.max() <= 1 and (off > 0).mean() < 5e-3
  examples, repeated = audio.fit_examples(audio.log_mel_examples(samples), 4)
  assert repeated == 1
  np.testing.assert_allclose(prepared['log_mel'], examples, atol=1e-3)


def test_a_file_that_was_changed_is_refused(artefact, tmp_path):
  for path in artefact.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  with open(tmp_path / 'stage2.safetensors', 'r+b') as file:
    file.seek(-1, 2)
    file.write(b'\x7f')
  with pytest.raises(ValueError, match=r'stage2\.safetensors is not as it was written'):
    serving.load(tmp_path)


def test_example_needs_jax_and_numpy_alone(artefact, tmp_path):
  rng = np.random.default_rng(2)
  frames = rng.integers(0, 256, (2, 30, 40, 3), dtype=np.uint8)
  samples = rng.integers(-9000, 9000, 2 * 16000).astype('<i2')
  np.save(tmp_path / 'frames.npy', frames)
  with wave.open(str(tmp_path / 'sound.wav'), 'wb') as file:
    file.setnchannels(1)
    file.setsampwidth(2)
    file.setframerate(16000)
    file.writeframes(samples.tobytes())
  code = (
    'import runpy, sys\n'
    'runpy.run_path(sys.argv[0], run_name="__main__")\n'
    'used = {name.partition(".")[0] for name in sys.modules}\n'
    'assert not used & {"aavs_jax", "flax", "safetensors", "cv2", "PIL", "librosa"}, used\n'
  )
  example = [ROOT / 'launch/serve_example.py', artefact, 'frames.npy', 'sound.wav', 'maps.npz']
  code = f'import sys; sys.argv[:] = {[*map(str, example)]!r}\n{code}'
  run = [sys.executable, '-c', code]
  done = subprocess.run(run, cwd=tmp_path, text=True, capture_output=True)
  assert done.returncode == 0, done.stderr
  with wave.open(str(tmp_path / 'other.wav'), 'wb') as file:
    file.setparams((2, 2, 44100, 0, 'NONE', ''))
    file.writeframes(samples.tobytes())
  other = [part.replace("'sound.wav'", "'other.wav'") for part in run]
  refused = subprocess.run(other, cwd=tmp_path, text=True, capture_output=True)
  assert refused.returncode == 2 and 'other.wav is not mono, 16 bit and 16 kHz' in refused.stderr
  assert len(done.stdout.splitlines()) == 2 and 'of the frame sounds' in done.stdout
  served = serving.load(artefact)
  raw = {'frames': frames, 'samples': samples.astype(np.float32) / 32768}
  maps = served.predict(served.prepare(raw))
  with np.load(tmp_path / 'maps.npz') as written:
    for name in ('mask', 'classes'):
      np.testing.assert_array_equal(written[name], maps[name])


@pytest.mark.parametrize(
  ('wrong', 'path', 'words'),
  [
    (0, 'none', 'none/model.json is not a file: give'),
    (1, 'none.npy', 'none.npy is not a file: give'),
    (2, '', ' is not a file: give'),
    (3, 'none/maps.npz', 'none/maps.npz cannot be written: name'),
    (3, '.', '. cannot be written: name'),
  ],
)
def test_example_refuses_wrong_paths(wrong, path, words, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  for name in ('model.json', 'frames.npy', 'sound.wav'):
    (tmp_path / name).touch()
  paths = ['.', 'frames.npy', 'sound.wav', 'maps.npz']
  paths[wrong] = path
  with pytest.raises(SystemExit) as end:
    runpy.run_path(str(ROOT / 'launch/serve_example.py'))['main'](*paths)
  (line,) = capsys.readouterr().err.splitlines()
  assert end.value.code == 2 and line.startswith(words)


def test_example_without_its_arguments_says_what_it_takes(monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['serve_example.py', 'artefact'])
  with pytest.raises(SystemExit) as end:
    runpy.run_path(str(ROOT / 'launch/serve_example.py'), run_name='__main__')
  assert end.value.code == 2 and 'FRAMES.npy SOUND.wav OUT.npz' in capsys.readouterr().err


@pytest.mark.parametrize('soft', [False, True])
def test_mask_is_what_is_handed_over(soft, monkeypatch):
  scores = np.random.default_rng(3).random((3, 2, 40, 40), np.float32)
  scores[0, :, :2] = scores[0, :1, :2]  # ties
  scores[0, :, 2] = 0
  method = SimpleNamespace(apply=lambda _, batch: (batch, {}), predict=lambda outputs: outputs)
  monkeypatch.setattr('aavs_jax.methods.of', lambda config: method)
  given = export.function_of(SimpleNamespace(task='binary'), soft)(None, scores)
  np.testing.assert_array_equal(given['mask'], of_scores(scores, soft))


def log_mel_by_description(samples, told):
  """From the numbers and the sentence in model.json, and nothing else."""
  window, fft, bands = told['window'], told['fft'], told['mel_bands']
  starts = np.arange(told['example_frames']) * told['hop']
  hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
  spectra = np.fft.rfft(samples[starts[:, None] + np.arange(window)] * hann, fft)
  mel = 1127 * np.log(1 + np.arange(fft // 2 + 1) * told['sample_rate'] / fft / 700)
  points = np.linspace(*1127 * np.log(1 + np.array(told['mel_range']) / 700), bands + 2)
  triangles = [np.interp(mel, points[b : b + 3], (0, 1, 0)) for b in range(bands)]
  return np.log(np.abs(spectra)[:, 1:] @ np.array(triangles).T[1:] + told['log_offset'])


def test_model_json_is_all_that_a_caller_needs(artefact):
  model = json.loads((artefact / 'model.json').read_text())
  assert set(model['versions']) == {'aavs_jax', 'jax'}
  assert (model['image_size'], model['eval_size']) == (32, 16)
  assert model['classes'] == list(CLASSES)
  assert model['colours'][8] == list(legend_colour(8))
  assert model['sounding_colour'] == list(SOUNDING_COLOUR)
  assert [row['name'] for row in model['stages']['stage2']['inputs']] == [
    'frames',
    'log_mel',
    'prior',
  ]
  outputs = {row['name']: row for row in model['stages']['stage1']['outputs']}
  assert outputs['mask'] == {'name': 'mask', 'dtype': 'uint8', 'shape': ['n', 16, 16]}
  samples = np.random.default_rng(4).uniform(-1, 1, model['log_mel']['example_samples'])
  ours = audio.log_mel_examples(samples.astype(np.float32))[0]
  np.testing.assert_allclose(log_mel_by_description(samples, model['log_mel']), ours, atol=1e-5)


def test_what_cannot_be_exported_is_refused(stages, tmp_path, monkeypatch):
  stage1, stage2 = stages
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'mine').touch()
  for workdir, out, first, words in (
    (stage1, tmp_path / 'full', None, 'is not empty'),
    (stage1, '-', None, 'would be standard output'),
    (stage1, 'gs://bucket/out', None, 'is in a bucket'),
    (stage2, tmp_path / 'out', None, 'starts from masks of stage 1'),
    (stage1, tmp_path / 'out', stage1, 'leave --stage1 out'),
    (tmp_path / 'none', tmp_path / 'out', None, 'config.json is missing'),
  ):
    with pytest.raises(UserError, match=words):
      export.export(workdir, out, 'stablehlo', first)
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  with pytest.raises(UserError, match='onnx needs jax2onnx: install it as "Deploying"'):
    export.export(stage1, tmp_path / 'out', 'onnx')
  assert [path.name for path in tmp_path.iterdir()] == ['full']


def test_soft_masks_of_a_method_without_shares_are_refused(monkeypatch, tmp_path):
  second = tiny.get_config('stage2')
  second.prior.soft = True
  files.write_json(tmp_path / 'second' / 'config.json', second.to_dict())
  pair = Trained(small_maps.get_config('tpavi_stage1'), None), Trained(second, None)
  monkeypatch.setattr(export, 'load_stages', lambda *_: pair)
  monkeypatch.setattr(export, 'class_names', lambda _: [])
  with pytest.raises(UserError, match=r'first has scores below 0, of which no soft mask'):
    export.export(tmp_path / 'second', tmp_path / 'out', 'stablehlo', stage1='first')


@pytest.mark.parametrize('form', ['stablehlo', 'onnx'])
def test_stages_of_two_sizes_are_not_prepared_for_together(form, monkeypatch, tmp_path):
  first, second = tiny.get_config('stage1'), tiny.get_config('stage2')
  first.data.image_size = 64
  files.write_json(tmp_path / 'second' / 'config.json', second.to_dict())
  pair = Trained(first, None), Trained(second, None)
  monkeypatch.setattr(export, 'load_stages', lambda *_: pair)
  monkeypatch.setitem(export._NEEDS, form, ())
  with pytest.raises(UserError, match=r'image_size is 64 in first and 32 in .*second'):
    export.export(tmp_path / 'second', tmp_path / 'out', form, stage1='first')


def test_frames_that_a_stage_sees_together_are_filled_up(artefact, tmp_path):
  def stage(weights, batch):
    together = batch['frames'].reshape(-1, 5, 8, 8, 3)
    of_group = together + together[:, -1:]  # the last frame of five changes all of them
    return {'mask': of_group.reshape(-1, 8, 8, 3)[..., 0] + weights['one']}

  (count,) = jax_export.symbolic_shape('5*n')
  numbers = {'one': np.ones((), np.uint8)}
  (tmp_path / 'stage1.safetensors').write_bytes(safetensors.save(numbers))
  entry = export._write_exported(
    tmp_path / 'stage1.stablehlo',
    stage,
    {'one': jax.ShapeDtypeStruct((), np.uint8)},
    {'frames': jax.ShapeDtypeStruct((count, 8, 8, 3), np.uint8)},
  )
  entry |= {'weights': export._file(tmp_path / 'stage1.safetensors'), 'unit': 5}
  prepare = json.loads((artefact / 'model.json').read_text())['prepare']
  shutil.copyfile(artefact / prepare['file'], tmp_path / prepare['file'])
  files.write_json(tmp_path / 'model.json', {'stages': {'stage1': entry}, 'prepare': prepare})
  frames = np.arange(7, dtype=np.uint8)[:, None, None, None] * np.ones((8, 8, 3), np.uint8)
  mask = serving.load(tmp_path).predict({'frames': frames})['mask']
  np.testing.assert_array_equal(mask[:, 0, 0], [5, 6, 7, 8, 9, 12, 13])


def test_onnx_computes_in_float32(stages, monkeypatch, tmp_path):
  config, variables, _ = load_trained(stages[0])
  config.dtype = 'bfloat16'
  monkeypatch.setattr(export, '_NEEDS', {'onnx': ()})
  monkeypatch.setattr(export, 'load_stages', lambda *_: (Trained(config, variables), None))
  traced = lambda run, inputs, **_: str(jax.make_jaxpr(run)(*inputs)).encode()  # noqa: E731
  library = SimpleNamespace(
    to_onnx=lambda *args, **names: SimpleNamespace(SerializeToString=lambda: traced(*args))
  )
  monkeypatch.setitem(sys.modules, 'jax2onnx', library)
  out = export.export(stages[0], tmp_path / 'out', 'onnx')
  text = (out / 'stage1.onnx').read_text()
  assert 'f32' in text and 'bf16' not in text


def test_command_refuses_a_second_stage_in_a_state_dict(stages, capsys):
  arguments = ['export', str(stages[1]), 'out.pth', '--stage1', str(stages[0])]
  assert cli.main(arguments) == 2
  assert '--stage1 is not for --format torch' in capsys.readouterr().err


def test_an_error_half_way_leaves_nothing(stages, tmp_path, monkeypatch):
  def fail(*_):
    raise UserError('no more')

  monkeypatch.setattr('aavs_jax.export._write_prepare', fail)
  monkeypatch.setattr('aavs_jax.export._write_exported', lambda path, *_: path.touch() or {})
  with pytest.raises(UserError, match='no more'):
    export.export(stages[0], tmp_path / 'out', 'stablehlo')
  assert not list(tmp_path.iterdir())


def test_onnx_gives_the_same_maps(stages, inputs, predicted, tmp_path):
  pytest.importorskip('jax2onnx')
  onnxruntime = pytest.importorskip('onnxruntime')
  out = tmp_path / 'out'
  arguments = ['export', stages[1], out, '--format', 'onnx', '--stage1', stages[0]]
  assert cli.main([*map(str, arguments)]) == 0
  model = json.loads((out / 'model.json').read_text())
  assert sorted(path.name for path in out.iterdir()) == ['model.json', 'stage1.onnx', 'stage2.onnx']

  def run(stage, values):
    session = onnxruntime.InferenceSession(out / model['stages'][stage]['file'])
    names = [row['name'] for row in model['stages'][stage]['inputs']]
    found = [(x.name, x.type, x.shape) for x in session.get_inputs()]
    types = {'uint8': 'tensor(uint8)', 'float32': 'tensor(float)'}
    rows = model['stages'][stage]['inputs']
    assert found == [(row['name'], types[row['dtype']], row['shape']) for row in rows]
    outputs = [row['name'] for row in model['stages'][stage]['outputs']]
    frames = [
      session.run(outputs, {name: values[name][t : t + 1] for name in names}) for t in range(FRAMES)
    ]
    return {name: np.concatenate(of) for name, of in zip(outputs, zip(*frames))}

  def scores(stage, values):
    config, variables = stage
    batch = {name: values[name] for name in methods.of(config).inputs}
    outputs, _ = jax.jit(methods.of(config).apply)(variables, batch)
    last = outputs.mask_logits[-1], outputs.class_logits[-1]
    return np.asarray(class_scores(*last, config.data.image_size, config.data.eval_size))

  # Of random models many scores are 0 but for rounding: maps are compared where they are not.
  loaded = load_stages(*stages)
  first, ours = run('stage1', inputs), scores(loaded[0], inputs)
  np.testing.assert_allclose(first['scores'], ours, atol=5e-5 * ours.max())
  np.testing.assert_array_equal(first['mask'], of_scores(first['scores'], soft=False))
  clear = np.abs(ours[:, 0] - ours[:, 1]) > 1e-4
  assert clear.mean() > 0.5
  np.testing.assert_array_equal(first['mask'][clear], predicted[0][clear])

  given = {**inputs, 'prior': predicted[0]}
  second, ours = run('stage2', given), np.sort(scores(loaded[1], given), 1)
  clear = ours[:, -1] - ours[:, -2] > 1e-4
  assert clear.sum() > 20
  np.testing.assert_array_equal(second['classes'][clear], predicted[1][clear])

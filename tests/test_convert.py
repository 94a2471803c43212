"""Checkpoints in and out: nothing lost, nothing guessed, nothing run, nothing half-written."""

import json
import os
import pickle
import re
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from aavs_jax import cli, methods
from aavs_jax import config as config_lib
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.pytorch import recordings
from aavs_jax.pytorch.convert import convert, export
from aavs_jax.training import checkpoint
from aavs_jax.training.start import fill, load_start, start_lacks
from aavs_jax.training.state import flat_shapes, flatten, in_groups
from aavs_jax.training.work_folder import load_trained
from tests import parity
from tests.released import random_released, random_vggish, small

STAGES = pytest.mark.parametrize('stage', (1, 2))


def released(stage):
  """The recorded checkpoint, in its order."""
  tensors = {}
  for name, value in parity.recording(stage).arrays.under('param/').items():
    tensors[name] = value
    if name == 'model.class_predictor.bias':  # of as many classes, with which the loss follows
      constant = np.ones(len(value), np.float32)
      constant[-1] = 0.1
      tensors['model.criterion.empty_weight'] = constant
  return tensors


def mask2former(config, seed=0):
  """The same tensors that a Mask2Former of the transformers library of this size would have."""
  without = r'audio_proj|avs_adapt|swin_adapt|(audio|silence|uncertain)_embed'
  return {
    name.removeprefix('model.'): value
    for name, value in random_released(config, seed).items()
    if not re.search(without, name)
  } | {'criterion.empty_weight': np.ones(config.num_classes + 1, np.float32)}


def start_config():
  config = small('stage2')
  config.num_classes, config.use_prior = 150, False
  return config


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """Sources of the tests: two networks for sound, whose embeddings have 128 and 8 numbers."""
  folder = tmp_path_factory.mktemp('files')
  wide = small()
  wide.vggish.embedding = 128
  save_file(random_vggish(wide, 1), folder / 'wide.safetensors')
  save_file(random_vggish(small(), 1), folder / 'vggish.safetensors')
  save_file(random_released(small(), 1), folder / 'stage1.safetensors')
  save_file(mask2former(start_config()), folder / 'start.safetensors')
  return folder


@pytest.fixture(scope='module')
def run(files):
  """The folder converted from a model of stage 1."""
  convert(files / 'stage1.safetensors', files / 'run', files / 'vggish.safetensors')
  return files / 'run'


@pytest.fixture(scope='module')
def start(files):
  """The folder converted from a Mask2Former."""
  convert(files / 'start.safetensors', files / 'start', files / 'vggish.safetensors')
  return files / 'start'


def same(found, wanted):
  assert found.keys() == wanted.keys()
  for name, value in wanted.items():
    assert found[name].dtype == value.dtype, name
    np.testing.assert_array_equal(found[name], value, err_msg=name)


@STAGES
def test_to_our_layout_and_back_bit_by_bit(stage, files, tmp_path):
  torch = pytest.importorskip('torch')
  source = released(stage)
  tensors = {name: torch.from_numpy(value.copy()) for name, value in source.items()}
  torch.save(tensors, tmp_path / 'source.pth')
  note = convert(tmp_path / 'source.pth', tmp_path / 'run', files / 'wide.safetensors')
  assert note['kind'] == 'aavs' and note['lacking'] == [] and note['names'] == list(source)
  assert all(re.search('relative_position_index|criterion', name) for name in note['unused'])

  # The parameters of which the parity tests show that they compute what the release computes.
  found, step = checkpoint.load_flat(tmp_path / 'run')
  same({path: value for path, value in found.items() if path.startswith('aavs')},
       {path: np.asarray(v) for path, v in parity.begin(stage).items()})  # fmt: skip
  assert step == 0

  # And the config by which it was recorded, all of it read from names and shapes.
  config = config_lib.from_json(tmp_path / 'run' / 'config.json')
  wanted = recordings.model(parity.recording(stage), 'gather')
  for key in set(config.model) - {'remat', 'swin'}:
    assert config.model[key] == getattr(wanted, key), key
  assert config.model.swin.to_dict() | {'drop_path': 0.0} == dict(wanted.swin)
  assert (config.num_classes, config.use_prior) == (wanted.num_classes, wanted.use_prior)
  assert config.task == ('binary', 'semantic')[stage - 1]
  assert config.vggish.embedding == 128 and config.vggish.conv_widths == (2, 2, 4, 4, 4, 4)

  # As from a folder of training, which knows of no source: the order is that of the release.
  (tmp_path / 'run' / checkpoint.CONVERTED).unlink()
  loaded = torch.load(export(tmp_path / 'run', tmp_path / 'back.pth'), weights_only=True)
  assert list(loaded) == list(source)
  same({name: value.numpy() for name, value in loaded.items()}, source)


def test_the_order_of_the_source_is_kept(files, tmp_path):
  torch = pytest.importorskip('torch')
  source = load_file(files / 'stage1.safetensors')
  # What has no part in the model comes back too.
  unused = 'model.model.pixel_level_module.encoder.layernorm.weight'
  source[unused] = np.random.default_rng(1).standard_normal(32).astype(np.float32)
  names = np.random.default_rng(0).permutation(list(source)).tolist()
  torch.save({name: torch.from_numpy(source[name]) for name in names}, tmp_path / 'a.pth')
  convert(tmp_path / 'a.pth', tmp_path / 'run', files / 'vggish.safetensors')
  loaded = torch.load(export(tmp_path / 'run', tmp_path / 'back.pth'), weights_only=True)
  assert list(loaded) == names
  np.testing.assert_array_equal(loaded[unused].numpy(), source[unused])


def test_safetensors_and_back(files, run, tmp_path):
  path = export(run, tmp_path / 'back.safetensors')
  same(load_file(path), load_file(files / 'stage1.safetensors'))
  (tmp_path / 'new').touch()
  assert path.stat().st_mode == (tmp_path / 'new').stat().st_mode


def test_vggish_by_itself_serves_as_the_audio_network(files, run, tmp_path):
  raw, folder = files / 'vggish.safetensors', tmp_path / 'vggish'
  note = convert(raw, folder)
  assert note['kind'] == 'vggish'
  convert(files / 'stage1.safetensors', tmp_path / 'run', folder)
  (config, a), (other, b) = (load_trained(path)[:2] for path in (run, tmp_path / 'run'))
  assert config_lib.differences(config, other) == []
  same(flatten(b), flatten(a))
  source = load_file(raw)
  kernels = {'conv3': 'features.8', 'dense1': 'embeddings.2', 'embedding': 'embeddings.4'}
  for ours, theirs in kernels.items():
    weight = source[f'{theirs}.weight']
    for i in range(len(weight)):  # one unit
      unit = weight[i].transpose(1, 2, 0) if weight.ndim == 4 else weight[i]
      np.testing.assert_array_equal(a.params['vggish'][ours]['kernel'][..., i], unit)
    np.testing.assert_array_equal(a.params['vggish'][ours]['bias'], source[f'{theirs}.bias'])


class TestStart:
  """Training from a Mask2Former: what it lacks is initialised."""

  def config(self, stage, start):
    config = small(stage)
    config.train.init = str(start)
    return config

  def first(self, config):
    method = methods.of(config)
    loaded = load_start(config, method)
    fresh = {
      path: jnp.full(leaf.shape, jnp.nan, leaf.dtype) for path, leaf in flat_shapes(method).items()
    }
    params, lacking = fill(fresh, loaded, method.stage_specific, start_lacks(config))
    assert lacking == [path for path, value in params.items() if np.isnan(value).all()]
    return params, lacking

  def test_fills_the_network_and_leaves_what_is_new(self, files, start):
    config = self.config('stage2', start)
    params, lacking = self.first(config)
    assert in_groups(lacking).split(', ') == [
      'aavs/audio_projection',
      'aavs/backbone/stage*_block*/adapter',
      'aavs/backbone/stage*_block*/attention/adapter',
      'aavs/decoder/class_predictor',
      'aavs/decoder/layer*/self/output/adapter',
      'aavs/decoder/silent_key',
      'aavs/decoder/sounding_key',
      'aavs/decoder/uncertain_key',
      'aavs/pixel_decoder/layer*/attention/output/adapter',
    ]
    source = load_file(files / 'start.safetensors')
    name = 'model.transformer_module.decoder.layers.0.self_attn.out_proj.weight'
    np.testing.assert_array_equal(
      params['aavs/decoder/layer0/self/output/projection/kernel'], source[name].T
    )
    name = 'model.transformer_module.queries_features.weight'
    np.testing.assert_array_equal(params['aavs/queries/features'], source[name])

  def test_queries_of_another_number_are_new(self, start):
    config = self.config('stage1', start)
    config.model.num_queries = 5
    assert {'aavs/queries/features', 'aavs/queries/positions'} <= set(self.first(config)[1])

  def test_what_it_should_have_is_missed(self, start):
    config = self.config('stage1', start)
    config.model.decoder_layers = 2
    with pytest.raises(UserError, match=r'aavs/decoder/layer1/.* is missing'):
      self.first(config)

  def test_is_no_model_of_its_own(self, start, capsys, data_root, tmp_path):
    clip = next((Path(data_root) / 'v2').iterdir())
    for line in (
      refused(capsys, 'eval', '--workdir', start, '--data', data_root, '--out', tmp_path / 'e'),
      refused(capsys, 'predict', clip, '--stage1', start, '--out', tmp_path / 'p'),
      refused(capsys, 'export', start, tmp_path / 'e.pth'),
    ):
      assert 'start.safetensors' in line and '--config.train.init' in line
    assert not list(tmp_path.iterdir())

  def test_another_variant_is_refused(self, run):
    with pytest.raises(UserError, match=r"'after', but .* trained with 'replace'"):
      self.first(self.config('stage2', run))

  def test_vggish_alone_is_refused(self, files, tmp_path):
    convert(files / 'vggish.safetensors', tmp_path / 'run')
    with pytest.raises(UserError, match='holds VGGish alone'):
      self.first(self.config('stage1', tmp_path / 'run'))


def test_shards_and_half_precision(files, tmp_path, capsys):
  source = {k: v.astype(np.float16) for k, v in mask2former(start_config()).items()}
  names = list(source)
  parts = {'one.safetensors': names[::2], 'two.safetensors': names[1::2]}
  for name, part in parts.items():
    save_file({k: source[k] for k in part}, tmp_path / name)
  index = tmp_path / 'model.safetensors.index.json'
  index.write_text(json.dumps({'weight_map': {k: f for f, part in parts.items() for k in part}}))
  convert(tmp_path, tmp_path / 'run', files / 'vggish.safetensors')
  assert 'float16 and are kept as float32' in capsys.readouterr().out
  params, _ = checkpoint.load_flat(tmp_path / 'run')
  found = params['aavs/backbone/patch_embed/bias']
  name = 'model.pixel_level_module.encoder.embeddings.patch_embeddings.projection.bias'
  assert found.dtype == np.float32
  np.testing.assert_array_equal(found, source[name].astype(np.float32))
  (tmp_path / 'two.safetensors').unlink()
  with pytest.raises(UserError, match=r'two\.safetensors is missing'):
    convert(tmp_path, tmp_path / 'again', files / 'vggish.safetensors')


@pytest.mark.parametrize('wrap', ('state_dict', 'model', 'module', 'bfloat16'))
def test_as_training_scripts_save(wrap, files, tmp_path):
  torch = pytest.importorskip('torch')
  source = load_file(files / 'vggish.safetensors')
  tensors = {name: torch.from_numpy(value) for name, value in source.items()}
  if wrap == 'module':
    tensors = {f'module.{name}': value for name, value in tensors.items()}
  elif wrap == 'bfloat16':
    tensors = {name: value.bfloat16() for name, value in tensors.items()}
    source = {name: value.float().numpy() for name, value in tensors.items()}
  else:
    tensors = {wrap: tensors, 'epoch': 3}
  torch.save(tensors, tmp_path / 'vggish.pth')
  assert convert(tmp_path / 'vggish.pth', tmp_path / 'run')['names'] == list(source)
  params, _ = checkpoint.load_flat(tmp_path / 'run')
  np.testing.assert_array_equal(
    params['vggish/conv1/kernel'], source['features.3.weight'].transpose(2, 3, 1, 0)
  )


def refused(capsys, *arguments):
  """The one line that a command prints when it refuses, with exit status 2."""
  capsys.readouterr()
  assert cli.main([str(argument) for argument in arguments]) == 2
  lines = capsys.readouterr().err.strip().splitlines()
  assert len(lines) == 1 and lines[0].startswith('aavs: ')
  return lines[0]


class Command:
  """A pickle that would run a command."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.system, (f'touch {self.path}',)


def without(tensors, name):
  return {key: value for key, value in tensors.items() if key != name}


CLASSES = 'model.class_predictor.bias'
BAD_TENSORS = {
  'missing': (lambda t: without(t, CLASSES), f'1 missing: {CLASSES}'),
  'size missing': (lambda t: without(t, 'audio_proj.0.weight'), 'audio_proj.0.weight'),
  'shape': (lambda t: t | {CLASSES: np.zeros(9, np.float32)}, rf'{CLASSES} \(9,\), not \(3,\)'),
  'unknown': (lambda t: t | {'model.more': np.zeros(2, np.float32)}, r'1 unknown: model.more'),
  'index': (
    lambda t: {k: v + 1 if k.endswith('position_index') else v for k, v in t.items()},
    'relative_position_index is not that of windows of 2',
  ),
  'heads': (
    lambda t: {k: v[:5] if 'attention_weights' in k else v for k, v in t.items()},
    'model.heads is 0',
  ),
  'another network': (lambda t: {'conv1.weight': t[CLASSES], 'fc.bias': t[CLASSES]}, 'fc.bias'),
  'nothing': (lambda t: {}, 'holds 0 tensors'),
  'vggish': (lambda t: {f'features.{k}': v for k, v in t.items()}, 'holds .* tensors'),
}


@pytest.mark.parametrize('fault', BAD_TENSORS)
def test_tensors_that_make_no_model_are_named(fault, files, tmp_path, capsys):
  change, words = BAD_TENSORS[fault]
  save_file(change(load_file(files / 'stage1.safetensors')), tmp_path / 'bad.safetensors')
  line = refused(
    capsys, 'convert', tmp_path / 'bad.safetensors', tmp_path / 'run',
    '--vggish', files / 'vggish.safetensors',
  )  # fmt: skip
  assert 'bad.safetensors' in line and re.search(words, line)
  assert [path.name for path in tmp_path.iterdir()] == ['bad.safetensors']


def bad_files(folder, whole):
  """Files that are no state dicts, by name."""
  (folder / 'text.pth').write_text('not found')
  (folder / 'text.safetensors').write_text('not found')
  (folder / 'cut.pth').write_bytes(whole[: len(whole) // 2])
  (folder / 'code.pth').write_bytes(pickle.dumps({'a': Command(folder / 'ran')}, protocol=2))
  (folder / 'plain.ckpt').write_bytes(whole)
  (folder / 'empty.bin').touch()
  (folder / 'folder').mkdir()
  return 'text.pth', 'text.safetensors', 'cut.pth', 'code.pth', 'plain.ckpt', 'empty.bin', 'folder'


def test_files_that_are_no_state_dicts_are_refused_and_not_run(files, tmp_path, capsys):
  torch = pytest.importorskip('torch')
  torch.save({'a': torch.zeros(3)}, tmp_path / 'whole.pth')
  names = bad_files(tmp_path, (tmp_path / 'whole.pth').read_bytes())
  for name, value in {'list.pth': [1, 2], 'numbers.pt': {'a': 1}, 'tensor.pt': torch.ones(1),
                      'pickled.pth': {'a': Command(tmp_path / 'ran')}}.items():  # fmt: skip
    torch.save(value, tmp_path / name)
    names += (name,)
  there = sorted(tmp_path.iterdir())
  for name in (*names, 'no_such.pth'):
    line = refused(capsys, 'convert', tmp_path / name, tmp_path / 'run')
    assert name in line and 'weights_only' not in line
  assert sorted(tmp_path.iterdir()) == there  # and so no command ran
  # It would have, had it been loaded as pickles are.
  pickle.loads((tmp_path / 'code.pth').read_bytes())
  assert (tmp_path / 'ran').exists()


def test_the_audio_network_is_asked_for(files, tmp_path, capsys):
  stage1, vggish = files / 'stage1.safetensors', files / 'vggish.safetensors'
  out = tmp_path / 'run'
  assert '--vggish' in refused(capsys, 'convert', stage1, out)
  assert 'leave --vggish out' in refused(capsys, 'convert', vggish, out, '--vggish', vggish)
  line = refused(capsys, 'convert', stage1, out, '--vggish', stage1)
  assert 'is an AAVS checkpoint of the release, not the audio network' in line
  line = refused(capsys, 'convert', stage1, out, '--vggish', files / 'wide.safetensors')
  assert 'embeddings of 8 numbers, but VGGish gives 128' in line
  assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_nor_left_behind(files, run, tmp_path, capsys, monkeypatch):
  source, vggish = files / 'stage1.safetensors', files / 'vggish.safetensors'
  out = tmp_path / 'out'
  replace = os.replace

  def full_disk(old, new):
    if Path(new).parent == tmp_path:  # not within the folder that is being written
      raise OSError('disk full')
    replace(old, new)

  with monkeypatch.context() as patch:
    patch.setattr(os, 'replace', full_disk)
    with pytest.raises(OSError, match='disk full'):
      convert(source, out, vggish)
  assert not list(tmp_path.iterdir())
  out.mkdir()
  (out / 'mine').touch()
  assert 'is not empty' in refused(capsys, 'convert', source, out, '--vggish', vggish)
  assert [path.name for path in out.iterdir()] == ['mine']
  shutil.rmtree(out)

  with monkeypatch.context() as patch:
    patch.setattr(os, 'replace', full_disk)
    with pytest.raises(OSError, match='disk full'):
      export(run, tmp_path / 'new.safetensors')
  assert not list(tmp_path.iterdir())
  shutil.copy(source, tmp_path / 'old.safetensors')
  assert 'exists' in refused(capsys, 'export', run, tmp_path / 'old.safetensors')
  assert '.pth or .safetensors' in refused(capsys, 'export', run, tmp_path / 'new.npz')


def test_what_a_released_file_cannot_tell_is_said(tmp_path, capsys):
  config = small()
  config.model.adapter_variant = 'after'  # which the release has in stage 2 alone
  config.model.adaptive_query = False
  save_file(random_released(config, 0), tmp_path / 'a.safetensors')
  save_file(random_vggish(config, 0), tmp_path / 'v.safetensors')
  convert(tmp_path / 'a.safetensors', tmp_path / 'run', tmp_path / 'v.safetensors')
  path = tmp_path / 'run' / 'config.json'
  for changed in (False, True):
    if changed:
      path.write_text(config_lib.to_json(config))
    capsys.readouterr()
    export(tmp_path / 'run', tmp_path / f'{changed}.safetensors')
    said = capsys.readouterr().out
    assert ('config.model.adapter_variant, adaptive_query' in said) == changed
    assert ('WARNING' in said) == changed


def test_without_the_library_the_extra_is_named(files, tmp_path, monkeypatch):
  (tmp_path / 'a.pth').touch()
  needs = {'torch': tmp_path / 'a.pth', 'safetensors.numpy': files / 'vggish.safetensors'}
  for library, path in needs.items():
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match='install the extra `convert`'):
      convert(path, tmp_path / 'run')

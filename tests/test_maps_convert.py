"""Checkpoints of TPAVI, AVSegFormer and their backbones in and out, bit by bit."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from aavs_jax import config as config_lib
from aavs_jax import methods
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.pytorch import maps_names
from aavs_jax.pytorch.convert import convert, export
from aavs_jax.pytorch.names import to_released_layout
from aavs_jax.training import checkpoint
from aavs_jax.training.start import fill, load_start, start_lacks
from aavs_jax.training.state import flat_shapes
from tests import parity, small_maps
from tests.released import random_vggish

BACKBONES = pytest.mark.parametrize('backbone', ('pvt_v2', 'resnet'))


def released(config, seed=0):
  """A state dict such as the release's, of random numbers."""
  name_of = maps_names.names_of(config.method, config.model.backbone.kind)
  rng = np.random.default_rng(seed)
  tensors = {}
  for path, leaf in flat_shapes(methods.of(config)).items():
    value = np.full((), 7, np.int32) if path.endswith('/count') else None
    if value is None:
      value = rng.standard_normal(leaf.shape, np.float32)
    if path.startswith('statistics/'):
      value = abs(value)  # a variance below 0 makes no scores
    if config.method == 'avsegformer' or not path.startswith('vggish/'):
      tensors[name_of(path)] = np.array(to_released_layout(path, value), order='C')
  return tensors


def of_imagenet(tensors, backbone):
  """A backbone's own file: its tensors by the names of its makers, with the head of ImageNet."""
  prefix = {'pvt_v2': 'encoder_backbone.', 'resnet': 'resnet.'}[backbone]
  own = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
  own = {re.sub(r'^(layer[34])_1', r'\1', n): v for n, v in own.items() if '_2.' not in n}
  classes = {'pvt_v2': 'head', 'resnet': 'fc'}[backbone]
  # torchvision's file of 2017 has no counts.
  own = {n: v for n, v in own.items() if not n.endswith('num_batches_tracked')}
  return own | {f'{classes}.bias': np.zeros(9, np.float32)}


@pytest.fixture
def vggish(tmp_path):
  path = tmp_path / 'vggish.safetensors'
  save_file(random_vggish(small_maps.get_config(), 1), path)
  return path


def same(found, wanted):
  assert found.keys() == wanted.keys()
  for name, value in wanted.items():
    assert found[name].dtype == value.dtype, name
    np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize('method', ('tpavi', 'avsegformer'))
@BACKBONES
def test_to_our_layout_and_back(method, backbone, vggish, tmp_path):
  config = small_maps.get_config(method, backbone)
  if method == 'avsegformer':
    config.model.backbone = config.model.backbone.to_dict()
  source = released(config)
  save_file(source, tmp_path / 'source.safetensors')
  note = convert(
    tmp_path / 'source.safetensors', tmp_path / 'run', vggish if method == 'tpavi' else ''
  )
  assert note['kind'] == method and not note['lacking'] and not note['unused']
  found = config_lib.from_json(tmp_path / 'run' / 'config.json')
  told = found.model.to_dict() | {'dropout': 0, 'sampling': 0}
  wanted = config.model.to_dict() | {'dropout': 0, 'sampling': 0}
  if backbone == 'pvt_v2':
    told['backbone']['drop_path'] = 0.0
  assert {key: told[key] for key in wanted} == wanted
  assert found.vggish.to_dict() == config.vggish.to_dict() and found.vggish.final_relu
  same(load_file(export(tmp_path / 'run', tmp_path / 'back.safetensors')), source)


@pytest.mark.parametrize('name', ('tpavi_s4', 'tpavi_avss'))
def test_recorded_checkpoints(name, vggish, tmp_path):
  """Of the release's own names; the tensors that it never uses are among them."""
  source = parity.maps_recording(name).arrays.under('param/')
  config = small_maps.get_config()
  config.vggish.embedding = 128
  save_file(random_vggish(config, 1), vggish)
  save_file(source, tmp_path / 'source.safetensors')
  convert(tmp_path / 'source.safetensors', tmp_path / 'run', vggish)
  same(load_file(export(tmp_path / 'run', tmp_path / 'back.safetensors')), source)
  flat, _ = checkpoint.load_flat(tmp_path / 'run')
  assert {'tpavi/path3/unit1/conv1/kernel'} <= flat.keys()
  found = config_lib.from_json(tmp_path / 'run' / 'config.json')
  assert (found.task, found.num_classes) == {
    'tpavi_s4': ('binary', 2), 'tpavi_avss': ('semantic', 6),
  }[name]  # fmt: skip


@BACKBONES
def test_a_backbone_of_imagenet_is_a_start_for_both(backbone, vggish, tmp_path):
  whole = released(small_maps.get_config('tpavi', backbone))
  own = of_imagenet(whole, backbone)
  save_file(own, tmp_path / 'source.safetensors')
  note = convert(tmp_path / 'source.safetensors', tmp_path / 'run', vggish)
  assert note['kind'] == backbone and len(note['unused']) == 1
  for name in ('tpavi', 'avsegformer'):
    config = small_maps.get_config(name, backbone)
    config.train.init = str(tmp_path / 'run')
    method = methods.of(config)
    fresh = {p: jnp.zeros(leaf.shape, leaf.dtype) for p, leaf in flat_shapes(method).items()}
    flat, lacking = fill(
      fresh, load_start(config, method), method.stage_specific, start_lacks(config)
    )
    assert {path.removeprefix('statistics/').split('/')[0] for path in lacking} <= {
      name, 'backbone',
    }  # fmt: skip
    assert all(path.endswith('/count') for path in lacking if 'backbone' in path)
    if backbone == 'resnet':
      kernel = own['layer4.0.conv2.weight'].transpose(2, 3, 1, 0)
      for copy in ('stage3', 'spare3'):
        np.testing.assert_array_equal(flat[f'backbone/{copy}_block0/conv2/kernel'], kernel)


def test_what_does_not_fit_is_named(vggish, tmp_path):
  source = released(small_maps.get_config('avsegformer'))
  for change, words in (
    ({'head.fc.0.weight': source['head.fc.0.weight'][:, :5]}, 'head.fc.0.weight'),
    ({'more': np.zeros(2, np.float32)}, '1 unknown: more'),
    ({'head.attn_fc.4.weight': None}, '1 missing: head.attn_fc.4.weight'),
  ):
    tensors = {name: value for name, value in (source | change).items() if value is not None}
    save_file({n: np.ascontiguousarray(v) for n, v in tensors.items()}, tmp_path / 'a.safetensors')
    with pytest.raises(UserError, match=words):
      convert(tmp_path / 'a.safetensors', tmp_path / 'run')
  save_file(source, tmp_path / 'a.safetensors')
  with pytest.raises(UserError, match='leave --vggish out'):
    convert(tmp_path / 'a.safetensors', tmp_path / 'run', vggish)
  assert not (tmp_path / 'run').exists()

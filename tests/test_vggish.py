"""VGGish against the torchvggish network on recorded sound."""

import pathlib

import jax
import numpy as np
import pytest

from aavs_jax.configs import base
from aavs_jax.input_pipeline.audio import log_mel_examples
from aavs_jax.models.vggish import VGGish

RECORDED = np.load(pathlib.Path(__file__).parent / 'goldens' / 'audio.npz')
SOUNDS = pytest.mark.parametrize('name', ('mono16k_5s', 'stereo16k_3s'))


@pytest.fixture(scope='module')
def embed():
  """The network at its published size with the recording's random weights (goldens/README.md)."""
  model = VGGish(**base.get_config().vggish.to_dict())
  random = np.random.RandomState(1234)
  convolutions = [f'conv{i}' for i in range(6)]
  layers = iter([*convolutions, 'dense0', 'dense1', 'embedding'])
  params = {}
  for entry in RECORDED['vggish/parameter_order']:
    name, shape = str(entry).split(':')
    shape = tuple(map(int, shape.split('x')))
    value = random.standard_normal(shape)
    if name.endswith('weight'):
      layer = next(layers)
      value = (value * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)
      kernel = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
      params[layer] = {'kernel': kernel}
    else:
      params[layer]['bias'] = (value * 0.05).astype(np.float32)
  assert next(layers, None) is None
  apply = jax.jit(model.apply)
  return lambda log_mel: np.asarray(apply({'params': params}, log_mel))


def error(found, name):
  wanted = RECORDED[f'{name}/embedding']
  assert found.shape == wanted.shape
  return np.abs(found - wanted).max() / np.abs(wanted).max()


@SOUNDS
def test_embedding(embed, name):
  assert (RECORDED[f'{name}/embedding'] < 0).any()  # no ReLU at the end
  assert error(embed(RECORDED[f'{name}/log_mel']), name) < 1e-4


@SOUNDS
def test_embedding_of_our_log_mel(embed, name):
  pcm = RECORDED[f'{name}/pcm'].astype(np.float32) / 32768
  waveform = pcm if pcm.ndim == 1 else pcm.mean(1)
  assert error(embed(log_mel_examples(waveform)), name) < 1e-4

"""What many tests share: a tiny made data set and a tiny model, each built once a session."""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import pytest

from configs import quick_stage1, quick_stage2
from input_pipeline.compose import compose


@pytest.fixture(scope='session')
def data_root(tmp_path_factory):
  """A made data set: a few clips of each subset and split, 96x72 pixels."""
  root = tmp_path_factory.mktemp('data') / 'set'
  few = {'v1s': 2, 'v1m': 2, 'v2': 1}
  compose(root, clips={'train': {'v1s': 4, 'v1m': 4, 'v2': 2}, 'val': few, 'test': few},
          num_classes=4, size=(96, 72))  # fmt: skip
  return str(root)


def tiny(config):
  """Shrinks a quickstart config until it compiles in seconds."""
  config.data.image_size = 32
  config.data.eval_size = 32
  config.data.batch_items = 2
  config.model.num_queries = 6
  config.model.swin.embed_dim = 8
  config.model.swin.depths = (1, 1, 1, 1)
  config.model.swin.heads = (1, 1, 1, 1)
  config.model.swin.window = 2
  config.model.hidden = 32
  config.model.heads = 2
  config.model.encoder_layers = 1
  config.model.encoder_ffn = 32
  config.model.decoder_layers = 1
  config.model.decoder_ffn = 32
  config.model.audio_hidden = 16
  config.vggish.conv_widths = (2, 2, 4, 4, 4, 4)
  config.vggish.dense_widths = (16,)
  config.vggish.embedding = 8
  config.loss.points = 16
  return config


@pytest.fixture
def tiny_stage1(data_root):
  config = tiny(quick_stage1.get_config())
  config.data.root = data_root
  return config


@pytest.fixture
def tiny_stage2(data_root):
  config = tiny(quick_stage2.get_config())
  config.data.root = data_root
  return config

"""What many tests share: a tiny made data set and a tiny model, each built once a session."""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# What tests compile runs a few times at most, so compiling fast matters and running fast does not.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', 'true')

import fsspec
import pytest
from etils import epath
from fsspec.implementations.dirfs import DirFileSystem

from aavs_jax.input_pipeline.compose.dataset import compose
from tests import tiny


@pytest.fixture(scope='session')
def data_root(tmp_path_factory):
  """A made data set: a few clips of each subset and split, 96x72 pixels."""
  root = tmp_path_factory.mktemp('data') / 'set'
  few = {'v1s': 2, 'v1m': 2, 'v2': 1}
  compose(root, clips={'train': {'v1s': 4, 'v1m': 4, 'v2': 2}, 'val': few, 'test': few},
          num_classes=4, size=(96, 72))  # fmt: skip
  return str(root)


@pytest.fixture
def tiny_stage1(data_root):
  config = tiny.get_config('stage1')
  config.data.root = data_root
  return config


@pytest.fixture
def tiny_stage2(data_root):
  config = tiny.get_config('stage2')
  config.data.root = data_root
  return config


@pytest.fixture
def bucket(tmp_path):
  """A work folder in a bucket, for which a folder of the disk stands."""

  class Bucket(DirFileSystem):
    protocol = 's3'
    cachable = False

    def __init__(self, **_):
      super().__init__(path=str(tmp_path), auto_mkdir=True)

    @classmethod
    def _strip_protocol(cls, path):
      return path.removeprefix('s3://')

  fsspec.register_implementation('s3', Bucket, clobber=True)
  epath.backend.fsspec_backend._get_filesystem.cache_clear()
  folder = epath.Path('s3://bucket/run')
  folder.mkdir(parents=True)
  return folder

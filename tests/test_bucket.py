"""A training in a Google bucket, for which an emulator stands: it is stopped and goes on."""

import re
import socket
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

from aavs_jax import cli
from aavs_jax.pytorch.convert import convert, export
from tests import runs
from tests.released import random_released, random_vggish, small
from tests.stand_in import STAND_IN

pytest.importorskip('gcsfs')
server = pytest.importorskip('gcp_storage_emulator.server')


@pytest.fixture(scope='module')
def emulated(tmp_path_factory):
  """Makes gs://bucket of this process and of those that it starts; their environment."""

  def download(request, response, storage, *args, **kwargs):
    """With the header that TensorStore tells versions of an object by."""
    answer(request, response, storage, *args, **kwargs)
    if response.status.value < 300:
      found = storage.get_file_obj(request.params['bucket_name'], request.params['object_id'])
      response['x-goog-generation'] = found['generation']

  answer = server.objects.download
  with pytest.MonkeyPatch.context() as patch, socket.socket() as free:
    patch.setattr(server.objects, 'download', download)  # what server.objects.get answers by
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
    free.close()
    address = f'http://127.0.0.1:{port}'
    patch.setenv('STORAGE_EMULATOR_HOST', address)
    patch.setenv('TENSORSTORE_GCS_HTTP_URL', address)
    patch.setenv('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')  # nor asks what kind of bucket it is
    patch.setenv('NO_GCE_CHECK', 'true')  # nobody to ask for an account
    with server.create_server('127.0.0.1', port, in_memory=True, default_bucket='bucket'):
      yield runs.environment(tmp_path_factory.mktemp('cache'))


def test_a_run_in_a_bucket(emulated, data_root, tmp_path, capsys):
  def train(workdir, *overrides):
    options = ('--config.train.checkpoint_every_steps=2', STAND_IN, *overrides)
    return runs.start(workdir, data_root, emulated, *options)

  def finish(process):
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return output

  folder = epath.Path('gs://bucket/run')
  stopped = train(folder)
  for line in stopped.stdout:
    if re.match(r' *step 1/12 ', line):  # long before the last
      break
  stopped.terminate()
  assert 'stopped by a signal' in finish(stopped)
  assert 'going on from step' in finish(train(folder))
  finish(train(tmp_path / 'run'))
  runs.require_same(folder, tmp_path / 'run')
  # Of the newest and the best, no more.
  assert len(list((folder / 'checkpoints').iterdir())) <= 2
  # What else reads a checkpoint: the start of a training, and an evaluation.
  begun = finish(train(tmp_path / 'begun', f'--config.train.init={folder}'))
  assert 'NOT in the start' not in begun
  out = tmp_path / 'scores.json'
  assert cli.main(['eval', f'--workdir={folder}', f'--data={data_root}', f'--out={out}']) == 0
  assert out.exists()
  shards = ['--image-size=32', '--eval-size=32', '--workers=1']
  assert cli.main(['prepare', data_root, 'gs://bucket/shards', *shards]) == 0
  assert (epath.Path('gs://bucket/shards') / 'prepared.json').exists()
  assert cli.main(['prepare', data_root, 'gs://bucket/shards', *shards]) == 0
  assert '3 of them were there' in capsys.readouterr().out
  missing = ['eval', f'--workdir={folder}', f'--data={data_root}', '--out=gs://none/scores.json']
  assert cli.main(missing) == 2
  assert 'gs://none/scores.json cannot be written' in capsys.readouterr().err


def test_an_export_from_a_bucket_holds_what_has_no_part_in_the_model(emulated, tmp_path):
  source = random_released(small(), 1)
  unused = 'model.model.pixel_level_module.encoder.layernorm.weight'
  source[unused] = np.arange(32, dtype=np.float32)
  save_file(source, tmp_path / 'source.safetensors')
  save_file(random_vggish(small(), 1), tmp_path / 'vggish.safetensors')
  convert(tmp_path / 'source.safetensors', tmp_path / 'run', tmp_path / 'vggish.safetensors')
  for path in filter(Path.is_file, (tmp_path / 'run').rglob('*')):
    name = path.relative_to(tmp_path).as_posix()
    (epath.Path('gs://bucket/converted') / name).write_bytes(path.read_bytes())
  found = load_file(export('gs://bucket/converted/run', tmp_path / 'back.safetensors'))
  assert found.keys() == source.keys()
  np.testing.assert_array_equal(found[unused], source[unused])

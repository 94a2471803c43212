"""The command line: what is wrong is said in one sentence, with exit status 2."""

import errno
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from aavs_jax import cli
from aavs_jax import config as config_lib
from aavs_jax.input_pipeline.errors import UserError

ROOT = Path(__file__).parents[1]
AMAZON, NOBODY = (
  type(name, (Exception,), {'__module__': 'botocore.exceptions'})
  for name in ('EndpointConnectionError', 'NoCredentialsError')
)
TRAINING = ('--config', f'{ROOT}/tests/tiny.py:stage1', '--data', 'data')
COMMANDS = (
  'compose', 'check-data', 'train', 'masks', 'eval', 'predict', 'demo', 'convert', 'export',
  'recipe', 'reproduce', 'report', 'bench', 'aot', 'selftest', 'quickstart', 'stepping-stones',
)  # fmt: skip


def _refusal(capsys, *arguments):
  """The one line that a command prints when it refuses."""
  assert cli.main(arguments) == 2
  lines = capsys.readouterr().err.strip().splitlines()
  assert len(lines) == 1 and lines[0].startswith('aavs: ')
  return lines[0]


@pytest.mark.parametrize('command', COMMANDS)
def test_help_shows_an_example(command, capsys):
  with pytest.raises(SystemExit) as end:
    cli.main([command, '--help'])
  assert end.value.code == 0
  assert f'example:\n  aavs {command}' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('command', 'arguments'),
  [
    ('report', ['x', '--data', 'y', '--nonsense']),
    ('report', ['x', '--data', 'y', '--config.seed=1']),
    ('train', ['--config', 'a', '--workdir', 'b', 'foo']),
    ('train', ['--config', 'a', '--workdir', 'b', '--lr=3']),
    ('bench step', ['--config', 'a', 'foo']),
  ],
)
def test_an_unknown_argument_is_refused_with_the_usage_of_the_command(command, arguments, capsys):
  with pytest.raises(SystemExit) as end:
    cli.main([*command.split(), *arguments])
  told = capsys.readouterr().err
  assert end.value.code == 2 and told.startswith(f'usage: aavs {command} [-h]')
  assert told.endswith(f'aavs {command}: error: unknown argument {arguments[-1]}\n')


@pytest.mark.parametrize(
  ('override', 'words'),
  [
    ('--config.optimizer.lrr=1', 'has no config.optimizer.lrr: did you mean config.optimizer.lr?'),
    ('--config.optimiser.lr=1', 'has no config.optimiser: did you mean config.optimizer?'),
    ('--config.train.epochs=many', "aavs: config.train.epochs is 'many': use a number"),
    ('--config.task=audio', "config.task is 'audio'"),
    ('--config.model.heads=0', 'config.model.heads is 0'),
    ('--config.model.hidden=48', 'config.model.hidden is 48'),
    ('--config.data.item_frames=3', 'config.data.item_frames is 3'),
    ('--config.data.max_targets=50', 'config.data.max_targets is 50'),
    ('--config.train.phase2_epoch=-1', 'config.train.phase2_epoch is -1'),
    ("--config.train.trainable=('(',)", 'not a regular expression'),
    ('--config.seed=-1', 'config.seed is -1'),
  ],
)
def test_faults_of_a_config_are_named(override, words, capsys, data_root, tmp_path):
  line = _refusal(
    capsys, 'train', '--config', 'tests/tiny.py:stage1', '--data', data_root,
    '--workdir', str(tmp_path / 'run'), override,
  )  # fmt: skip
  assert words in line and not (tmp_path / 'run').exists()


def _train(capsys, data, workdir, config='tests/tiny.py:stage1'):
  return _refusal(
    capsys, 'train', '--config', config, '--data', str(data), '--workdir', str(workdir)
  )


def test_faults_of_files_are_named(capsys, data_root, tmp_path):
  assert 'no_such.py does not' in _train(capsys, data_root, tmp_path / 'run', 'no_such.py')
  assert f'{tmp_path} is a folder: name' in _train(capsys, data_root, tmp_path / 'r', str(tmp_path))
  broken = tmp_path / 'broken.py'
  broken.write_text('def get_config(:')
  assert 'broken.py cannot be run' in _train(capsys, data_root, tmp_path / 'run', str(broken))
  assert 'a study' in _train(capsys, data_root, tmp_path / 'run', 'configs/quickstart.py')
  assert 'no_data' in _train(capsys, tmp_path / 'no_data', tmp_path / 'run')
  assert 'README.md' in _train(capsys, 'README.md', tmp_path / 'run')

  copy = tmp_path / 'copy'
  shutil.copytree(data_root, copy)
  table = copy / 'metadata.csv'
  table.write_text(table.read_text().replace(',val,', ',test,'))
  assert 'val' in _train(capsys, copy, tmp_path / 'run')
  table.write_text(table.read_text().replace('label', 'lable', 1))
  assert 'label' in _train(capsys, copy, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_an_own_config_is_found_from_anywhere(capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert config_lib.load('configs/s4.py:paper').data.subsets
  with pytest.raises(UserError, match=r'other/s4\.py does not exist'):
    config_lib.load('other/s4.py')


def test_a_training_among_the_clips_of_a_data_set_is_refused(capsys, data_root):
  before = sorted(os.listdir(data_root))
  assert 'is a data set: name another folder' in _train(capsys, data_root, data_root)
  assert sorted(os.listdir(data_root)) == before


def test_a_work_folder_that_cannot_be_made_is_named(capsys, data_root, tmp_path):
  (tmp_path / 'file').touch()
  assert f'{tmp_path}/file/run cannot be written' in _train(
    capsys, data_root, tmp_path / 'file' / 'run'
  )


def test_a_table_without_clips_is_named(capsys, data_root, tmp_path):
  header = (Path(data_root) / 'metadata.csv').read_text().splitlines()[0]
  (tmp_path / 'metadata.csv').write_text(f'{header}\n')
  assert 'metadata.csv: no clip is listed there' in _refusal(capsys, 'check-data', str(tmp_path))


def test_a_folder_without_a_model_is_refused(capsys, data_root, tmp_path):
  for arguments in (
    ['masks', '--workdir', str(tmp_path), '--data', data_root, '--out', str(tmp_path / 'm')],
    ['eval', '--workdir', str(tmp_path), '--data', data_root, '--out', str(tmp_path / 'e.json')],
    ['predict', data_root, '--stage1', str(tmp_path), '--out', str(tmp_path / 'p')],
  ):
    _refusal(capsys, *arguments)
  assert not list(tmp_path.iterdir())


def test_compose_and_check_data_agree(capsys, tmp_path):
  few = ['--train', '2,1,1', '--val', '1,1,1', '--test', '1,1,1', '--classes', '3']
  assert cli.main(['compose', str(tmp_path / 'd'), *few, '--size', '64x48']) == 0
  assert cli.main(['check-data', str(tmp_path / 'd'), '--json', str(tmp_path / 'c.json')]) == 0
  next((tmp_path / 'd' / 'v2').iterdir()).joinpath('audio.wav').unlink()
  assert cli.main(['check-data', str(tmp_path / 'd')]) == 1
  assert 'audio.wav' in capsys.readouterr().out
  assert 'not three whole numbers' in _refusal(capsys, 'compose', str(tmp_path), '--train', '3')


@pytest.mark.parametrize('steps', ['5', '3:2', 'a:b', '-1:2', '0:1000'])
def test_steps_that_cannot_be_traced_are_refused(steps, capsys, data_root, tmp_path):
  line = _refusal(
    capsys, 'train', '--config', 'tests/tiny.py:stage1', '--data', data_root,
    '--workdir', str(tmp_path / 'run'), f'--profile={steps}',
  )  # fmt: skip
  assert '--profile' in line and 'START' in line and not (tmp_path / 'run').exists()


def test_a_device_with_too_little_memory_is_one_sentence(capsys, monkeypatch):
  def full(files):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9')

  monkeypatch.setattr('aavs_jax.pytorch.selftest.selftest', full)
  line = _refusal(capsys, 'selftest')
  assert 'too little memory' in line and 'config.data.batch_items' in line


def test_an_absent_accelerator_is_one_sentence():
  process = subprocess.run(
    [sys.executable, '-m', 'aavs_jax.cli', 'selftest'],
    cwd=ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'absent'},
    capture_output=True,
    text=True,
  )
  (line,) = process.stderr.splitlines()
  assert process.returncode == 1
  assert line.startswith('aavs: JAX finds no device of JAX_PLATFORMS=absent (')
  assert "backend 'absent'" in line and 'launch/README.md' in line


def test_an_error_without_words_is_explained_if_there_is_no_device(capsys, monkeypatch):
  def wrong(*_):
    raise AssertionError

  monkeypatch.setattr('aavs_jax.pytorch.selftest.selftest', wrong)
  with pytest.raises(AssertionError):  # a fault of ours
    cli.main(['selftest'])
  monkeypatch.setattr(jax, 'devices', wrong)  # as without a plugin for JAX_PLATFORMS=cuda
  assert cli.main(['selftest']) == 1
  assert 'finds no device' in capsys.readouterr().err


FEW = ['--train', '1,0,0', '--val', '1,0,0', '--test', '1,0,0', '--classes', '2', '--size', '32x32']


def test_a_name_that_the_terminal_cannot_encode_is_escaped(monkeypatch, tmp_path):
  for encoding, name, escaped in (
    ('ascii', 'caf\xe9', rb'caf\xe9'),
    ('utf-8', os.fsdecode(b'caf\xe9'), rb'caf\udce9'),
  ):
    written = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(written, encoding))
    assert cli.main(['compose', str(tmp_path / name), *FEW]) == 0
    assert written.getvalue().endswith(escaped + b'\n')


@pytest.mark.parametrize('buffering', ['', '1'])
def test_a_reader_that_leaves_ends_a_command_quietly(buffering, tmp_path):
  reading, writing = os.pipe()
  os.close(reading)
  process = subprocess.run(
    [sys.executable, '-m', 'aavs_jax.cli', 'compose', str(tmp_path / 'set'), *FEW],
    cwd=ROOT,
    env=os.environ | {'PYTHONUNBUFFERED': buffering},
    stdout=writing,
    stderr=subprocess.PIPE,
    text=True,
  )
  os.close(writing)
  assert process.returncode == 141 and process.stderr == ''


def test_another_pipe_that_breaks_is_said(capfd, monkeypatch):
  def broken(files):
    raise BrokenPipeError(errno.EPIPE, 'Broken pipe')

  monkeypatch.setattr('aavs_jax.pytorch.selftest.selftest', broken)
  assert cli.main(['selftest']) == 1
  assert 'Broken pipe' in capfd.readouterr().err


def test_a_full_disk_is_said_with_what_was_written(capsys, monkeypatch):
  def full(*_, **__):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr('aavs_jax.predict.predict', full)
  assert cli.main(['predict', 'video.mp4', '--stage1', 's', '--out', 'result']) == 1
  assert capsys.readouterr().err == (
    'aavs: [Errno 28] No space left on device, in writing result\n'
  )


@pytest.mark.parametrize(('given', 'found'), [({}, '1'), ({'OPENBLAS_NUM_THREADS': '3'}, '3')])
def test_numpy_has_one_thread_unless_told_otherwise(given, found):
  code = (
    'import os, sys\n'
    'from aavs_jax import cli\n'
    'assert "numpy" not in sys.modules, "it has read its settings already"\n'
    'print(os.environ["OPENBLAS_NUM_THREADS"])'
  )
  env = {k: v for k, v in os.environ.items() if k != 'OPENBLAS_NUM_THREADS'} | given
  done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
  assert done.stdout.strip() == found, done.stderr


@pytest.mark.parametrize(
  ('command', 'function', 'status'),
  [
    (['train', '--config', 'configs/quick_stage1.py', '--data', 'data'], 'train.train', 0),
    (['quickstart'], 'studies.study.run_study', 143),
  ],
)
def test_a_training_that_sigterm_ends_leaves_what_it_is_a_part_of_undone(
  command, function, status, monkeypatch, tmp_path
):
  def stopped(*_, **__):
    raise SystemExit(0)

  monkeypatch.setattr(f'aavs_jax.{function}', stopped)
  with pytest.raises(SystemExit) as end:
    cli.main([*command, '--workdir', str(tmp_path)])
  assert end.value.code == status


@pytest.mark.parametrize(
  ('command', 'function', 'unit'),
  [
    (['masks'], 'hand_over.write_masks', 'clips'),
    (['cross-fit', '--config', 'configs/quick_stage1.py'], 'cross_fit.cross_fit', 'training clips'),
  ],
)
@pytest.mark.parametrize('written', [0, 1])
def test_masks_that_were_written_are_counted(command, function, unit, written, monkeypatch, capsys):
  monkeypatch.setattr(f'aavs_jax.{function}', lambda *_, **__: written)
  assert cli.main([*command, '--workdir', 'run', '--data', 'data', '--out', 'there']) == 0
  unit = unit[:-1] if written == 1 else unit
  assert capsys.readouterr().out == f'masks of {written} {unit} written; all are in there\n'


def test_debug_shows_the_traceback(tmp_path):
  with pytest.raises(UserError):
    cli.main(['check-data', str(tmp_path), '--debug'])


def test_the_published_configs_are_sound_and_differ_as_the_recipe_says():
  base = config_lib.load('configs/base.py')
  assert config_lib.differences(base, config_lib.load('configs/avss_stage1.py')) == []
  stage2 = config_lib.differences(base, config_lib.load('configs/avss_stage2.py'))
  assert {line.split(' ')[0] for line in stage2} == {
    'task', 'num_classes', 'use_prior', 'data.max_targets', 'model.num_queries',
    'model.adapter_variant', 'optimizer.clip_norm', 'train.phase2_epoch', 'train.trainable',
  }  # fmt: skip
  for path in ('configs/quickstart.py', 'configs/compose_bench.py'):
    config_lib.load_study(path)


@pytest.mark.parametrize(
  ('kind', 'said', 'status', 'words'),
  [
    ('Forbidden', 'GET http://b/bucket', 2, 'see "Permission denied on a bucket"'),
    ('ServiceUnavailable', 'GET http://b/bucket', 1, 'try again'),
    (OSError, 'Forbidden: http://b/bucket\nno access', 2, 'see "Permission denied on a bucket"'),
    (ValueError, 'PERMISSION_DENIED: http://b/bucket', 2, 'see "Permission denied on a bucket"'),
    (ValueError, 'UNAVAILABLE: http://b/bucket', 1, 'try again'),
    (AMAZON, 'Could not connect to http://b/bucket', 1, 'bucket): try again'),
    (NOBODY, 'Unable to locate credentials, b/bucket', 1, '`aws configure`, and try again'),
    (ImportError, 'Install s3fs to access b/bucket', 2, 'pip install s3fs'),
    (ImportError, 'Please install gcsfs to access b/bucket', 2, 'pip install gcsfs'),
  ],
)
def test_what_a_bucket_says_is_told(
  kind, said, status, words, capsys, data_root, tmp_path, monkeypatch
):
  if isinstance(kind, str):
    kind = getattr(pytest.importorskip('google.api_core.exceptions'), kind)

  def fail(*args, **kwargs):
    raise kind(said)

  monkeypatch.setattr('aavs_jax.train.train', fail)
  command = ['train', '--config', 'tests/tiny.py:stage1', '--data', data_root]
  assert cli.main([*command, '--workdir', str(tmp_path)]) == status
  (line,) = capsys.readouterr().err.splitlines()
  assert words in line and 'b/bucket' in line


@pytest.mark.parametrize(
  'arguments',
  [
    ['export', 'run', 'gs://b/a.safetensors'],
    ['report', 'run', '--data', 'data', '--out', 'gs://b/a.html'],
    ['report', 'gs://b/run', '--data', 'data'],
    ['bench', 'sweep', 'gs://b/sweep'],
    ['predict', 'gs://b/a.mp4', '--stage1', 'run', '--out', 'out'],
    ['convert', 'gs://b/a.pth', 'out'],
    ['reproduce', '--workdir', 'out', '--data', 'data', '--stage2', 'gs://b/a.pth', '--masks', 'm'],
  ],
)
def test_what_is_on_disks_alone_is_refused_in_a_bucket(arguments, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  line = _refusal(capsys, *arguments)
  assert re.search('gs://b/.* is in a bucket', line) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'arguments',
  [
    ['train', *TRAINING, '--workdir', 's3://b/run'],
    ['train', *TRAINING, '--workdir', 'gcs://b/run'],
    ['train', *TRAINING, '--workdir', 'run', '--config.train.init=s3://b/run'],
    ['eval', '--workdir', 's3://b/run', '--data', 'data', '--out', 'scores.json'],
    ['masks', '--workdir', 's3://b/run', '--data', 'data', '--out', 'masks'],
    ['export', 's3://b/run', 'out', '--format', 'stablehlo'],
    ['export', 's3://b/run', 'out.pth'],
  ],
)
def test_checkpoints_are_in_no_bucket_but_googles(arguments, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  line = _refusal(capsys, *arguments)
  assert re.search('(s3|gcs)://b/run cannot hold checkpoints', line)
  assert not list(tmp_path.iterdir())

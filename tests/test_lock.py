"""A work folder is one run's: on a disk by flock, in a bucket by a lease that is renewed."""

import contextlib
import errno
import json
import os
import re
import socket
import subprocess
import sys
import time

import pytest
from etils import epath

from aavs_jax.devices import distributed
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.training import lock as lock_lib
from aavs_jax.training.lock import lock

ME = f'process {os.getpid()} on {re.escape(socket.gethostname())}'


@pytest.fixture
def quick(monkeypatch):
  """Leases that are renewed and given up quickly."""
  monkeypatch.setattr(lock_lib, '_RENEWED_EVERY', 0.2)
  monkeypatch.setattr(lock_lib, '_PATIENCE', 2.5)
  monkeypatch.setattr(lock_lib, '_SETTLED', 0.1)


@pytest.fixture(params=['disk', 'no flock', 'bucket'])
def workdir(request, tmp_path, quick, monkeypatch):
  if request.param == 'bucket':
    return request.getfixturevalue('bucket')
  if request.param == 'no flock':

    def flock(*_):
      raise OSError(errno.ENOSYS, 'Function not implemented')

    monkeypatch.setattr(lock_lib.fcntl, 'flock', flock)
  return epath.Path(tmp_path / 'run')


def test_a_second_one_is_refused_by_name_and_the_next_is_not(workdir):
  with lock(workdir):
    with pytest.raises(BlockingIOError, match=f'{workdir} is in use by another run, {ME}: wait'):
      with lock(workdir):
        raise AssertionError('two at once')
    assert (workdir / 'run.lease').exists() or not workdir.as_posix().startswith('s3')
  started = time.monotonic()
  with pytest.raises(ZeroDivisionError):
    with lock(workdir):
      raise ZeroDivisionError
  with lock(workdir):
    pass
  assert time.monotonic() - started < 2, 'an end in good order leaves nothing to wait for'


def test_a_killed_run_gives_its_lock_back(tmp_path):
  code = f"""
import os, signal
from etils import epath
from aavs_jax.training.lock import lock
with lock(epath.Path({str(tmp_path)!r})):
  print('held', flush=True)
  os.kill(os.getpid(), signal.SIGKILL)
"""
  process = subprocess.run([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
  assert process.stdout == 'held\n' and process.returncode == -9
  with lock(epath.Path(tmp_path)):
    assert json.loads((tmp_path / 'run.lock').read_text())['pid'] == os.getpid()


_LEFT = {'host': 'gone', 'pid': 7, 'run': 'x', 'time': 4e9}


@pytest.mark.parametrize(
  ('left', 'words'),
  [(json.dumps(_LEFT), 'process 7 on gone'), ('', 'process unknown on an unknown host')],
)
def test_a_lease_that_nobody_renews_is_given_up(left, words, bucket, quick, capsys):
  (bucket / 'run.lease').write_text(left)
  started = time.monotonic()
  with lock(bucket):
    assert time.monotonic() - started >= 2.5
    assert json.loads((bucket / 'run.lease').read_text())['pid'] == os.getpid()
  assert words in capsys.readouterr().out
  assert not (bucket / 'run.lease').exists()


def test_a_run_whose_lease_was_taken_ends_at_once(tmp_path):
  code = f"""
import json, time
from etils import epath
from aavs_jax.training import lock as lock_lib
lock_lib._RENEWED_EVERY, lock_lib._SETTLED = 0.2, 0.1
path = epath.Path({str(tmp_path)!r})
with lock_lib._lease(path):
  (path / 'run.lease').write_text(json.dumps({{'host': 'other', 'pid': 8, 'run': 'y', 'time': 0}}))
  time.sleep(30)
"""
  done = subprocess.run([sys.executable, '-c', code], stderr=subprocess.PIPE, text=True, timeout=25)
  assert done.returncode == 1 and 'in use by another run, process 8 on other' in done.stderr
  assert json.loads((tmp_path / 'run.lease').read_text())['host'] == 'other'


@pytest.mark.parametrize('shared', [True, False])
def test_a_folder_that_a_process_does_not_share_is_refused(shared, tmp_path, monkeypatch):
  """What process 1 of two finds in it, of which process 0 writes."""
  if shared:
    (tmp_path / '.seen-by-all-token').touch()
  answers = iter([[None, None], ['token', 'other'], [True, shared]])
  monkeypatch.setattr(distributed, 'is_first', lambda: False)
  monkeypatch.setattr(distributed, 'gather', lambda _: next(answers))
  monkeypatch.setattr(lock_lib, '_SHOWN_WITHIN', 0)
  expected = contextlib.nullcontext()
  if not shared:
    expected = pytest.raises(UserError, match='process 1 does not see what process 0 writes')
  with expected, lock_lib.lock(epath.Path(tmp_path)):
    pass


def test_a_lease_that_is_gone_is_lost_once_others_could_have_had_it(tmp_path):
  """And one that is half written is not; seen by a process, which this ends."""
  program = (
    'import sys, time\n'
    'from etils import epath\n'
    'from aavs_jax.training import lock\n'
    'lock._SETTLED, lock._RENEWED_EVERY, lock._PATIENCE = 0, 0.05, float(sys.argv[2])\n'
    'with lock._lease(epath.Path(sys.argv[1])):\n'
    '  path = epath.Path(sys.argv[1]) / "run.lease"\n'
    '  path.write_text("")\n'
    '  time.sleep(0.3)\n'
    '  assert "run" in path.read_text()\n'
    '  lock._read = lambda path: None\n'
    '  time.sleep(0.3)\n'
    '  print("goes on", flush=True)\n'
  )

  def run(patience):
    return subprocess.run(
      [sys.executable, '-c', program, str(tmp_path), patience], capture_output=True, text=True
    )

  assert run('60').stdout == 'goes on\n'
  lost = run('0')
  assert lost.returncode == 1 and 'in use by another run, process unknown' in lost.stderr

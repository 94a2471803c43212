"""A work folder is one run's: by a lease that is renewed, and on a disk by flock as well."""

import contextlib
import errno
import json
import os
import re
import socket
import subprocess
import sys
import threading
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
    assert (workdir / 'run.lease').exists()
  assert not (workdir / 'run.lease').exists()
  started = time.monotonic()
  with pytest.raises(ZeroDivisionError):
    with lock(workdir):
      raise ZeroDivisionError
  with lock(workdir):
    pass
  assert time.monotonic() - started < 2, 'an end in good order leaves nothing to wait for'


@pytest.fixture
def hosts(quick, monkeypatch):
  """Hosts that share a disk, on which flock holds for each alone; a thread's name is its host."""
  monkeypatch.setattr(lock_lib, '_SETTLED', 1.5)
  monkeypatch.setattr(lock_lib.fcntl, 'flock', lambda *_: None)
  monkeypatch.setattr(socket, 'gethostname', lambda: threading.current_thread().name)


def _on(host, workdir):
  """What another host's attempt at the lock raises, or None."""
  raised = []

  def enter():
    try:
      with lock(workdir):
        pass
    except BlockingIOError as error:
      raised.append(error)

  thread = threading.Thread(target=enter, name=host)
  thread.start()
  thread.join()
  return raised[0] if raised else None


def test_a_run_on_another_host_is_seen_where_flock_is_not(tmp_path, hosts):
  workdir = epath.Path(tmp_path)
  with lock(workdir):
    for _ in range(2):  # who was refused has not changed that
      assert f'in use by another run, process {os.getpid()} on Main' in str(_on('b', workdir))
  started = time.monotonic()
  assert _on('b', workdir) is None
  with lock(workdir):
    pass
  assert time.monotonic() - started < 1, 'an end in good order leaves nothing to wait for'
  assert [path.name for path in tmp_path.iterdir()] == ['run.lock']


@pytest.mark.parametrize(('host', 'waits'), [('b', False), ('c', True)])
def test_a_killed_run_is_waited_for_on_other_hosts_alone(host, waits, tmp_path, hosts, capsys):
  (tmp_path / 'run.lease').write_text(json.dumps({**_LEFT, 'host': 'b'}))
  started = time.monotonic()
  assert _on(host, epath.Path(tmp_path)) is None
  assert (2.5 <= time.monotonic() - started) is waits
  assert ('process 7 on b: waiting' in capsys.readouterr().out) is waits
  assert not (tmp_path / 'run.lease').exists()


def test_of_runs_that_start_together_on_several_hosts_one_enters(tmp_path, hosts, monkeypatch):
  together, entered, refused = threading.Barrier(4), [], []
  make = lock_lib._make
  monkeypatch.setattr(lock_lib, '_make', lambda path: (together.wait(), make(path))[1])

  def enter():
    try:
      with lock(epath.Path(tmp_path)):
        entered.append(threading.current_thread().name)
        end = time.monotonic() + 5
        while len(refused) < 3 and time.monotonic() < end:
          time.sleep(0.05)
    except BlockingIOError as error:
      refused.append(str(error))

  threads = [threading.Thread(target=enter, name=name) for name in 'abcd']
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(entered) == 1 and len(refused) == 3
  assert all(f'on {entered[0]}: wait' in text for text in refused)


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
  started = time.monotonic()
  with lock(epath.Path(tmp_path)):
    assert json.loads((tmp_path / 'run.lock').read_text())['pid'] == os.getpid()
  assert time.monotonic() - started < 2, 'flock tells that it is gone'
  assert not (tmp_path / 'run.lease').exists()


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


# The second is taken at the moment in which it begins, by one that does so when it is settled.
@pytest.mark.parametrize('times', ['0.2, 0.1', '60, 1'])
def test_a_run_whose_lease_was_taken_ends_at_once(times, tmp_path):
  code = f"""
import json, time
from etils import epath
from aavs_jax.training import lock as lock_lib
lock_lib._RENEWED_EVERY, lock_lib._SETTLED = {times}
path = epath.Path({str(tmp_path)!r})
with lock_lib._lease(path, locked=True):
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


def test_a_folder_that_its_run_removes_is_not_lost_to_another(tmp_path):
  """As --fresh does, which may take long."""
  program = (
    'import pathlib, sys, time\n'
    'from etils import epath\n'
    'from aavs_jax.input_pipeline import files\n'
    'from aavs_jax.training import lock\n'
    'lock._SETTLED, lock._RENEWED_EVERY, lock._PATIENCE = 0, 0.05, 0\n'
    'with lock.lock(epath.Path(sys.argv[1])):\n'
    '  files.remove_folder(pathlib.Path(sys.argv[1]))\n'
    '  time.sleep(0.3)\n'
  )
  folder = tmp_path / 'run'
  done = subprocess.run([sys.executable, '-c', program, folder], capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (0, '')
  assert not folder.exists()


def test_the_lease_of_the_next_run_stays(tmp_path):
  """Where one ends that has slept for longer than the next has waited."""
  with lock_lib._lease(epath.Path(tmp_path)):
    (tmp_path / 'run.lease').write_text(json.dumps(_LEFT))
  assert json.loads((tmp_path / 'run.lease').read_text()) == _LEFT

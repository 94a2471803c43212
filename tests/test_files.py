"""Files and folders appear when they are complete, whoever is killed while it writes them."""

import errno
import os
import signal
import stat
import subprocess
import sys

import pytest

from aavs_jax.input_pipeline import files
from aavs_jax.input_pipeline.errors import UserError


def write(path, kind, text, meanwhile=lambda: None):
  """A file, or a folder with one; `meanwhile` is called when a part of it is there."""
  if kind == 'file':
    with files.writing(path) as working:
      working.write_text(text[:1])
      meanwhile()
      working.write_text(text)
  else:
    with files.writing_folder(path) as working:
      (working / f'{text[:1]}.txt').touch()
      meanwhile()
      (working / f'{text}.txt').touch()


def read(path, kind):
  return path.read_text() if kind == 'file' else sorted(p.stem for p in path.iterdir())


def names(folder):
  return sorted(path.name for path in folder.iterdir())


def fail():
  raise KeyboardInterrupt


@pytest.fixture(params=['file', 'folder'])
def kind(request):
  return request.param


def test_it_has_its_name_when_it_is_complete(kind, tmp_path):
  path = tmp_path / 'a' / 'b' / 'new.mp4'

  def meanwhile():
    assert not path.exists()

  write(path, kind, 'xyz', meanwhile)
  assert read(path, kind) == ('xyz' if kind == 'file' else ['x', 'xyz'])
  assert names(path.parent) == ['new.mp4']


def test_an_exception_leaves_all_as_it_was(kind, tmp_path):
  (tmp_path / 'mine').mkdir()
  with pytest.raises(KeyboardInterrupt):
    write(tmp_path / 'mine' / 'a' / 'b' / 'new', kind, 'xyz', fail)
  assert names(tmp_path) == ['mine'] and names(tmp_path / 'mine') == []
  old = tmp_path / 'old'
  old.write_text('old')
  with pytest.raises(KeyboardInterrupt):
    write(old, kind, 'xyz', fail)
  assert names(tmp_path) == ['mine', 'old'] and old.read_text() == 'old'


def test_what_a_killed_writer_left_goes_with_the_next(kind, tmp_path):
  path = tmp_path / 'out'
  code = (
    'import os, signal\n'
    'from tests.test_files import write\n'
    f'write({str(path)!r}, {kind!r}, "old", lambda: os.kill(os.getpid(), signal.SIGKILL))\n'
  )
  assert subprocess.run([sys.executable, '-c', code]).returncode == -signal.SIGKILL
  assert names(tmp_path) == ['.out.writing'] and names(tmp_path / '.out.writing')
  write(path, kind, 'new')
  assert names(tmp_path) == ['out']
  assert read(path, kind) == ('new' if kind == 'file' else ['n', 'new'])


def test_what_a_live_writer_has_so_far_stays(kind, tmp_path):
  path = tmp_path / 'out'

  def others():
    with pytest.raises(UserError, match='out is being written by another process: wait for it'):
      write(path, kind, 'second')
    write(tmp_path / 'beside', kind, 'other')

  write(path, kind, 'first', others)
  assert read(path, kind) == ('first' if kind == 'file' else ['f', 'first'])
  assert names(tmp_path) == ['beside', 'out']


def test_the_umask_says_who_may_read_it(kind, tmp_path):
  before = os.umask(0o026)
  try:
    write(tmp_path / 'out', kind, 'xyz')
  finally:
    os.umask(before)
  mode = stat.S_IMODE((tmp_path / 'out').stat().st_mode)
  assert oct(mode) == ('0o640' if kind == 'file' else '0o751')


def test_a_disk_that_knows_no_locks_will_do(kind, tmp_path, monkeypatch):
  def flock(*_):
    raise OSError(errno.ENOSYS, 'Function not implemented')

  monkeypatch.setattr(files.fcntl, 'flock', flock)
  write(tmp_path / 'out', kind, 'xyz')
  assert names(tmp_path) == ['out']


def test_a_place_where_nothing_can_be_is_named(kind, tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match=r'file/a/out cannot be written \(Not a directory\): name'):
    write(tmp_path / 'file' / 'a' / 'out', kind, 'xyz')
  assert names(tmp_path) == ['file']


def test_json_in_a_bucket(bucket):
  for path in (bucket / 'a.json', f'{bucket}/b.json'):
    files.write_json(path, {'a': [1]})
    with pytest.raises(KeyboardInterrupt):
      write(path, 'file', 'xyz', fail)
  assert names(bucket) == ['a.json', 'b.json']
  for path in bucket.iterdir():
    assert files.read_json(path, {'a': [int]}, '') == {'a': [1]}


def test_a_folder_goes_whole(tmp_path):
  folder, left = tmp_path / 'run', tmp_path / '.run.removing'
  for there in ([folder, left], [folder], [left], []):  # left by a process that was killed
    for path in there:
      (path / 'a').mkdir(parents=True)
      (path / 'a' / 'b').touch()
    files.remove_folder(folder)
    assert names(tmp_path) == []


@pytest.mark.parametrize('error', [TimeoutError(), OSError('Forbidden: no access'), OSError('502')])
def test_a_bucket_that_cannot_be_asked_holds_nothing_missing_or_damaged(error, bucket, monkeypatch):
  files.write_json(bucket / 'a.json', [1])
  assert files.is_there(bucket) and files.is_there(bucket / 'a.json')
  assert not files.is_there(bucket / 'none.json')
  with pytest.raises(UserError, match=r'none\.json is missing: restore it'):
    files.read_json(bucket / 'none.json', [int], 'restore it')

  def fail(*args, **kwargs):
    raise error

  for name in ('stat', 'read_text'):
    monkeypatch.setattr(type(bucket), name, fail)
  for ask in (files.is_there, lambda path: files.read_json(path, [int], '')):
    with pytest.raises(OSError) as raised:
      ask(bucket / 'a.json')
    assert raised.value is error

"""The launchers, with fakes of the tools they call: what they print, and that they run just it."""

import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from aavs_jax.configs import base

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / 'launch'
LAUNCHERS = ('tpu_vm.sh', 'gke.sh', 'slurm.sh', 'multi_gpu.sh')
SCRIPTS = (*LAUNCHERS, 'slurm_job.sh', 'launcher.sh', 'gke/entrypoint.sh')
# Whatever a launcher calls, and what it must not fall back to.
TOOLS = (
  'gcloud', 'kubectl', 'docker', 'sbatch', 'srun', 'scancel', 'scontrol', 'ssh', 'scp', 'tar',
  'mkdir', 'pip', 'python', 'python3', 'cmp', 'cp', 'curl',
)  # fmt: skip
# Notes its arguments and its input; answers like a queued resource that is there.
RECORDER = """#!/bin/bash
{ printf '%s\\0' "${0##*/}" "$@"; printf '\\n'; } >> "$CALLS"
case $* in
  *--filename=-*) cat >> "$CALLS.stdin" ;; *describe*) echo ACTIVE ;; get*) echo Running ;;
esac
"""
TRAINS = 'for _ in {1..400}; do sleep 0.05; done'  # until a signal, but not for ever
FORBIDDEN = '#!/bin/bash\necho "${0##*/} was called" >&2\nexit 97\n'

TRAINING = (
  '--config', 'my configs/a.py', '--workdir', 'gs://bucket/run 1',
  "--config.train.trainable=('aavs/a b','it$','\\.x')", '--config.data.root=', "--config.x=it's",
  '--config.y=$(HOME) `id` "q" & ; > *',
)  # fmt: skip
TPU = (
  '--project', 'my-project', '--zone', 'us-west4-a', '--name', 'aavs', '--type', 'v5litepod-16',
)  # fmt: skip
GKE = (
  '--name', 'aavs', '--image', 'registry/aavs:1', '--accelerator', 'tpu-v5-lite-podslice',
  '--topology', '4x4', '--bucket', 'my-bucket',
)  # fmt: skip
SLURM = ('--nodes', '2', '--gpus-per-node', '8')
STEPS = ('create', 'wait', 'copy', 'install', 'data', 'run', 'logs', 'stop', 'delete')


@pytest.fixture
def tools(tmp_path):
  """A function that makes a PATH with bash, dirname, cat and one script for each name given."""

  def make(**scripts):
    folder = tmp_path / f'bin{len(list(tmp_path.glob("bin*")))}'
    folder.mkdir()
    for name in ('bash', 'dirname', 'cat'):
      (folder / name).symlink_to(shutil.which(name))
    for name, text in scripts.items():
      (folder / name).write_text(text)
      (folder / name).chmod(0o755)
    return str(folder)

  return make


def _bash(script, *arguments, path, cwd=ROOT, **environment):
  return subprocess.run(
    ['bash', str(script), *arguments],
    env={'PATH': path, 'HOME': '/nowhere', **environment},
    cwd=cwd,
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    timeout=60,
  )


@pytest.fixture
def dry_run(tools):
  """A function that runs a launcher with --dry-run, where every tool fails, to what it printed."""
  path = tools(**dict.fromkeys(TOOLS, FORBIDDEN))

  def run(script, *arguments, **environment):
    done = _bash(LAUNCH / script, '--dry-run', *arguments, path=path, **environment)
    assert (done.returncode, done.stderr) == (0, ''), done.stderr
    return done.stdout

  return run


def _commands(text):
  return [shlex.split(line, comments=True) for line in text.splitlines() if line[0] != '#']


def _after(words, word):
  return tuple(words[words.index(word) + 1 :])


def _remote(command):
  """The shell line that a gcloud ssh command runs on its workers."""
  [line] = [word.removeprefix('--command=') for word in command if word.startswith('--command=')]
  return line


def _calls(file):
  return [line.split('\0')[:-1] for line in file.read_text().splitlines()]


@pytest.fixture
def project(tmp_path):
  """A copy of the project's launchers beside an environment that is installed already."""
  root = tmp_path / 'project folder'
  shutil.copytree(LAUNCH, root / 'launch')
  shutil.copy(ROOT / 'pyproject.toml', root)
  programs = root / '.venv' / 'bin'
  programs.mkdir(parents=True)
  shutil.copy(ROOT / 'pyproject.toml', root / '.venv' / 'installed[cuda]')
  (root / '.venv' / 'pyvenv.cfg').write_text(f'version = {platform.python_version()}\n')
  for name in ('python', 'aavs'):
    (programs / name).write_text(RECORDER.replace('"${0##*/}"', '"${0##*/}" "$JAX_PLATFORMS"'))
    (programs / name).chmod(0o755)
  return root


@pytest.mark.parametrize('script', SCRIPTS)
def test_scripts_are_sound_bash(script):
  subprocess.run(['bash', '-n', LAUNCH / script], check=True)
  if shutil.which('shellcheck'):
    # A sourced file has no first line that names its shell.
    subprocess.run(['shellcheck', '-x', '-s', 'bash', script], check=True, cwd=LAUNCH)


def test_tpu_vm_prints_its_commands(dry_run):
  data = ('--data-from', 'gs://bucket/my set')
  commands = _commands(dry_run('tpu_vm.sh', *STEPS, *TPU, *data, '--', *TRAINING))
  where = ['--project=my-project', '--zone=us-west4-a']
  tpu_vm = ['gcloud', 'compute', 'tpus', 'tpu-vm']
  assert commands[0] == [
    *tpu_vm, 'create', 'aavs', '--version=v2-alpha-tpuv5-lite', *where,
    '--accelerator-type=v5litepod-16',
  ]  # fmt: skip
  assert commands[-1] == [*tpu_vm, 'delete', 'aavs', *where]
  assert all(set(where) <= set(command) for command in commands if command[0] == 'gcloud')
  assert [command[3:5] + command[-2:-1] for command in commands if 'ssh' in command] == [
    ['tpu-vm', 'ssh', '--worker=all'],  # whether one runs
    ['tpu-vm', 'ssh', '--worker=all'],  # copy
    ['tpu-vm', 'ssh', '--worker=all'],  # install
    ['tpu-vm', 'ssh', '--worker=all'],  # data
    ['tpu-vm', 'ssh', '--worker=all'],  # run
    ['tpu-vm', 'ssh', '--worker=0'],  # logs
    ['tpu-vm', 'ssh', '--worker=all'],  # stop
  ]
  [scp] = [command for command in commands if 'scp' in command]
  assert '--worker=all' in scp and 'build/aavs_jax.tgz' in scp
  [tar] = [command for command in commands if command[0] == 'tar']
  copied = {*_after(tar, 'build/aavs_jax.tgz')}
  # With what `aavs selftest` compares this device with.
  assert {'pyproject.toml', 'aavs_jax', 'configs', 'input_pipeline', 'tests/goldens'} <= copied
  assert all((ROOT / name).exists() for name in copied)


@pytest.mark.parametrize(
  ('type', 'runtime'),
  [
    ('v3-8', 'tpu-ubuntu2204-base'),
    ('v4-16', 'tpu-ubuntu2204-base'),
    ('v5litepod-16', 'v2-alpha-tpuv5-lite'),
    ('v5p-64', 'v2-alpha-tpuv5'),
    ('v6e-256', 'v2-alpha-tpuv6e'),
  ],
)
def test_the_runtime_follows_from_the_type(dry_run, type, runtime):
  named = (*TPU[:-1], type)
  [made] = _commands(dry_run('tpu_vm.sh', 'create', *named))
  assert {f'--version={runtime}', f'--accelerator-type={type}'} <= set(made)
  [made] = _commands(dry_run('tpu_vm.sh', 'create', *named, '--runtime', 'mine'))
  assert '--version=mine' in made


@pytest.mark.parametrize(
  ('steps', 'places'),
  [
    (('create', 'wait', 'copy', 'install', 'data', 'run', 'logs', 'stop', 'delete'), [2]),
    (('install',), [0]),
    (('data',), [0]),
    (('stop', 'run'), [1]),
    (('run', 'copy'), [0, 2]),
    (('create', 'wait', 'logs', 'stop', 'exec', 'delete'), []),
  ],
)
def test_what_a_training_uses_is_not_changed_while_it_runs(dry_run, steps, places):
  """It is looked for before the first step that changes something, and once."""
  after = TRAINING if 'run' in steps else ('true',)
  commands = _commands(dry_run('tpu_vm.sh', *steps, *TPU, '--data-from', 'gs://b/a', '--', *after))
  looks = ['stop it first' in command[-1] for command in commands]
  assert [place for place, looked in enumerate(looks) if looked] == places


def test_a_queued_spot_slice(dry_run):
  steps = ('create', 'wait', 'delete')
  more = ('--queued', '--spot', '--create-flag', '--network=a b', '--create-flag', '--reserved')
  create, wait, delete = _commands(dry_run('tpu_vm.sh', *steps, *TPU, *more))
  assert create[:6] == ['gcloud', 'compute', 'tpus', 'queued-resources', 'create', 'aavs']
  assert {'--node-id=aavs', '--runtime-version=v2-alpha-tpuv5-lite'} <= set(create)
  assert create[-3:] == ['--spot', '--network=a b', '--reserved']
  assert wait[3:6] == ['queued-resources', 'describe', 'aavs']
  assert delete[3:6] == ['queued-resources', 'delete', 'aavs'] and '--force' in delete


def test_values_come_from_the_environment_too(dry_run):
  values = dict(PROJECT='p', ZONE='z', TPU_NAME='n', ACCELERATOR_TYPE='v6e-256')
  by_flag = ('--project', 'p', '--zone', 'z', '--name', 'n', '--type', 'v6e-256')
  assert dry_run('tpu_vm.sh', 'create', **values) == dry_run('tpu_vm.sh', 'create', *by_flag)


def _wait_for(path):
  deadline = time.monotonic() + 20
  while not path.exists():
    assert time.monotonic() < deadline, f'{path} did not appear'
    time.sleep(0.02)


def test_what_runs_on_a_worker(dry_run, tmp_path):
  """The lines that `run` and `stop` send are run here, with a training that only notes."""
  lines = [
    _remote(command)
    for command in _commands(dry_run('tpu_vm.sh', 'run', 'stop', *TPU, '--', *TRAINING))
  ]
  folder = tmp_path / 'aavs_jax'
  program = folder / '.venv' / 'bin' / 'aavs'
  program.parent.mkdir(parents=True)
  program.write_text(
    '#!/bin/bash\necho a line of the log\nprintf "%s\\0" "$JAX_PLATFORMS" "$@" > given.part\n'
    f'trap "touch saved; exit 0" TERM\nmv given.part given\n{TRAINS}\n'
  )
  program.chmod(0o755)

  def on_worker(line):
    return subprocess.run(
      ['bash', '-c', line], cwd=tmp_path, capture_output=True, text=True, timeout=30
    )

  look, run, stop = lines
  folder.rename(tmp_path / 'later')
  assert on_worker(look).returncode == 0  # on a new slice
  (tmp_path / 'later').rename(folder)
  assert on_worker(look).returncode == on_worker(run).returncode == 0
  _wait_for(folder / 'given')
  given = (folder / 'given').read_text().split('\0')[:-1]
  assert given == ['tpu,cpu', 'train', '--distributed', *TRAINING]
  again = on_worker(look)
  assert again.returncode == 1 and 'stop it first' in again.stderr
  assert on_worker(stop).returncode == 0
  assert (folder / 'saved').exists()
  (folder / 'given').unlink()
  for line in (look, run):  # after a stop, the same command
    assert on_worker(line).returncode == 0
  _wait_for(folder / 'given')
  assert on_worker(stop).returncode == 0
  assert (folder / 'train.log').read_text() == 'a line of the log\n' * 2


def _manifest(text):
  """The JobSet in what gke.sh prints, read as kubectl would."""
  [command, rest] = text.split(" <<'END'\n", 1)
  assert shlex.split(command) == ['kubectl', 'apply', '--filename=-']
  return yaml.safe_load(rest.split('\nEND\n')[0])


def _pods(jobset):
  [replicated] = jobset['spec']['replicatedJobs']
  job = replicated['template']['spec']
  [container] = job['template']['spec']['containers']
  return replicated, job, job['template']['spec'], container


@pytest.mark.parametrize(
  ('topology', 'more', 'hosts', 'chips'),
  [
    ('4x4', (), 4, 4),
    ('2x2x4', (), 4, 4),
    ('16x16', (), 64, 4),
    ('2x4', ('--chips-per-host', '8'), 1, 8),
    ('2x2', (), 1, 4),
    ('1x1', (), 1, 1),
  ],
)
def test_the_jobset_fits_its_slice(dry_run, topology, more, hosts, chips):
  named = (*GKE, '--topology', topology, *more)
  jobset = _manifest(dry_run('gke.sh', 'apply', *named, '--', *TRAINING))
  replicated, job, pod, container = _pods(jobset)
  assert replicated['replicas'] == 1
  assert job['parallelism'] == job['completions'] == hosts
  resources = container['resources']
  assert resources['requests'] == resources['limits'] == {'google.com/tpu': chips}
  product = 1
  for side in pod['nodeSelector']['cloud.google.com/gke-tpu-topology'].split('x'):
    product *= int(side)
  assert hosts * chips == product
  assert (container['args'][1] == '--distributed') == (hosts > 1)


def test_the_jobset_trains_with_what_was_given(dry_run):
  jobset = _manifest(
    dry_run('gke.sh', 'apply', *GKE, '--service-account', 'trainer', '--', *TRAINING)
  )
  assert (jobset['kind'], jobset['metadata']['name']) == ('JobSet', 'aavs')
  _, job, pod, container = _pods(jobset)
  # Kubernetes reads $$ as $ and expands $(NAME) in arguments.
  assert not any(re.search(r'(?<!\$)(\$\$)*\$\(', text) for text in container['args'])
  arguments = [text.replace('$$', '$') for text in container['args']]
  assert arguments == ['train', '--distributed', *TRAINING]
  assert container['image'] == 'registry/aavs:1' and pod['serviceAccountName'] == 'trainer'
  assert {'name': 'JAX_PLATFORMS', 'value': 'tpu,cpu'} in container['env']
  selected = pod['nodeSelector']['cloud.google.com/gke-tpu-accelerator']
  assert selected == 'tpu-v5-lite-podslice'
  volumes = {volume.pop('name'): volume for volume in pod['volumes']}
  mounted = {mount['mountPath']: volumes[mount['name']] for mount in container['volumeMounts']}
  assert mounted['/gcs']['csi']['volumeAttributes']['bucketName'] == 'my-bucket'
  assert mounted['/dev/shm']['emptyDir']['medium'] == 'Memory'  # where loader processes write
  assert len(mounted) == len(volumes)

  # Failures restart the set, except for exit status 2, which is that of bad input.
  assert pod['restartPolicy'] == 'Never' and job['backoffLimit'] == 0
  assert jobset['spec']['failurePolicy']['maxRestarts'] > 0
  [rule] = jobset['spec']['failurePolicy']['rules']
  assert rule == {'action': 'FailJobSet', 'onJobFailureReasons': ['PodFailurePolicy']}
  [rule] = job['podFailurePolicy']['rules']
  codes = rule['onExitCodes']
  assert (rule['action'], codes['operator'], codes['values']) == ('FailJob', 'In', [2])
  assert codes['containerName'] == container['name']


def test_gke_prints_its_commands(dry_run):
  steps = ('image', 'logs', 'delete')
  image, push, _, logs, delete = _commands(
    dry_run('gke.sh', *steps, '--name', 'aavs', '--image', 'r/a:1', '--context', 'my cluster')
  )
  assert image[:2] == ['docker', 'build'] and image[-1] == str(ROOT) and '--tag=r/a:1' in image
  assert f'--file={LAUNCH}/gke/Dockerfile' in image and push == ['docker', 'push', 'r/a:1']
  assert logs[:3] == ['kubectl', '--context=my cluster', 'logs']
  assert (
    '--selector=jobset.sigs.k8s.io/jobset-name=aavs,batch.kubernetes.io/job-completion-index=0'
    in logs
  )
  assert delete[2:5] == ['delete', 'jobset', 'aavs']


def test_the_image_holds_the_project_and_nothing_else():
  copied = re.findall(r'^COPY (.+) \S+$', (LAUNCH / 'gke/Dockerfile').read_text(), re.MULTILINE)
  copied = {name for names in copied for name in names.split()}
  kept = (LAUNCH / 'gke/Dockerfile.dockerignore').read_text().split()
  assert kept[0] == '*' and {f'!{name}' for name in copied} == {k for k in kept if k[0] == '!'}
  assert all((ROOT / name).exists() for name in copied)


def test_slurm_prints_its_commands(dry_run):
  more = (
    '--partition', 'gpu', '--time', '24:00:00', '--account', 'my lab', '--cpus-per-gpu', '12',
    '--sbatch-flag', '--qos=long', '--sbatch-flag', '--exclude=node7,node8',
  )  # fmt: skip
  install, submit, inside = _commands(dry_run('slurm.sh', *SLURM, *more, '--', *TRAINING))
  assert install == ['make_environment', '[cuda]']
  assert submit[0] == 'sbatch' and _after(submit, 'launch/slurm_job.sh') == TRAINING
  assert {
    '--nodes=2', '--gpus-per-node=8', '--ntasks-per-node=8', '--cpus-per-task=12',
    '--partition=gpu', '--time=24:00:00', '--account=my lab', '--qos=long',
    '--exclude=node7,node8',
  } <= set(submit)  # fmt: skip
  # JAX would find no GPU but the first of each task's own.
  assert not any(word.startswith('--gpus-per-task') for word in submit + inside)
  assert inside[0] == 'srun'
  assert _after(inside, '.venv/bin/aavs') == ('train', '--distributed', *TRAINING)


def test_multi_gpu_prints_its_commands(dry_run):
  install, train = _commands(dry_run('multi_gpu.sh', '--', *TRAINING))
  assert install == ['make_environment', '[cuda]']
  # One process, so nothing to connect to.
  assert train == ['env', 'JAX_PLATFORMS=cuda,cpu', '.venv/bin/aavs', 'train', *TRAINING]


def test_tpu_vm_runs_what_it_prints(dry_run, tools, tmp_path):
  arguments = (*STEPS, *TPU, '--queued', '--data-from', 'gs://b/a', '--', *TRAINING)
  path = tools(**dict.fromkeys(TOOLS, RECORDER))
  done = _bash(LAUNCH / 'tpu_vm.sh', *arguments, path=path, CALLS=str(tmp_path / 'calls'))
  assert done.returncode == 0, done.stderr
  assert _calls(tmp_path / 'calls') == _commands(dry_run('tpu_vm.sh', *arguments))


def test_a_queue_that_does_not_answer_once_is_asked_again(tools):
  busy = BUSY.replace('"${0##*/}.busy"', '"$HOME/busy"') + 'echo ACTIVE\n'
  path = tools(gcloud=busy, sleep='#!/bin/bash\n')
  done = _bash(LAUNCH / 'tpu_vm.sh', 'wait', *TPU, path=path, HOME=path)
  assert done.returncode == 0 and 'not known now' in done.stdout
  path = tools(gcloud='#!/bin/bash\nexit 1\n', sleep='#!/bin/bash\n')
  done = _bash(LAUNCH / 'tpu_vm.sh', 'wait', *TPU, path=path)
  assert done.returncode == 2 and 'cannot be had' in done.stderr


def test_gke_runs_what_it_prints(dry_run, tools, tmp_path):
  path = tools(**dict.fromkeys(TOOLS, RECORDER))
  arguments = ('image', 'apply', 'logs', 'delete', *GKE, '--', *TRAINING)
  done = _bash(LAUNCH / 'gke.sh', *arguments, path=path, CALLS=str(tmp_path / 'calls'))
  assert done.returncode == 0, done.stderr
  printed = dry_run('gke.sh', *arguments)
  before, manifest, after = re.fullmatch(r"(.*?) <<'END'\n(.*\n)END\n(.*)", printed, re.S).groups()
  assert _calls(tmp_path / 'calls') == _commands(before) + _commands(after)
  assert (tmp_path / 'calls.stdin').read_text() == manifest


@pytest.mark.parametrize(
  ('script', 'arguments'), [('slurm.sh', (*SLURM, '--', *TRAINING)), ('multi_gpu.sh', TRAINING)]
)
def test_gpu_launchers_run_what_they_print(dry_run, tools, tmp_path, project, script, arguments):
  arguments = arguments if '--' in arguments else ('--', *arguments)
  path = f'{tools(sbatch=RECORDER)}:{os.environ["PATH"]}'
  calls = tmp_path / 'calls'
  done = _bash(
    project / 'launch' / script, *arguments, path=path, cwd=tmp_path, CALLS=str(calls),
    PYTHON=sys.executable,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  command = _commands(dry_run(script, *arguments))[1]
  if script == 'multi_gpu.sh':
    command = ['aavs', 'cuda,cpu', *_after(command, '.venv/bin/aavs')]
  ours = [call for call in _calls(calls) if call[-2:] != ['pip', '--version']]
  assert ours == [command]


@pytest.mark.parametrize('change', ['none', 'first', 'pip', 'python', 'libraries'])
@pytest.mark.parametrize('squeue', ['echo 7 gpu aavs', ':', 'echo no answer >&2; exit 1', None])
def test_an_environment_from_which_jobs_import_is_not_changed(
  tools, tmp_path, project, change, squeue
):
  venv = project / '.venv'
  if change == 'first':
    shutil.rmtree(venv)
  if change == 'pip':
    (venv / 'bin' / 'python').unlink()
  if change == 'python':
    (venv / 'pyvenv.cfg').write_text('version = 3.0\n')
  if change == 'libraries':
    (venv / 'installed[cuda]').write_text('')
  # As venv does, so far as it is asked for here.
  python = (
    '#!/bin/bash\n'
    f'if [ "$1" = -c ]; then exec {sys.executable} "$@"; fi\n'
    'printf "%s\\0" python "$@" >> "$CALLS"; echo >> "$CALLS"\n'
    'if [ "$2" = venv ]; then mkdir -p .venv/bin; cp "$0" .venv/bin/python; fi\n'
  )
  scripts = {'python3': python, 'sbatch': RECORDER}
  if squeue:
    asked = '[ "$*" = "--noheader --me --name=aavs" ] || exit'
    scripts['squeue'] = f'#!/bin/bash\n{asked}\n{squeue}\n'
  path = f'{tools(**scripts)}:/usr/bin:/bin'
  calls = tmp_path / 'calls'
  calls.touch()
  done = _bash(
    project / 'launch' / 'slurm.sh', *SLURM, '--', *TRAINING, path=path, cwd=tmp_path,
    CALLS=str(calls), PYTHON='python3',
  )  # fmt: skip
  words = [' '.join(call) for call in _calls(calls)]
  changed = [line for line in words if 'venv' in line or 'install' in line]
  if change not in ('none', 'first') and squeue == 'echo 7 gpu aavs':
    assert done.returncode == 2 and done.stderr.startswith('.venv would change under your jobs')
    assert not changed and not any(line.startswith('sbatch') for line in words)
  else:
    assert done.returncode == 0, done.stderr
    assert bool(changed) == (change != 'none') and words[-1].startswith('sbatch')


@pytest.mark.parametrize(
  ('script', 'arguments', 'words'),
  [
    ('tpu_vm.sh', (), 'no step is named'),
    ('tpu_vm.sh', ('run', *TPU[2:], '--', *TRAINING), '--project is missing: give it or set PROJ'),
    ('tpu_vm.sh', ('logs', '--project', 'p', '--name', 'n'), '--zone us-west4-a'),
    ('tpu_vm.sh', ('logs', '--project', 'p', '--zone', 'z'), 'set TPU_NAME'),
    ('tpu_vm.sh', ('create', *TPU[:-2]), 'ACCELERATOR_TYPE'),
    ('tpu_vm.sh', ('create', *TPU[:-1], 'v9-8'), 'gcloud compute tpus tpu-vm versions list'),
    ('tpu_vm.sh', ('data', *TPU), '--data-from gs://'),
    ('tpu_vm.sh', ('exec', *TPU), 'exec has no command'),
    ('tpu_vm.sh', ('run', *TPU), 'no --config'),
    ('tpu_vm.sh', ('run', *TPU, '--', '--config', 'c'), '--workdir gs://my-bucket/runs/stage1'),
    ('tpu_vm.sh', ('run', *TPU, '--config', 'c'), '--config is unknown'),
    ('tpu_vm.sh', ('logs', '--zone'), '--zone has no value'),
    ('gke.sh', ('apply', '--', *TRAINING), '--name is missing: give it or set JOBSET_NAME'),
    ('gke.sh', ('delete', '--name', 'My_Run'), '--name is My_Run'),
    ('gke.sh', ('apply', *GKE[:2]), 'set IMAGE'),
    ('gke.sh', ('apply', *GKE[:4]), 'set ACCELERATOR'),
    ('gke.sh', ('apply', *GKE[:6]), 'set TOPOLOGY'),
    ('gke.sh', ('apply', *GKE[:8]), 'set BUCKET'),
    ('gke.sh', ('apply', *GKE, '--bucket', 'gs://b', '--', *TRAINING), 'name alone'),
    ('gke.sh', ('apply', *GKE, '--topology', '4-4', '--', *TRAINING), '--topology is 4-4'),
    ('gke.sh', ('apply', *GKE, '--', '--config=a', '--workdir=/gcs/a'), 'as gs://my-bucket/a'),
    ('gke.sh', ('apply', *GKE, '--', '--config=a', '--workdir', '/gcs/a'), 'as gs://my-bucket/a'),
    ('gke.sh', ('apply', *GKE, '--', '--config=a', '--workdir=runs/a'), 'is runs/a, and only gs:'),
    ('gke.sh', ('apply', *GKE, '--', '--config=a', '--workdir=/b/a'), 'as gs://my-bucket/runs/st'),
    ('gke.sh', ('apply', *GKE, '--', '--config=a', '--workdir=s3://b/a'), 'is s3://b/a, and'),
    ('gke.sh', ('apply', *GKE, '--', '--config=a', '--workdir=gs://'), 'is gs://, and'),
    ('gke.sh', ('apply', *GKE, '--', '--config=a'), '-- --workdir gs://my-bucket/runs/stage1'),
    ('gke.sh', ('apply', *GKE, '--chips-per-host', '3', '--', *TRAINING), 'the 16 chips of 4x4'),
    ('gke.sh', ('apply', *GKE), 'no --config'),
    ('gke.sh', ('apply', *GKE, '--', *TRAINING, 'two\nlines'), 'line break'),
    ('slurm.sh', ('--gpus-per-node', '8', '--', *TRAINING), 'set NODES, such as --nodes 2'),
    ('slurm.sh', ('--nodes', '2', '--', *TRAINING), 'set GPUS_PER_NODE'),
    ('slurm.sh', ('--nodes', 'two', *SLURM[2:], '--', *TRAINING), "--nodes is 'two'"),
    ('slurm.sh', SLURM, 'no --config'),
    ('multi_gpu.sh', (), 'no --config'),
    ('multi_gpu.sh', ('--', '--config=c'), 'such as -- --workdir runs/stage1'),
  ],
)
@pytest.mark.parametrize('how', [('--dry-run',), ()])
def test_what_is_missing_is_named(tools, script, arguments, words, how):
  path = tools(**dict.fromkeys(TOOLS, FORBIDDEN))
  done = _bash(LAUNCH / script, *how, *arguments, path=path)
  assert (done.returncode, done.stdout) == (2, '')
  assert done.stderr.startswith(f'{script}: ') and words in done.stderr
  assert done.stderr.count('\n') == 1 or 'two\nlines' in arguments


def _examples(text):
  """Lines of examples that make sense without an account: exports and calls of launchers."""
  lines = re.sub(r'\\\n\s*', '', text).splitlines()
  lines = [line.strip() for line in lines]
  return [line for line in lines if re.match(r'export \S+=|bash launch/(?!quick|test)', line)]


@pytest.mark.parametrize('name', [*LAUNCHERS, 'README.md'])
def test_examples_work(tools, name):
  path = tools(**dict.fromkeys(TOOLS, FORBIDDEN))
  if name == 'README.md':
    text = (LAUNCH / name).read_text()
  else:
    done = _bash(LAUNCH / name, '--help', path=path)
    assert done.returncode == 0 and 'example' in done.stdout
    text = done.stdout.split('\nexample')[1]
  lines = _examples(text)
  assert any(line.startswith('bash') for line in lines)
  dry = [re.sub(r'(launch/\w+\.sh)', r'\1 --dry-run', line) for line in lines]
  done = subprocess.run(
    ['bash', '-euc', '\n'.join(dry)],
    env={'PATH': path}, cwd=ROOT, capture_output=True, text=True, timeout=60,
  )  # fmt: skip
  assert (done.returncode, done.stderr) == (0, '')

  for key in re.findall(r'--config\.([\w.]+)=', text):
    value = base.get_config()
    for part in key.split('.'):
      assert part in value, f'{name} sets config.{key}, which is no key'
      value = value[part]
  for path in re.findall(r'--config[ =](\S+)', text):
    assert (ROOT / path).is_file()


def _start(*command, cwd, **environment):
  return subprocess.Popen(
    command, cwd=cwd, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
  )


SAVES_ON_TERM = f'trap "touch saved; exit 0" TERM; touch ready; {TRAINS}'


@pytest.mark.parametrize('status', [0, 1, 2])
def test_the_image_passes_on_how_training_ended(status):
  done = subprocess.run(['bash', LAUNCH / 'gke/entrypoint.sh', 'bash', '-c', f'exit {status}'])
  assert done.returncode == status


def test_a_pod_that_is_taken_away_has_not_finished(tmp_path):
  """Else Kubernetes would take the exit status 0 of a saved training for the end of it."""
  entrypoint = str(LAUNCH / 'gke/entrypoint.sh')
  pod = _start('bash', entrypoint, 'bash', '-c', SAVES_ON_TERM, cwd=tmp_path)
  _wait_for(tmp_path / 'ready')
  pod.send_signal(signal.SIGTERM)
  assert pod.wait(20) == 143 and (tmp_path / 'saved').exists()


# As Slurm's controller may be at any moment; the second call succeeds.
BUSY = '#!/bin/bash\nif [ ! -e "${0##*/}.busy" ]; then : > "${0##*/}.busy"; exit 1; fi\n'


@pytest.fixture
def job(tools, tmp_path):
  """A function that starts the batch script where srun trains until SIGTERM."""

  def start(srun):
    path = tools(
      srun=f'#!/bin/bash\necho $$ > pid\nprintf "%s\\0" "$@" > given\n{srun}\n',
      scancel=f'{BUSY}echo "$*" > cancelled\nkill -TERM "$(cat pid)"\n',
      scontrol=f'{BUSY}echo "$*" > requeued\n',
    )
    return _start(
      'bash', str(LAUNCH / 'slurm_job.sh'), *TRAINING, cwd=tmp_path,
      PATH=f'{path}:{os.environ["PATH"]}', SLURM_JOB_ID='7', SLURM_CPUS_PER_TASK='8',
    )  # fmt: skip

  return start


def test_a_job_near_its_time_limit_saves_and_queues_again(job, tmp_path):
  running = job(SAVES_ON_TERM)
  _wait_for(tmp_path / 'ready')
  running.send_signal(signal.SIGUSR1)
  assert running.wait(20) == 0 and (tmp_path / 'saved').exists()
  assert (tmp_path / 'cancelled').read_text() == '--signal=TERM 7\n'
  assert (tmp_path / 'requeued').read_text() == 'requeue 7\n'
  given = tuple((tmp_path / 'given').read_text().split('\0')[:-1])
  assert _after(given, '.venv/bin/aavs') == ('train', '--distributed', *TRAINING)


def test_a_cancelled_job_is_left_time_to_save_and_stays_cancelled(job, tmp_path):
  running = job(SAVES_ON_TERM)
  _wait_for(tmp_path / 'ready')
  running.send_signal(signal.SIGTERM)  # Slurm sends it to the tasks as well
  time.sleep(0.3)
  assert running.poll() is None
  os.kill(int((tmp_path / 'pid').read_text()), signal.SIGTERM)
  assert running.wait(20) == 0 and (tmp_path / 'saved').exists()
  assert not (tmp_path / 'requeued').exists()


def test_a_job_fails_with_its_training(job, tmp_path):
  assert job('exit 3').wait(20) == 3
  assert not (tmp_path / 'requeued').exists()

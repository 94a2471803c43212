"""A folder that any static server serves: a page on which a browser sees, hears and marks."""

import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from aavs_jax.export import MODEL, export
from aavs_jax.input_pipeline import files
from aavs_jax.input_pipeline.errors import UserError

RUNTIME = 'onnxruntime-web@1.30.0'  # of npm
# The build without WebGPU, and its licence and version.
_RUNTIME_FILES = (
  'dist/ort.wasm.bundle.min.mjs', 'dist/ort-wasm-simd-threaded.wasm', 'package.json',
)  # fmt: skip
_PAGE = Path(__file__).parent / 'page'


def write_demo(
  out: str | Path,
  *,
  stage1: str | Path | None,
  stage2: str | Path | None = None,
  runtime: str | Path | None = None,
) -> Path:
  """Writes the page, the models as ONNX, and onnxruntime-web; the folder appears when complete.

  Nothing is loaded from elsewhere when it runs.

  Args:
    out: a new or empty folder.
    stage1: as `predict.predict`.
    stage2: as `predict.predict`.
    runtime: the unpacked npm package onnxruntime-web; without it npm fetches RUNTIME.

  Returns:
    out.

  Raises:
    UserError: a model or the folder is at fault, the extra `onnx` is not installed, the method sees
      several frames together, or onnxruntime-web cannot be had.
  """
  target = files.new_folder(out)
  if stage1 is None and stage2 is None:
    raise UserError('no model is given: name a work folder of `aavs train` with --stage1')
  with files.writing_folder(target) as working:
    (working / 'onnxruntime').mkdir()
    if runtime is not None:
      _copy_runtime(Path(runtime), working / 'onnxruntime')
    else:
      with tempfile.TemporaryDirectory() as folder:
        _copy_runtime(_fetch_runtime(Path(folder)), working / 'onnxruntime')
    models = working / 'models'
    if stage2 is None:
      export(stage1, models, 'onnx')
    else:
      export(stage2, models, 'onnx', stage1)
    described = files.read_json(models / MODEL, dict, 'export the model again')
    unit = max(stage['inputs'][0]['shape'][0] for stage in described['stages'].values())
    if unit > 1:
      raise UserError(
        f'{stage2 or stage1} sees {unit} frames of a clip together, and the page gives one at a '
        'time: use `aavs predict`'
      )
    shutil.copytree(_PAGE, working, dirs_exist_ok=True)
  return Path(out)


def _copy_runtime(package: Path, folder: Path) -> None:
  for name in _RUNTIME_FILES:
    if not (package / name).is_file():
      raise UserError(
        f'{package} has no {name}: name the unpacked npm package {RUNTIME} with --onnxruntime'
      )
    shutil.copy(package / name, folder)


def _fetch_runtime(folder: Path) -> Path:
  """Has npm download the package; returns it, unpacked."""
  advice = f'name the unpacked npm package {RUNTIME} with --onnxruntime'
  if shutil.which('npm') is None:
    raise UserError(f'the page needs onnxruntime-web, and there is no npm to fetch it: {advice}')
  command = ('npm', 'pack', RUNTIME, '--prefer-offline', '--pack-destination', str(folder))
  run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
  archives = list(folder.glob('*.tgz'))
  if run.returncode or not archives:
    reason = next((line for line in run.stderr.splitlines() if 'ERR' in line.upper()), 'no reason')
    raise UserError(f'npm could not fetch {RUNTIME} ({reason.strip()}): {advice}')
  with tarfile.open(archives[0]) as archive:
    for name in _RUNTIME_FILES:
      archive.extract(f'package/{name}', folder, filter='data')
  return folder / 'package'

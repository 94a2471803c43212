"""PyTorch state dicts and safetensors in and out, as numpy arrays; no code in a file is run."""

import importlib
import json
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np

from aavs_jax.console import say
from aavs_jax.input_pipeline import files
from aavs_jax.input_pipeline.errors import UserError

_TORCH = ('.pth', '.pt', '.bin')
_SAFETENSORS = '.safetensors'
WRITABLE = ('.pth', _SAFETENSORS)
# What a folder of the transformers library may hold, the first one found is read.
_IN_A_FOLDER = ('model.safetensors', 'pytorch_model.bin')
_NESTED = ('state_dict', 'model')  # where training scripts keep the weights beside an optimiser


def read_tensors(source: Path) -> dict[str, np.ndarray]:
  """Every tensor of a state dict by its name, in the order of the file.

  Numbers of another precision come as float32 (and are counted aloud). A state dict may lie in a
  dictionary under 'state_dict' or 'model', and its names may begin with the 'module.' of
  DataParallel, which is removed.

  Args:
    source: a .safetensors file, a .pth, .pt or .bin file, or a folder of the transformers library
      with one of them, whole or in shards with an index.

  Raises:
    UserError: no such file, a damaged one, one that holds anything but named tensors, or the
      library that reads it is not installed.
  """
  tensors = {}
  for path in _files(source):
    tensors |= _read_file(path)
  if tensors and all(name.startswith('module.') for name in tensors):
    tensors = {name.removeprefix('module.'): value for name, value in tensors.items()}
  return tensors


def _files(source: Path) -> list[Path]:
  if source.is_file():
    return [source]
  if not source.is_dir():
    raise UserError(f'{source} does not exist: name a checkpoint file or folder')
  for name in _IN_A_FOLDER:
    if (source / name).is_file():
      return [source / name]
    index = source / f'{name}.index.json'
    if index.is_file():
      return _shards(index)
  raise UserError(
    f'{source} holds none of {", ".join(_IN_A_FOLDER)} and no index of shards: name the checkpoint '
    'file itself'
  )


def _shards(index: Path) -> list[Path]:
  try:
    names = sorted(set(json.loads(index.read_text())['weight_map'].values()))
    paths = [index.parent / Path(name).name for name in names]
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f'{index} is not an index of shards: fetch it again') from error
  for path in paths:
    if not path.is_file():
      raise UserError(f'{path} is missing, which {index.name} names: fetch all of the shards')
  return paths


def _read_file(path: Path) -> dict[str, np.ndarray]:
  if path.suffix not in (*_TORCH, _SAFETENSORS):
    raise UserError(
      f'{path} is not read: give a file that ends in {", ".join((*_TORCH, _SAFETENSORS))}'
    )
  load = _load_safetensors if path.suffix == _SAFETENSORS else _load_torch
  try:
    tensors = load(path)
  except UserError:
    raise
  except Exception as error:  # the libraries raise anything on damaged files
    raise UserError(
      f'{path} cannot be read as tensors ({type(error).__name__}): it is damaged, of another '
      'format, or asks to run code, which is not done: fetch it again, or save its state_dict()'
    ) from error
  cast = Counter()
  for name, value in tensors.items():
    if value.dtype.kind != 'i' and value.dtype != np.float32:
      cast[str(value.dtype)] += 1
      tensors[name] = value.astype(np.float32)
  for dtype, count in cast.items():
    say(f'  {count} tensors of {path.name} are {dtype} and are kept as float32')
  return tensors


def _load_safetensors(path: Path) -> dict[str, np.ndarray]:
  return _library('safetensors.numpy', path).load_file(path)


def _load_torch(path: Path) -> dict[str, np.ndarray]:
  torch = _library('torch', path)
  # Files of today are zip archives, whose tensors are read when they are used.
  loaded = torch.load(path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path))
  if isinstance(loaded, Mapping):
    nested = (loaded[key] for key in _NESTED if isinstance(loaded.get(key), Mapping))
    loaded = next(nested, loaded)
  else:
    loaded = {'': loaded}
  for name, value in loaded.items():
    if not (name and isinstance(name, str) and isinstance(value, torch.Tensor)):
      raise UserError(
        f'{path} holds a {type(value).__name__} under {name!r}, not named tensors alone: save its '
        'state_dict()'
      )

  def to_numpy(tensor):
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # which numpy has from elsewhere
      return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()

  return {name: to_numpy(value) for name, value in loaded.items()}


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes a .pth (names in the order given) or .safetensors file (which orders them itself).

  The file has its name only once it is complete.

  Raises:
    UserError: the library that writes it is not installed.
  """
  tensors = {name: np.array(value, order='C') for name, value in tensors.items()}
  library = _library('safetensors.numpy' if path.suffix == _SAFETENSORS else 'torch', path)
  with files.writing(path) as working:
    if path.suffix == _SAFETENSORS:
      # Not by save_file, whose file its owner alone may read.
      working.write_bytes(library.save(tensors, metadata={'format': 'pt'}))
    else:
      with open(working, 'wb') as file:
        library.save({name: library.from_numpy(value) for name, value in tensors.items()}, file)


def _library(name: str, path: Path) -> ModuleType:
  """A library of the extra `convert`, wanted only by those who read and write such files."""
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise UserError(
      f'{path} needs {name.split(".")[0]}, which is not installed: install the extra `convert` as '
      'by `pip install -e .[convert]`'
    ) from error

"""Audio-visual segmentation in JAX: Stepping Stones with the AAVS model.

`configs` and `input_pipeline` are sub-packages, so that folders of these names in other projects
cannot take their place. Where the package is installed they lie in its folder, in a checkout
beside it.
"""

import importlib
from pathlib import Path
from types import ModuleType

if not Path(__path__[0], 'input_pipeline').is_dir():
  __path__.append(str(Path(__path__[0]).parent))


def __getattr__(name: str) -> ModuleType:
  """A module, at its first use: `import aavs_jax; aavs_jax.train` works and costs nothing."""
  try:
    return importlib.import_module(f'{__name__}.{name}')
  except ModuleNotFoundError as error:
    if error.name != f'{__name__}.{name}':
      raise
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}') from None

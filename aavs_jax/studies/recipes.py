"""The published recipes, each told by what it changes."""

import importlib
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from flax import traverse_util

from aavs_jax import configs
from aavs_jax.configs import base

_WIDTH = 100


def published() -> dict[str, ml_collections.ConfigDict]:
  """Every variant of every config file that has VARIANTS, by name: 's4', 's4:paper', ...

  The variant that a file stands for by itself has the file's name alone. Files with fewer changes
  of configs/base.py come first.
  """
  names = sorted(path.stem for path in Path(configs.__path__[0]).glob('*.py'))
  names.remove('__init__')
  modules = [importlib.import_module(f'aavs_jax.configs.{name}') for name in names]
  modules = [module for module in modules if hasattr(module, 'VARIANTS')]
  result = {}
  for module in sorted(modules, key=lambda module: len(changes(module.get_config()))):
    name = module.__name__.removeprefix('aavs_jax.configs.')
    result[name] = module.get_config()
    for variant in module.VARIANTS:
      config = module.get_config(variant)
      if changes(config, result[name]):
        result[f'{name}:{variant}'] = config
  return result


def changes(
  config: ml_collections.ConfigDict, origin: ml_collections.ConfigDict | None = None
) -> dict[str, Any]:
  """Dotted key -> value of config where it is not that of origin (configs/base.py)."""
  origin = base.get_config() if origin is None else origin
  old, new = (traverse_util.flatten_dict(c.to_dict(), sep='.') for c in (origin, config))
  return {key: value for key, value in new.items() if key not in old or value != old[key]}


def format_recipes(recipes: Mapping[str, ml_collections.ConfigDict]) -> str:
  """A table of recipes: name, the one it is nearest to, what it changes of that.

  Nearest is the one of fewest changes, and of equals the one nearest to configs/base.py; only those
  that are nearer to it than the recipe itself are considered.
  """
  size = {name: len(changes(config)) for name, config in recipes.items()}
  rows = [('recipe', 'is', 'with'), ('------', '--', '----')]
  for name, config in recipes.items():
    earlier = sorted((other for other in recipes if size[other] < size[name]), key=size.get)
    known = {other: recipes[other] for other in earlier} or {'base': base.get_config()}
    apart = {other: changes(config, origin) for other, origin in known.items()}
    nearest = min(apart, key=lambda other: len(apart[other]))
    rows.append((name, nearest, ', '.join(f'{k}={_text(v)}' for k, v in apart[nearest].items())))
  return _table(rows)


def format_recipe(config: ml_collections.ConfigDict) -> str:
  """A table of what one recipe changes of configs/base.py."""
  old = traverse_util.flatten_dict(base.get_config().to_dict(), sep='.')
  return _table([
    (key, f'{_text(value)} instead of {_text(old.get(key))}')
    for key, value in changes(config).items()
  ])  # fmt: skip


def _text(value: Any) -> str:
  if isinstance(value, tuple):
    return ' '.join(map(str, value))
  return f'{value:g}' if isinstance(value, float) else str(value)


def _table(rows: Sequence[Sequence[str]]) -> str:
  """Rows in columns, the last of which is wrapped to what the others leave of the width."""
  widths = [max(map(len, column)) + 2 for column in list(zip(*rows))[:-1]]
  lines = []
  for *row, last in rows:
    start = ''.join(text.ljust(width) for text, width in zip(row, widths))
    lines += textwrap.wrap(
      last,
      _WIDTH,
      initial_indent=start,
      subsequent_indent=' ' * len(start),
      break_long_words=False,
      break_on_hyphens=False,
    ) or [start.rstrip()]
  return '\n'.join(lines)

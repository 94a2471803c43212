"""Methods of audio-visual segmentation, by config.method; method.py says what a method is."""

import functools
import importlib
from types import ModuleType
from typing import Any

import ml_collections

from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.methods.method import Method


def module_of(config: ml_collections.ConfigDict) -> ModuleType:
  """The module that config.method names. Raises UserError if there is none."""
  name = config.method if '.' in config.method else f'{__name__}.{config.method}'
  try:
    module = importlib.import_module(name)
  except ModuleNotFoundError as error:
    if error.name is None or not f'{name}.'.startswith(f'{error.name}.'):
      raise  # it is there, and lacks another
    module = None
  except TypeError:  # a dot in front
    module = None
  if not all(hasattr(module, part) for part in ('method', 'check', 'MAY_BE_ZERO')):
    raise UserError(
      f'config.method is {config.method!r}, no module that has method, check and MAY_BE_ZERO: name '
      'one of aavs_jax.methods, as aavs, or one of your own with dots, as my_project.my_method, '
      'where Python finds it'
    )
  return module


def of(config: ml_collections.ConfigDict) -> Method:
  """The method of a config, in the sizes of the config."""
  return module_of(config).method(config)


def require_nonnegative_scores(config: ml_collections.ConfigDict) -> None:
  """UserError for a method that no soft masks can be made of."""
  if not of(config).nonnegative_scores:
    raise UserError(
      f'config.method is {config.method!r}, whose scores may be below 0, so that no soft mask is a '
      'share of them: leave soft masks out (--soft, config.prior.soft)'
    )


def forms(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """How the method computes, see Method.forms, by the last part of each key."""
  return {
    key.rpartition('.')[2]: functools.reduce(getattr, key.split('.'), config)
    for key in of(config).forms
  }

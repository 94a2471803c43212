"""Compiles one kind of module alone for a TPU chip: minutes become seconds, to try other forms."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from aavs_jax import methods
from aavs_jax.devices.mesh import make_mesh, replicated
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.perf.aot import abstract_batch, parse_topology, slice_devices
from aavs_jax.perf.hlo import work
from aavs_jax.training.phases import placed


class _Call(NamedTuple):
  """A call of a module, as it was traced."""

  module: nn.Module  # without its parent
  variables: Any  # of shapes
  rngs: tuple[str, ...]  # streams that it may draw from
  leaves: tuple[Any, ...]  # of its arguments: arrays as shapes, and what is fixed
  tree: Any  # of its arguments

  def describe(self) -> str:
    """The module with its fields, initialisers left out."""
    values = {f.name: getattr(self.module, f.name) for f in dataclasses.fields(self.module)}
    own = [f'{k}={v}' for k, v in values.items() if k not in ('parent', 'name') and not callable(v)]
    return f'{type(self.module).__name__}({", ".join(own)})'


def _is_shape(leaf: Any) -> bool:
  return isinstance(leaf, jax.ShapeDtypeStruct)


def _shape(leaf: Any) -> Any:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, jax.Array) else leaf


def traced_calls(config: ml_collections.ConfigDict, batch: dict, name: str) -> list[_Call]:
  """Calls of modules of a class in the forward pass of training, each once that differs.

  Raises:
    UserError: the method calls no such module.
  """
  calls, others = {}, set()

  def record(following, args, kwargs, context):
    kind = type(context.module).__name__
    if context.method_name == '__call__':
      others.add(kind)
    if context.method_name == '__call__' and kind == name:
      leaves, tree = jax.tree.flatten((args, kwargs))
      call = _Call(
        context.module.clone(parent=None, name=None),
        jax.tree.map(_shape, dict(context.module.variables)),
        tuple(context.module.scope.rngs),
        tuple(_shape(leaf) for leaf in leaves),
        tree,
      )
      calls.setdefault((call.describe(), repr(call.leaves)), call)
    return following(*args, **kwargs)

  method = methods.of(config)
  with nn.intercept_methods(record):
    key = jax.eval_shape(jax.random.key, 0)
    variables = jax.eval_shape(method.init, key)
    calls.clear()  # initialising runs layers one by one, with other arguments
    jax.eval_shape(method.apply, variables, batch, key)
  if not calls:
    raise UserError(f'--part {name}: {config.method} has none, only {", ".join(sorted(others))}')
  return list(calls.values())


def parts(
  config: ml_collections.ConfigDict,
  topology: str,
  name: str,
  frames: int | None = None,
  *,
  progress: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
  """Compiles each kind of call of a module alone, forward, and with the gradient of its inputs.

  Args:
    config: the model.
    topology: of one chip, such as v5e:1x1; see aot.parse_topology.
    name: class of the module, such as SwinBlock.
    frames: of a batch; by default as few as there can be.
    progress: told a line about each.

  Returns:
    For each the module with its fields, its inputs (shapes) and, by pass, cycles, flops and bytes.

  Raises:
    UserError: no such module, a slice of several chips, or frames that are no whole clips.
  """
  unit = methods.of(config).unit
  frames = unit if frames is None else frames
  if frames < 1 or frames % unit:
    raise UserError(f'--batch-per-chip is {frames}: use a multiple of {unit}')
  where = parse_topology(topology)
  if where.chips > 1:
    raise UserError(f'--topology {where} has {where.chips} chips: --part is for one, as v5e:1x1')
  mesh = make_mesh(1, slice_devices(where))
  place = replicated(mesh)
  found = []
  with jax.set_mesh(mesh):
    batch = abstract_batch(config, mesh, frames)
    for call in traced_calls(config, batch, name):
      arrays = [placed(leaf, place) for leaf in call.leaves if _is_shape(leaf)]
      variables = jax.tree.map(lambda leaf: placed(leaf, place), call.variables)
      inputs = ', '.join(f'{leaf.dtype}{list(leaf.shape)}' for leaf in arrays)
      row = {'module': call.describe(), 'inputs': inputs}
      for direction, function in (('forward', _forward(call)), ('both', _both(call))):
        started = time.monotonic()
        done = work(jax.jit(function).lower(variables, arrays).compile().as_text())
        row[direction] = {'cycles': done.cycles, 'flops': done.flops, 'bytes': done.bytes}
        row[direction]['compile_seconds'] = time.monotonic() - started
      found.append(row)
      progress(format_part(row))
  return found


def _forward(call: _Call) -> Callable:
  def forward(variables, arrays):
    rest = iter(arrays)
    leaves = [next(rest) if _is_shape(leaf) else leaf for leaf in call.leaves]
    args, kwargs = jax.tree.unflatten(call.tree, leaves)
    rngs = {name: jax.random.key(0) for name in call.rngs}
    running = [name for name in variables if name != 'params']
    outputs, _ = call.module.apply(variables, *args, **kwargs, rngs=rngs, mutable=running)
    return outputs

  return forward


def _both(call: _Call) -> Callable:
  def both(variables, arrays):
    real = [jnp.issubdtype(array.dtype, jnp.floating) for array in arrays]

    def of_real(values):
      values = iter(values)
      mixed = [next(values) if is_real else array for is_real, array in zip(real, arrays)]
      return _forward(call)(variables, mixed)

    out, back = jax.vjp(of_real, [array for is_real, array in zip(real, arrays) if is_real])
    # Not a constant, of which the compiler would make less work.
    return out, back(jax.tree.map(jnp.cos, out))

  return both


def format_part(row: dict[str, Any]) -> str:
  """A call's figures as lines."""
  lines = [f'{row["module"]} of {row["inputs"]}']
  for direction, title in (('forward', 'forward'), ('both', 'with gradients of inputs')):
    part = row[direction]
    lines.append(
      f'  {title:26}{part["cycles"] / 1e6:8.2f} M cycles{part["flops"] / 1e9:10.1f} GFLOP'
      f'{part["bytes"] / 1e9:8.2f} GB   compiled in {part["compile_seconds"]:.0f} s'
    )
  return '\n'.join(lines)

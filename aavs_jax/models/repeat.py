"""Layers that repeat: one compiled loop body, and a choice of what the backward pass keeps."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

SAMPLED = 'sampled'  # name of what deformable attention has read: little, and dear to read again
# What the backward pass keeps of a layer; the rest it computes again.
REMAT_POLICIES = {
  'none': jax.checkpoint_policies.everything_saveable,
  'dots': jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # outputs of dense layers
    jax.checkpoint_policies.save_only_these_names(SAMPLED),
  ),
  'full': jax.checkpoint_policies.nothing_saveable,
}


def run_layers(
  parent: nn.Module,
  layers: Sequence[Callable[..., nn.Module]],
  names: Sequence[str],
  call: Callable[[nn.Module, int, Any], tuple[Any, Any]],
  carry: Any,
  *,
  period: int,
  remat: str,
  rng: str | None = None,
) -> tuple[Any, list[Any]]:
  """Passes a carry through layers, of which every `period`-th is the same but for its parameters.

  Parameters stay under the name of each layer, as checkpoints have them; only while the program
  runs are those of like layers stacked and scanned over. One body is compiled instead of many, and
  on every backend the loop is what makes rematerialisation real: in straight-line code XLA's
  common subexpression elimination may undo it (it does on the CPU).

  Args:
    parent: the compact module whose children the layers are.
    layers: constructors of the layers, called with `name` or `parent`; layers[i] is like
      layers[i % period] and takes and returns the same shapes.
    names: of the layers in the parent.
    call: (layer, i % period, carry) -> (carry, output or None).
    carry: what the first layer gets.
    period: how many different layers follow each other.
    remat: key of REMAT_POLICIES. Layers that do not repeat, such as the two blocks of a stage of
      Swin, keep everything unless it is 'full'.
    rng: random stream that the layers draw from, if they do.

  Returns:
    The last carry, and the output of each layer.
  """
  repeats, rest = divmod(len(layers), period)
  if parent.is_initializing() or repeats < 2 or rest:
    outputs = []
    for i, (layer, name) in enumerate(zip(layers, names)):

      def alone(module, carry, i=i):
        return call(module, i % period, carry)

      if remat == 'full' and not parent.is_initializing():
        alone = nn.remat(alone, policy=REMAT_POLICIES[remat])
      carry, output = alone(layer(name=name), carry)
      outputs.append(output)
    return carry, outputs

  params = parent.variables['params']
  stacked = [
    jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[name] for name in names[j::period]))
    for j in range(period)
  ]
  keys = None
  if rng is not None:
    keys = jax.random.split(parent.make_rng(rng), (repeats, period))

  def body(carry, xs):
    params, keys = xs
    outputs = []
    for j in range(period):

      def one(module, carry, j=j):
        return call(module, j, carry)

      rngs = {} if rng is None else {rng: keys[j]}
      carry, output = nn.apply(one, layers[j](parent=None))({'params': params[j]}, carry, rngs=rngs)
      outputs.append(output)
    return carry, outputs

  body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
  carry, outputs = jax.lax.scan(body, carry, (stacked, keys))
  return carry, [
    jax.tree.map(lambda x, i=i: x[i], outputs[j]) for i in range(repeats) for j in range(period)
  ]

"""Model FLOPs: what the mathematics of a step needs, whatever the program does to compute it."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.interpreters import partial_eval

from aavs_jax import methods
from aavs_jax.methods.method import Method
from aavs_jax.training.state import TrainState
from aavs_jax.types import Batch, Variables

COUNTED = (
  'counted are the multiply-adds, as 2, of matrix products and convolutions, but for depthwise '
  'ones. Forward: both networks, on frames and sound. Step: forward, loss, and the gradient of '
  'what trains in the phase, which passes through frozen layers without a product for their '
  'weights; nothing that is computed again, and sampling by reading points. MFU is against the '
  'peak in bfloat16, whatever the dtype'
)

# TFLOP/s of dense products in bfloat16, by the beginning of a device's kind; of a device as JAX
# sees it, which is half a chip of tpu7x. From the makers' data sheets.
_PEAK_TFLOPS = {
  'TPU v4': 275,
  'TPU v5 lite': 197,
  'TPU v5e': 197,
  'TPU v5': 459,
  'TPU v6': 918,
  'TPU7x': 1153.5,
  'NVIDIA A100': 312,
  'NVIDIA H100 PCIe': 756,
  'NVIDIA H100 NVL': 835,
  'NVIDIA H100': 989,
  'NVIDIA H200': 989,
}


def peak() -> float | None:
  """FLOP/s in bfloat16 that all devices together reach at most; None where it is not known."""
  per_device = peak_of(jax.devices()[0].device_kind)
  return per_device and per_device * jax.device_count()


def peak_of(device_kind: str) -> float | None:
  """FLOP/s in bfloat16 of one device of a kind, as JAX names it; None where it is not known."""
  for kind, tflops in _PEAK_TFLOPS.items():  # longer names first
    if device_kind.startswith(kind):
      return tflops * 1e12
  return None


def speed(flops_per_second: float, peak: float | None) -> dict[str, float]:
  """'tflops_per_second', and 'mfu', its share of the peak, where that is known."""
  result = {'tflops_per_second': flops_per_second / 1e12}
  if peak:
    result['mfu'] = flops_per_second / peak
  return result


def forward_flops(config: ml_collections.ConfigDict, variables: Variables, batch: Batch) -> int:
  """FLOPs of the model on a batch, see COUNTED. Nothing is computed.

  Args:
    config: the model's; the forms in which it computes, Method.forms, make no difference.
    variables: of the model; arrays or their shapes and types, as for the batch.
    batch: see types.Batch.
  """
  return count(_plain(config).apply, variables, batch)


def step_flops(config: ml_collections.ConfigDict, state: TrainState, batch: Batch) -> int:
  """FLOPs of a training step on a batch, likewise: of loss and gradient of what trains in state."""
  method = _plain(config)

  def loss(trained, state, batch, key):
    outputs, _ = method.apply(state.replace(trained=trained).variables, batch, key)
    return method.loss(outputs, batch, method.totals(batch), key)[0]

  key = jax.eval_shape(functools.partial(jax.random.key, 0))
  return count(jax.value_and_grad(loss), state.trained, state, batch, key)


def _plain(config: ml_collections.ConfigDict) -> Method:
  """The method in the form that computes nothing twice and samples with the fewest products."""
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict(methods.of(config).forms)
  return methods.of(config)


def count(function: Callable, *arguments: Any) -> int:
  """FLOPs of the products in a function of arrays, of those that its results need.

  Branches count as the one with the most products, or as the default one where they are forms for
  platforms; loops as often as they run, or once if that depends on data.
  """
  jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
  jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return _count(jaxpr)


def _count(jaxpr: Jaxpr) -> int:
  return sum(_count_one(equation) for equation in jaxpr.eqns)


def _count_one(equation: JaxprEqn) -> int:
  name = equation.primitive.name
  if name == 'dot_general':
    return _product(equation)
  if name == 'conv_general_dilated':
    return _convolution(equation)
  inner = [_count(jaxpr) for jaxpr in _inner(equation)]
  if name == 'scan':
    return equation.params['length'] * sum(inner)
  if name == 'cond':
    by_platform = equation.params.get('branches_platforms')
    return inner[by_platform.index(None)] if by_platform else max(inner)
  if name == 'shard_map':  # what each device does with its part
    return equation.params['mesh'].size * sum(inner)
  return sum(inner)


def _inner(equation: JaxprEqn) -> Iterator[Jaxpr]:
  """Jaxprs that an equation calls: of jit, scan, checkpoint, custom derivatives and so on."""
  for value in equation.params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(item, ClosedJaxpr):
        yield item.jaxpr
      elif isinstance(item, Jaxpr):
        yield item


def _product(equation: JaxprEqn) -> int:
  (contracted, _), _ = equation.params['dimension_numbers']
  left = equation.invars[0].aval.shape
  return 2 * equation.outvars[0].aval.size * math.prod(left[i] for i in contracted)


def _convolution(equation: JaxprEqn) -> int:
  """Multiply-adds that meet no padding and no hole of a dilation, times 2.

  Counted so, both gradients of a convolution take as many as itself.
  """
  params = equation.params
  numbers = params['dimension_numbers']
  left, kernel = (variable.aval.shape for variable in equation.invars)
  out = equation.outvars[0].aval.shape
  result = 2 * out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * kernel[numbers.rhs_spec[1]]
  for axis, stride in enumerate(params['window_strides']):
    result *= taps(
      left[numbers.lhs_spec[2 + axis]],
      kernel[numbers.rhs_spec[2 + axis]],
      out[numbers.out_spec[2 + axis]],
      stride=stride,
      pad=params['padding'][axis][0],
      dilation=params['lhs_dilation'][axis],
      spread=params['rhs_dilation'][axis],
    )
  return result


def taps(
  length: int, size: int, out: int, *, stride: int, pad: int, dilation: int, spread: int
) -> int:
  """How often a convolution along an axis meets what is neither padding nor a hole of a dilation.

  Args:
    length: of the axis, `size` of the kernel, `out` of the result.
    stride: between two results.
    pad: pixels before the first.
    dilation: from one pixel to the next.
    spread: from one number of the kernel to the next.
  """
  starts = np.arange(out) * stride - pad
  at = starts[:, None] + np.arange(size) * spread
  inside = (at >= 0) & (at <= (length - 1) * dilation) & (at % dilation == 0)
  return int(np.count_nonzero(inside))

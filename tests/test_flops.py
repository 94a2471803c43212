"""The count of FLOPs against counts by hand and by formula."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from aavs_jax import config as config_lib
from aavs_jax import methods
from aavs_jax.models.swin import Swin
from aavs_jax.models.vggish import VGGish
from aavs_jax.perf import aot
from aavs_jax.perf.bench import random_batch
from aavs_jax.training import flops
from tests import tiny


def shape(*sizes, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(sizes, dtype)


A, B = shape(5, 7), shape(7, 3)
PRODUCT = 2 * 5 * 7 * 3


def test_products():
  assert flops.count(jnp.matmul, A, B) == PRODUCT
  batched = flops.count(
    lambda x, y: jnp.einsum('bij,kjb->bik', x, y), shape(4, 5, 7), shape(3, 7, 4)
  )
  assert batched == 4 * PRODUCT
  # Both factors' gradients take as much each.
  total = flops.count(jax.grad(lambda a, b: jnp.sum((a @ b) ** 2), (0, 1)), A, B)
  assert total == 3 * PRODUCT


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('padding', ['SAME', 'VALID', [(2, 1), (0, 3)]])
def test_convolutions(stride, padding):
  height, width, size = 7, 6, 3

  def convolve(x, kernel):
    return jax.lax.conv_general_dilated(
      x, kernel, (stride, stride), padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )

  x, kernel = shape(2, height, width, 4), shape(size, size, 4, 5)
  out = jax.eval_shape(convolve, x, kernel)
  pads = padding
  if isinstance(padding, str):
    pads = jax.lax.padtype_to_pads((height, width), (size, size), (stride, stride), padding)
  met = 0
  for y, x0, dy, dx in itertools.product(*map(range, (*out.shape[1:3], size, size))):
    row, column = y * stride + dy - pads[0][0], x0 * stride + dx - pads[1][0]
    met += 0 <= row < height and 0 <= column < width
  forward = 2 * 2 * met * 4 * 5
  assert flops.count(convolve, x, kernel) == forward
  for i in range(2):

    def gradient(x, kernel, g, i=i):
      return jax.vjp(convolve, x, kernel)[1](g)[i]

    assert flops.count(gradient, x, kernel, out) == forward


def test_what_runs_often_counts_as_often():
  def loop(a, xs):
    return jax.lax.scan(lambda carry, x: (jnp.tanh(carry @ x), None), a, xs)[0]

  square, xs = shape(5, 5), shape(6, 5, 5)
  once = 2 * 5 * 5 * 5
  assert flops.count(loop, square, xs) == 6 * once
  assert flops.count(jax.jit(jax.checkpoint(loop)), square, xs) == 6 * once
  assert flops.count(lambda a, xs: jax.lax.map(lambda x: a @ x, xs), square, xs) == 6 * once
  # Forward, and a product for each factor's gradient.
  assert flops.count(jax.grad(lambda a, xs: loop(a, xs).sum(), (0, 1)), square, xs) == 18 * once


def test_what_is_not_needed_does_not_count():
  def wasteful(a, b):
    _ = a @ b
    return a.sum()

  assert flops.count(wasteful, A, B) == 0
  inside = jax.checkpoint(jax.jit(lambda a, b: (a @ b, a.sum())))
  assert flops.count(lambda a, b: inside(a, b)[1], A, B) == 0


def test_of_branches_the_larger_one_counts():
  def either(a, b):
    return jax.lax.cond(a.sum() > 0, lambda: a @ b, lambda: jnp.zeros((5, 3)))

  assert flops.count(either, A, B) == PRODUCT


def test_of_forms_for_platforms_the_default_one_counts():
  def either(a, b):
    zeros = lambda a, b: jnp.zeros((5, 3))  # noqa: E731
    return jax.lax.platform_dependent(a, b, tpu=zeros, default=jnp.matmul) + (
      jax.lax.platform_dependent(a, b, tpu=jnp.matmul, default=zeros)
    )

  assert flops.count(either, A, B) == PRODUCT


def test_products_in_a_loop_of_unknown_length_count_once():
  def loop(a):
    return jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ x, a)

  assert flops.count(loop, shape(5, 5)) == 2 * 5**3


def test_all_devices_count():
  mesh = AbstractMesh((4,), ('data',), axis_types=(AxisType.Auto,))
  spec = PartitionSpec('data')
  specs = spec, PartitionSpec()
  spread = jax.shard_map(lambda a, b: a @ b, mesh=mesh, in_specs=specs, out_specs=spec)
  assert flops.count(spread, shape(20, 7), B) == 4 * PRODUCT


def _block(tokens, dim, window, ratio):
  """Multiply-adds of a Swin block: dense layers, attention's products, adapters."""
  dense = 4 * tokens * dim**2 + 2 * tokens * dim * ratio * dim
  attention = 2 * tokens * window**2 * dim
  adapters = 4 * tokens * dim * (dim // 4)
  return dense, attention, adapters


@pytest.mark.parametrize('remat', ['none', 'dots', 'full'])
def test_swin(remat):
  """Forward, and the gradient of adapters through frozen layers, whatever is computed again."""
  n, image, dim, window, ratio = 2, 32, 8, 2, 4
  model = Swin(dim, (2, 4), (2, 2), window, ratio, 0.0, 'none')
  frames = shape(n, image, image, 3)
  params = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, False), frames)
  params = flatten_dict(params, sep='/')
  adapters = {path: value for path, value in params.items() if 'adapter' in path}
  others = {path: value for path, value in params.items() if 'adapter' not in path}

  def total(adapters, others, frames):
    maps = Swin(dim, (2, 4), (2, 2), window, ratio, 0.0, remat).apply(
      unflatten_dict({**adapters, **others}, sep='/'), frames, False
    )
    return sum(jnp.sum(m**2) for m in maps)

  tokens = n * (image // 4) ** 2
  first, second = _block(tokens, dim, window, ratio), _block(tokens // 4, 2 * dim, window, ratio)
  merging = tokens // 4 * 4 * dim * 2 * dim
  patches = tokens * 4 * 4 * 3 * dim
  forward = patches + 2 * sum(first) + merging + 4 * sum(second)
  assert flops.count(total, adapters, others, frames) == 2 * forward

  def backward(dense, attention, adapters):
    return dense + 2 * attention + 2 * adapters

  # No gradient comes to what is before the first adapter, nor to that adapter's input.
  spared = 4 * tokens * dim**2 + 2 * first[1] + tokens * dim * (dim // 4)
  gradient = 2 * backward(*first) - spared + merging + 4 * backward(*second)
  found = flops.count(jax.value_and_grad(total), adapters, others, frames)
  if remat == 'none':
    assert found == 2 * (forward + gradient)
  else:  # shows that recomputation would be seen
    assert found > 2 * (forward + gradient)


def _vggish(conv_widths, dense_widths, embedding):
  """Multiply-adds of VGGish on one example, padding left out."""
  height, width, channels, total = 96, 64, 1, 0
  for i, features in enumerate(conv_widths):
    total += (3 * height - 2) * (3 * width - 2) * channels * features
    channels = features
    if i in (0, 1, 3, 5):
      height, width = height // 2, width // 2
  sizes = (height * width * channels, *dense_widths, embedding)
  return total + sum(a * b for a, b in itertools.pairwise(sizes))


def test_vggish():
  sizes = dict(conv_widths=(2, 3, 4, 4, 5, 6), dense_widths=(16, 12), embedding=8)
  model = VGGish(**sizes, final_relu=False)
  log_mel = shape(3, 96, 64)
  params = jax.eval_shape(model.init, jax.eval_shape(jax.random.key, 0), log_mel)
  assert flops.count(model.apply, params, log_mel) == 3 * 2 * _vggish(**sizes)


def _forward(config, frames):
  params = jax.eval_shape(methods.of(config).init, jax.eval_shape(jax.random.key, 0))
  batch = {
    name: shape(frames, *value.shape[1:], dtype=value.dtype)
    for name, value in random_batch(config, 1).items()
  }
  return flops.forward_flops(config, params, batch)


def test_the_form_of_the_computation_makes_no_difference():
  config = tiny.get_config('stage2')
  assert config.model.sampling == 'dense'
  once = _forward(config, 1)
  config.model.sampling = 'gather'
  config.model.remat = 'full'
  config.dtype = 'bfloat16'
  assert _forward(config, 3) == 3 * once


@pytest.mark.parametrize(('path', 'visual'), [('stage1', 145e9), ('stage2', 153e9)])
def test_the_published_size(path, visual):
  """About 145 and 153 GFLOP a frame, VGGish aside.

  As published all ten sets have masks at stride 4, here the last one, and the others at the size of
  the level that they are for.
  """
  config = config_lib.load(f'configs/avss_{path}.py')
  sizes = config.vggish.to_dict()
  del sizes['final_relu']
  model = config.model
  masks = 2 * model.num_queries * model.hidden  # a pixel
  visual -= masks * (9 * 96**2 - 3 * (48**2 + 24**2 + 12**2))
  assert 0.99 < (_forward(config, 1) - 2 * _vggish(**sizes)) / visual < 1.015


def test_peaks():
  peaks = {name: chip.tflops for name, chip in aot.CHIPS.items()}
  assert peaks == {'v4': 275, 'v5e': 197, 'v5p': 459, 'v6e': 918, 'tpu7x': 2307}
  assert flops.peak_of('NVIDIA H100 80GB HBM3') == flops.peak_of('NVIDIA H200') == 989e12
  assert flops.peak_of('NVIDIA H100 PCIe') < 989e12
  assert flops.peak_of('cpu') is None
  assert flops.speed(2e12, None) == {'tflops_per_second': 2}
  assert flops.speed(2e12, 8e12) == {'tflops_per_second': 2, 'mfu': 0.25}


def test_the_peak_is_that_of_all_devices(monkeypatch):
  monkeypatch.setattr(flops, 'peak_of', lambda kind: 1e12)
  monkeypatch.setattr(jax, 'device_count', lambda: 4)
  assert flops.peak() == 4e12

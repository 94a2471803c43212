"""Ahead-of-time compilation: what is read from a compiled module, and what modules may do."""

import importlib.util
import math
import re

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aavs_jax import cli
from aavs_jax.configs import avss_stage2
from aavs_jax.devices import mesh
from aavs_jax.input_pipeline.errors import UserError
from aavs_jax.perf import aot, hlo
from aavs_jax.perf.parts import parts
from aavs_jax.training.state import count
from tests import small_maps, tiny

needs_compiler = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None, reason='the TPU compiler is not installed'
)

# Written by hand: a loop of three rounds in which a fusion multiplies a slice of stacked weights,
# and the products are summed over devices; asynchronous collectives; a loop of unknown length.
# ruff: noqa: E501
MODULE = """HloModule step, is_scheduled=true

%slice_fusion (p0: bf16[3,128,256], p1: s32[]) -> bf16[128,256] {
  %p0 = bf16[3,128,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)S(6)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %one = bf16[1,128,256]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,128,256}
  ROOT %flat = bf16[128,256]{1,0:T(8,128)(2,1)} bitcast(%one)
}

%product (q0: bf16[3,128,256], q1: s32[], q2: f32[4,128]) -> f32[4,256] {
  %q0 = bf16[3,128,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  %q1 = s32[]{:T(128)S(6)} parameter(1)
  %q2 = f32[4,128]{1,0:T(4,128)} parameter(2)
  %kernel = bf16[128,256]{1,0:T(8,128)(2,1)} fusion(%q0, %q1), kind=kLoop, calls=%slice_fusion
  ROOT %conv = f32[4,256]{1,0:T(4,128)} convolution(%q2, %kernel), dim_labels=bf_io->bf, metadata={op_name="a (b"}, backend_config={"estimated_cycles":"7"}
}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%body (b: (s32[], f32[4,128], bf16[3,128,256])) -> (s32[], f32[4,128], /*index=2*/bf16[3,128,256]) {
  %b = (s32[]{:T(128)}, f32[4,128]{1,0:T(4,128)}, /*index=2*/bf16[3,128,256]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%b), index=0
  %state = f32[4,128]{1,0:T(4,128)} get-tuple-element(%b), index=1
  %stack = bf16[3,128,256]{2,1,0:T(8,128)(2,1)} get-tuple-element(%b), index=2
  %wide = f32[4,256]{1,0:T(4,128)S(1)} fusion(%stack, %i, %state), kind=kOutput, calls=%product, backend_config={"estimated_cycles":"100"}
  %total = f32[4,256]{1,0:T(4,128)S(1)} all-reduce(%wide), replica_groups=mesh['a'=8] {'a'}, to_apply=%add
  ROOT %next = (s32[]{:T(128)}, f32[4,128]{1,0:T(4,128)}, bf16[3,128,256]{2,1,0:T(8,128)(2,1)}) tuple(%i, %state, %stack)
}

%condition (c: (s32[], f32[4,128], bf16[3,128,256])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  %c = (s32[]{:T(128)}, f32[4,128]{1,0:T(4,128)}, bf16[3,128,256]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %count = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %less = pred[]{:T(512)} compare(%count, %limit), direction=LT
}

%searching (s: (pred[])) -> pred[] {
  %s = (pred[]{:T(512)}) parameter(0)
  %local = pred[]{:T(512)} get-tuple-element(%s), index=0
  ROOT %anywhere = pred[]{:T(512)} all-reduce(%local), replica_groups={}, to_apply=%add
}

%search (t: (pred[])) -> (pred[]) {
  ROOT %t = (pred[]{:T(512)}) parameter(0)
}

%scattering (v: f32[16,3]) -> f32[2,3] {
  %v = f32[16,3]{1,0:T(8,128)} parameter(0)
  ROOT %part = f32[2,3]{1,0:T(2,128)} reduce-scatter(%v), replica_groups={}, dimensions={0}, to_apply=%add
}

ENTRY %main (a: f32[4,128], w: bf16[3,128,256], v: f32[16,3]) -> f32[4,128] {
  %a = f32[4,128]{1,0:T(4,128)} parameter(0)
  %w = bf16[3,128,256]{2,1,0:T(8,128)(2,1)} parameter(1)
  %u = f32[16,3]{1,0:T(8,128)} parameter(2)
  %start = s32[]{:T(128)} constant(0)
  %found = pred[]{:T(512)} constant(false)
  %gather-start = (f32[16,3]{1,0:T(8,128)}, f32[128,3]{1,0:T(8,128)S(1)}) all-gather-start(%u), replica_groups={}, dimensions={0}
  %gathered = f32[128,3]{1,0:T(8,128)S(1)} all-gather-done(%gather-start)
  %scatter-start = ((f32[16,3]{1,0:T(8,128)}), f32[2,3]{1,0:T(2,128)}, s32[]{:T(128)}) async-start(%u), calls=%scattering
  %scattered = f32[2,3]{1,0:T(2,128)} async-done(%scatter-start)
  %slice-start = ((f32[16,3]{1,0:T(8,128)}), f32[8,3]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%u), slice={[0:8], [0:3]}
  %slice-done = f32[8,3]{1,0:T(8,128)S(1)} slice-done(%slice-start)
  %first = (s32[]{:T(128)}, f32[4,128]{1,0:T(4,128)}, bf16[3,128,256]{2,1,0:T(8,128)(2,1)}) tuple(%start, %a, %w)
  %loop = (s32[]{:T(128)}, f32[4,128]{1,0:T(4,128)}, bf16[3,128,256]{2,1,0:T(8,128)(2,1)}) while(%first), condition=%condition, body=%body
  %asked = (pred[]{:T(512)}) tuple(%found)
  %answer = (pred[]{:T(512)}) while(%asked), condition=%searching, body=%search
  ROOT %out = f32[4,128]{1,0:T(4,128)} get-tuple-element(%loop), index=1
}
"""


class TestText:
  def test_loops_count_as_often_as_they_run(self):
    done = hlo.work(MODULE)
    assert done.flops == 3 * 2 * 4 * 128 * 256
    assert done.collectives == {
      'all-reduce': (3 + 1, 3 * 4 * 4 * 256 + 1),
      'all-gather': (1, 4 * 128 * 3),  # the gathered side
      'reduce-scatter': (1, 4 * 16 * 3),  # the side before it
    }
    assert done.open_loops == 1
    assert done.cycles == 3 * 100  # of a fusion as a whole

  def test_the_parts_add_up_to_the_whole(self):
    text = MODULE.replace('"a (b"', '"jit(f)/transpose(jvp(AAVS))/layer12/mlp/fc1/dot_general"')
    done = hlo.work(text)
    assert done.parts['AAVS/layer*/mlp', 'backward'].flops == done.flops
    assert done.parts['', 'forward'].cycles == 300
    for name in ('flops', 'bytes', 'cycles'):
      assert sum(getattr(part, name) for part in done.parts.values()) == getattr(done, name)
    # The all-reduces of both loops have no estimate, nor has what is copied.
    assert done.parts['', 'forward'].silent > 0

  @pytest.mark.parametrize(
    'name, part',
    [
      ('jit(train_step)/jvp(AAVS)/decoder/layer3/self/key/add', ('AAVS/decoder/layer*', 'forward')),
      (
        'jit(train_step)/jvp()/loss/while/body/closed_call/matching/vmap(jit(_uniform))/slice',
        ('loss/matching', 'forward'),
      ),
      (
        'jit(s)/transpose(jvp(AAVS))/checkpoint/rematted_computation/backbone/stage0_block1/mul;x/y',
        ('AAVS/backbone/stage*_block*', 'again'),
      ),
      ('jit(train_step)/optimizer/add', ('optimizer', 'forward')),
      ('add', ('', 'forward')),
    ],
  )
  def test_names_tell_parts(self, name, part):
    assert hlo.part_of(name) == part

  def test_a_breakdown_has_small_parts_in_one_row(self):
    def part(name, cycles, flops):
      rest = {'bytes': 0, 'silent': 0}
      return {'part': name, 'pass': 'forward', 'cycles': cycles, 'flops': flops, **rest}

    parts = [part('big', 9.99e6, 1e9), part('a', 6e3, 2e9), part('b', 4e3, 4e9)]
    rows = [line.split() for line in aot.format_breakdown(parts).splitlines()[1:]]
    assert rows == [
      ['big', 'forward', '9.99', '99.9%', '1.0', '0.00'],
      ['2', 'more', '0.01', '0.1%', '6.0', '0.00'],
      ['all', 'of', 'it', '10.00', '100.0%', '7.0', '0.00'],
    ]

  def test_traffic_is_that_of_hbm_as_laid_out(self):
    # Each round reads one slice of the stack and the state; the product stays on the chip, S(1).
    loop = 3 * (2 * 128 * 256 + 4 * 4 * 128)
    # Rows of 3 are padded to 128; the gathered array and the copied half of v are on the chip.
    around = 4 * (16 * 128) + 4 * (16 * 128) + 4 * (2 * 128) + 4 * (8 * 128)
    assert hlo.work(MODULE).bytes == loop + around

  @pytest.mark.parametrize(
    ('line', 'products'),
    [
      # A batch of 2 products of 8x16 and 16x32, as TPUs write it: holes between the batch items.
      (
        'window={size=2 stride=1 lhs_dilate=2}, dim_labels=0bf_0io->0bf'
        '|f32[2,8,16]|f32[2,16,32]|f32[2,8,32]',
        2 * 8 * 16 * 32,
      ),
      # A 3x3 convolution of 5x5 pixels with a border of zeros: 13 of 15 taps meet pixels each way.
      (
        'window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f'
        '|f32[1,5,5,4]|f32[3,3,4,6]|f32[1,5,5,6]',
        13 * 13 * 4 * 6,
      ),
      # Patches of 4x4.
      (
        'window={size=4x4 stride=4x4}, dim_labels=b01f_01io->b01f'
        '|f32[2,8,8,3]|f32[4,4,3,7]|f32[2,2,2,7]',
        2 * 2 * 2 * 16 * 3 * 7,
      ),
    ],
  )
  def test_products_are_counted_without_holes(self, line, products):
    attributes, left, right, out = line.split('|')
    text = (
      f'ENTRY %main (a: {left}, b: {right}) -> {out} {{\n  %a = {left}{{0}} parameter(0)\n'
      f'  %b = {right}{{0}} parameter(1)\n  ROOT %c = {out}{{0}} convolution(%a, %b), '
      f'{attributes}\n}}\n'
    )
    assert hlo.work(text).flops == 2 * products


class TestTopology:
  @pytest.mark.parametrize(
    ('name', 'sides'),
    [
      ('v4-8', 'v4:2x2x1'),
      ('v4-16', 'v4:2x2x2'),
      ('v5e-1', 'v5e:1x1'),
      ('v5e-4', 'v5e:2x2'),
      ('v5e-8', 'v5e:2x4'),
      ('v5e-16', 'v5e:4x4'),
      ('v5e-256', 'v5e:16x16'),
      ('v5p-64', 'v5p:2x4x4'),
      ('v5p-128', 'v5p:4x4x4'),
      ('v6e-32', 'v6e:4x8'),
      ('v6e-256', 'v6e:16x16'),
      ('tpu7x-16', 'tpu7x:2x2x2'),
      ('v5p:4x4x8', 'v5p:4x4x8'),
    ],
  )
  def test_sizes_have_the_sides_of_cloud_tpu(self, name, sides):
    where = aot.parse_topology(name)
    assert str(where) == sides
    size = name.split('-')[1] if '-' in name else 256
    per_chip = 1 if where.generation in ('v5e', 'v6e') else 2
    assert where.chips * per_chip == int(size)

  @pytest.mark.parametrize(
    ('arguments', 'words'),
    [
      (('--topology', 'v9:2x2'), 'v9:2x2 is unknown: use one of v4, v5e'),
      (('--topology', 'h100'), 'h100 is unknown'),
      (('--topology', 'v5e:2x2x2'), 'v5e has 2 sides, such as v5e:4x4'),
      (('--topology', 'v4-9'), 'v4-9 is no power of two'),
      (('--topology', 'v5e-4', '--batch-per-chip', '0'), '--batch-per-chip is 0'),
      (('--topology', 'tpu7x-16', '--batch-per-chip', '3'), 'use a multiple of 2'),
    ],
  )
  def test_what_cannot_be_is_one_sentence(self, arguments, words, capsys, monkeypatch):
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')  # the command sets both
    monkeypatch.setenv('JAX_ENABLE_COMPILATION_CACHE', 'false')
    assert cli.main(['aot', '--config', 'tests/tiny.py:stage2', *arguments]) == 2
    told = capsys.readouterr()
    lines = told.err.strip().splitlines()
    assert len(lines) == 1 and words in lines[0]
    assert ('compiling' in told.out) == ('--batch-per-chip' in arguments)

  def test_a_missing_compiler_is_named(self, monkeypatch):
    monkeypatch.setattr(aot.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(aot.UserError, match=r'pip install -e .\.\[aot\]'):
      aot.slice_devices(aot.parse_topology('v5e-4'))


@given(
  fixed=st.floats(0, 2),
  growth=st.floats(0.01, 0.5),
  bend=st.floats(0, 0.01),
  told=st.booleans(),
  first=st.integers(1, 40),
  step=st.sampled_from([1, 2, 5]),
)
def test_the_search_fills_the_memory(fixed, growth, bend, told, first, step):
  """Of 1 byte: nine tenths are taken or no more fits, whatever the compiler says of failures."""
  tried = []

  def bytes_of(count):
    return fixed + growth * count + bend * count**2

  def need(count):
    assert count > 0 and count % step == 0 and count not in tried
    tried.append(count)
    return bytes_of(count) if told or bytes_of(count) <= 1 else math.inf

  found = aot.largest(first * step, step, need, 1.0)
  assert found == 0 or bytes_of(found) <= 1
  assert (found and bytes_of(found) >= 0.9) or bytes_of(found + step) > 1
  assert len(tried) <= 15


@needs_compiler
def test_what_does_not_fit_says_how_much_it_needs():
  slice_of_one = mesh.make_mesh(1, aot.slice_devices(aot.parse_topology('v5e:1x1')))
  numbers = jax.ShapeDtypeStruct((5, 2**30), np.float32, sharding=mesh.replicated(slice_of_one))
  with pytest.raises(aot.DoesNotFit, match=r'15\.75G') as failed:
    aot._compile(jax.jit(lambda x: x.cumsum(1)).lower(numbers))
  assert failed.value.needed >= 2 * 5 * 4 * 2**30  # they and their sums


def test_the_search_takes_few_compilations():
  tried = []

  def need(count):  # 1.2 GiB and 0.83 a frame, as stage 2 takes on v5e
    tried.append(count)
    return 1.2 + 0.83 * count

  assert aot.largest(4, 1, need, 15.75) == 17 and len(tried) <= 3


def test_the_estimate_is_that_of_the_figures_it_states():
  done = hlo.Work(197e9, 819e6, 0.0, {'all-reduce': hlo.Collective(10, 200_000_000)}, 0, {})
  # A ring of 16 chips each way has all four links of 50 GB/s; a sum passes twice.
  pod = aot.roofline(done, aot.parse_topology('v5e:16x16'))
  assert (pod['products'], pod['hbm']) == (1e-3, 1e-3)
  np.testing.assert_allclose(pod['interconnect'], 2 * (200e6 / 200e9 + 10 * 16e-6))
  np.testing.assert_allclose(pod['step'], 1e-3 + pod['interconnect'])
  # 4x4 chips are no ring: half the links.
  part = aot.roofline(done, aot.parse_topology('v5e:4x4'))
  np.testing.assert_allclose(part['interconnect'], 2 * (200e6 / 100e9 + 10 * 6e-6))
  # Two devices share a chip.
  device = aot.roofline(done, aot.parse_topology('tpu7x:4x4x4'))
  np.testing.assert_allclose(device['products'], 197e9 / (2307e12 / 2))
  np.testing.assert_allclose(device['interconnect'], 2 * (200e6 / 300e9 + 10 * 6e-6))
  alone = aot.roofline(done._replace(collectives={}), aot.parse_topology('v5e:1x1'))
  assert alone['interconnect'] == 0 and alone['scaling'] == 1


def _config(**overrides):
  """The tiny model, of which the published parts train."""
  config = tiny.get_config('stage2')
  config.train.trainable = avss_stage2.get_config().train.trainable
  for key, value in overrides.items():
    config[key] = value
  return config


@pytest.fixture(scope='module')
def devices():
  return aot.slice_devices(aot.parse_topology('v5e:2x4'))


def _assert_all_on_the_device(text):
  """No step waits for the host, and every array has one size."""
  assert not re.search(r' (infeed|outfeed|send|recv)\(', text)
  assert not re.search(r'is_host_transfer=true|custom_call_target="\w*(callback|Host)', text)
  assert not re.search(r'\[[\d,]*<=|dimension-size\(|PadToStatic|SliceToDynamic', text)


@needs_compiler
@pytest.mark.parametrize(
  'slice_name',
  [
    'v5e:2x4',
    # These have SparseCores, whose instructions another libtpu writes as jaxlib cannot read.
    pytest.param('v5p:2x2x1', marks=pytest.mark.slow),
    pytest.param('tpu7x:2x2x1', marks=pytest.mark.slow),
  ],
)
def test_data_parallel_training_sums_gradients_and_nothing_else(slice_name):
  devices = aot.slice_devices(aot.parse_topology(slice_name))
  config = _config()
  frames = 2 * len(devices)
  compiled, state = aot.compile_train(config, mesh.make_mesh(1, devices), frames)
  text = compiled.as_text()
  _assert_all_on_the_device(text)
  done = hlo.work(text)
  trained = count(state.trained)
  assert set(done.collectives) == {'all-reduce'}
  # Beside the gradients: three sums for each clip of the batch, of which there are at most as many
  # as frames; terms of the loss in two prediction sets, and the norms of the six query positions.
  scalars = done.collectives['all-reduce'].bytes - 4 * trained
  assert 4 * 3 * frames <= scalars <= 4 * (3 * frames + 30)

  assert aot.held(state.trained) == 4 * trained
  assert aot.held(state.frozen) == 4 * count(state.frozen)
  assert 0 <= aot.held(state.opt_state) - 2 * 4 * trained <= 4 * 4
  sizes = aot.memory(compiled)
  assert sizes['arguments'] >= aot.held((state.trained, state.frozen, state.opt_state))
  # All but the metrics goes where the old state was.
  assert sizes['results'] < 10_000
  assert sizes['total'] < 15.75 * 2**30


@needs_compiler
def test_devices_predict_alone(devices):
  compiled = aot.compile_predict(_config(), mesh.make_mesh(1, devices), 2 * len(devices))
  text = compiled.as_text()
  _assert_all_on_the_device(text)
  done = hlo.work(text)
  assert not done.collectives and not done.open_loops and done.flops > 0


@needs_compiler
def test_one_kind_of_module_compiles_alone():
  lines = []
  found = parts(_config(), 'v5e:1x1', 'Adapter', 2, progress=lines.append)
  widths = [int(re.search(r'(\d+)\]$', row['inputs'])[1]) for row in found]
  assert len(lines) == len(found) == len({row['inputs'] for row in found}) > 2
  for row, width in zip(found, widths):
    shape = [int(n) for n in re.findall(r'\d+(?=[,\]])', row['inputs'])]
    # Down to a quarter of the width and up again; the gradient of the input takes as much.
    flops = 2 * math.prod(shape) * 2 * (width // 4)
    assert row['forward']['flops'] == flops and row['both']['flops'] == 2 * flops
    assert 0 < row['forward']['cycles'] < row['both']['cycles']
  assert lines[0].startswith('Adapter(residual=True, dtype=float32) of float32[2, ')
  with pytest.raises(UserError, match=r'--part Nothing: aavs has none, only .*MaskDecoder'):
    parts(_config(), 'v5e:1x1', 'Nothing')
  with pytest.raises(UserError, match='8 chips: --part is for one'):
    parts(_config(), 'v5e:2x4', 'Adapter')


@needs_compiler
def test_a_part_with_running_statistics_compiles_alone_on_whole_clips():
  config = small_maps.get_config('tpavi_stage2')
  found = parts(config, 'v5e:1x1', 'BatchNorm')
  assert all(row['inputs'].startswith('float32[5, ') for row in found)
  with pytest.raises(UserError, match='--batch-per-chip is 3: use a multiple of 5'):
    parts(config, 'v5e:1x1', 'BatchNorm', 3)


@needs_compiler
@pytest.mark.slow
def test_spread_parameters_are_gathered(devices, monkeypatch):
  monkeypatch.setattr(mesh, 'FSDP_MIN_SIZE', 1)  # those of the tiny model are all below it
  config = _config()
  compiled, state = aot.compile_train(config, mesh.make_mesh(2, devices), 2 * len(devices))
  assert hlo.work(compiled.as_text()).collectives['all-gather'].count > 0
  spread = [leaf for leaf in state.frozen.values() if math.prod(leaf.shape) > 64]
  whole = sum(4 * math.prod(leaf.shape) for leaf in spread)
  assert whole / 2 <= aot.held(spread) < 0.6 * whole


@needs_compiler
@pytest.mark.parametrize('name', ['v6e:16x16', 'v4:2x2x2', 'v5p:2x4x4', 'tpu7x:2x2x2'])
def test_every_slice_divides_into_groups(name):
  where = aot.parse_topology(name)
  try:
    devices = aot.slice_devices(where)
  except UserError as error:
    if 'Invalid TPU external name' not in str(error):
      raise
    pytest.skip(f'this release of libtpu knows no {name}')
  found = mesh.make_mesh(2, devices)
  assert found.devices.shape == (where.devices // 2, 2)
  assert len({device.id for device in found.devices.flat}) == where.devices


@needs_compiler
@pytest.mark.slow
def test_the_published_size_fits_a_chip():
  config = avss_stage2.get_config()
  config.dtype = 'bfloat16'
  config.model.sampling = 'dense'
  result = aot.aot(config, 'v5e-16', 1)
  assert result['trained_parameters'] == 7_748_232
  for step in ('train', 'predict'):
    assert result[step]['memory']['total'] < result['hbm_bytes_per_device']
  assert set(result['train']['collectives']) == {'all-reduce'}
  assert not result['predict']['collectives']
  # The forward pass takes 153 GFLOP a frame, and 45 for maps of pixels in place of sampled points.
  assert 180e9 < result['predict']['flops'] < 220e9
  # Training adds the gradients through the backbone, and points of the masks of one round of targets.
  assert 550e9 < result['train']['flops'] < 650e9
  # Maps of pixels that leave the chip would be 27.
  assert result['train']['hbm_bytes'] < 15e9

"""What a program compiled for TPUs does, read from its text: products, HBM traffic, collectives.

XLA's own cost analysis counts the body of a loop once, and the layers here run in loops. So this
walks the compiled module and counts every instruction as often as its loops run.
"""

import collections
import math
import re
from typing import NamedTuple

from aavs_jax.training.flops import taps

COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
# Instructions that move nothing: names for parts of what others made, and ends of what has started.
_FREE = frozenset((
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'partition-id',
  'while', 'call', 'conditional', 'async-start', 'async-update', 'async-done', 'copy-done',
  'optimization-barrier', 'add-dependency', 'iota',
))  # fmt: skip
# Their tuples hold the operands, then the results, then scalars to synchronise with.
_WITH_OPERANDS = ('all-gather-start', 'collective-permute-start', 'slice-start')


class Collective(NamedTuple):
  """Collectives of one kind: how often one runs, and the logical bytes that they handle.

  Of each the larger side counts, as one device holds it: the gathered array of an all-gather, the
  array before a reduce-scatter.
  """

  count: int
  bytes: int


class Part(NamedTuple):
  """What instructions of one part of the model do; see `Work`."""

  cycles: float = 0.0
  flops: float = 0.0
  bytes: float = 0.0
  silent: int = 0  # instructions that move something and of which the compiler tells no cycles


class Work(NamedTuple):
  """What one device does in one run of a module."""

  flops: float  # of matrix products and convolutions, a multiply-add as 2
  bytes: float  # read from and written to HBM, with the padding of its layouts
  cycles: float  # that the compiler expects it to take, by its own model of the chip
  collectives: dict[str, Collective]
  open_loops: int  # loops whose length depends on data; their bodies count once
  parts: dict[tuple[str, str], Part]  # by name and pass, see part_of; they add up to the whole


class _Array(NamedTuple):
  dims: tuple[int, ...]
  logical: int  # bytes
  stored: int  # bytes with the padding of its tiles
  in_hbm: bool


class _Instruction(NamedTuple):
  name: str
  arrays: tuple[_Array, ...]  # one, or those of a tuple
  op: str
  operands: tuple[str, ...]
  rest: str  # what stands between the parentheses, and the attributes after them

  def called(self, attribute: str) -> str:
    return re.search(rf'\b{attribute}=%([^\s,}}]+)', self.rest)[1]


class _Computation(NamedTuple):
  instructions: dict[str, _Instruction]
  root: _Instruction
  parameters: dict[int, str]
  users: dict[str, list[_Instruction]]


def work(text: str) -> Work:
  """Reads the text of a compiled module (`compiled.as_text()`)."""
  computations, entry = _parse(text)
  total = {'flops': 0.0, 'bytes': 0.0, 'cycles': 0.0, 'open_loops': 0}
  collectives = dict.fromkeys(COLLECTIVES, Collective(0, 0))
  parts = collections.defaultdict(Part)

  def add(instruction: _Instruction, **more: float) -> None:
    for name, value in more.items():
      if name in total:
        total[name] += value
    found = re.search(r'op_name="([^"]*)"', instruction.rest)
    part = part_of(found[1] if found else '')
    parts[part] = Part(**{n: v + more.get(n, 0) for n, v in parts[part]._asdict().items()})

  def walk(name: str, times: int, fused: bool) -> None:
    computation = computations[name]
    for instruction in computation.instructions.values():
      op = instruction.op
      operands = [computation.instructions[o] for o in instruction.operands]
      kind = op.removesuffix('-start')
      if kind in COLLECTIVES:
        count, size = collectives[kind]
        size += times * _handled(instruction, operands)
        collectives[kind] = Collective(count + times, size)
      elif op == 'convolution':
        add(instruction, flops=times * _convolution_flops(instruction, *operands))
      if not fused:
        moved = times * _moved(instruction, operands, computations)
        estimate = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
        cycles = times * int(estimate[1]) if estimate else 0
        add(instruction, bytes=moved, cycles=cycles, silent=bool(moved and not estimate))
      if op == 'while':
        body, condition = instruction.called('body'), instruction.called('condition')
        length = _trip_count(computations[condition])
        total['open_loops'] += length is None
        for part in (body, condition):
          walk(part, times * (length or 1), fused)
      elif op == 'fusion':
        walk(instruction.called('calls'), times, True)
      elif op in ('call', 'async-start'):
        walk(instruction.called('to_apply' if op == 'call' else 'calls'), times, fused)
      elif op == 'conditional':
        branches = re.search(r'branch_computations=\{([^}]*)\}', instruction.rest)[1]
        for branch in re.findall(r'%([^\s,]+)', branches):
          walk(branch, times, fused)

  walk(entry, 1, False)
  found = {kind: value for kind, value in collectives.items() if value.count}
  return Work(collectives=found, parts=dict(parts), **total)


def part_of(op_name: str) -> tuple[str, str]:
  """To which part of a program an instruction belongs, by the name that it was traced under.

  Returns:
    Its module or jax.named_scope, three levels of it, numbers as '*', '' if it has none; and
    'forward', 'backward' or 'again', what the backward pass computes a second time.
  """
  again = 'rematted_computation' in op_name
  direction = 'again' if again else 'backward' if 'transpose(' in op_name else 'forward'
  names = [level for level in _within(op_name) if level not in _NO_SCOPE]
  return re.sub(r'\d+', '*', '/'.join(names[:3])), direction


# What loops, branches and recomputation add to a name.
_NO_SCOPE = frozenset((
  '', 'while', 'body', 'cond', 'body_pred', 'branch_0_fun', 'branch_1_fun', 'closed_call',
  'checkpoint', 'rematted_computation', 'shard_map',
))  # fmt: skip


def _within(op_name: str) -> list[str]:
  """Levels of a name without the operation at its end: jit(f)/jvp(A)/b/add is A, b."""
  levels = op_name.split(';')[0].split('/')[:-1]
  inner = (re.sub(r'^(?:(?:transpose|jvp|vmap)\()*(.*?)\)*$', r'\1', level) for level in levels)
  return [level for level in inner if '(' not in level and '<' not in level]


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
  computations, entry = {}, None
  for header, body in re.findall(r'^((?:ENTRY )?%\S+) [^\n]*\{\n(.*?)^\}', text, re.M | re.S):
    name = header.removeprefix('ENTRY ').removeprefix('%')
    if header.startswith('ENTRY'):
      entry = name
    instructions, parameters, users, root = {}, {}, {}, None
    for line in body.splitlines():
      instruction = _read_line(line)
      instructions[instruction.name] = instruction
      if instruction.op == 'parameter':
        parameters[int(instruction.rest.split(')')[0])] = instruction.name
      for operand in instruction.operands:
        users.setdefault(operand, []).append(instruction)
      if line.lstrip().startswith('ROOT '):
        root = instruction
    computations[name] = _Computation(instructions, root, parameters, users)
  return computations, entry


def _read_line(line: str) -> _Instruction:
  line = re.sub(r'/\*.*?\*/', '', line)
  name, right = line.split(' = ', 1)
  end = _closing(right, 0) + 1 if right.startswith('(') else right.index(' ')
  op, rest = right[end + 1 :].split('(', 1)
  operands = rest[: _closing('(' + rest, 0) - 1]
  return _Instruction(
    name.split('%')[-1],
    tuple(_array(*leaf) for leaf in _LEAF.findall(right[:end])),
    op,
    tuple(re.findall(r'%([^\s,()]+)', operands)) if '%' in operands else (),
    rest,
  )


def _closing(text: str, start: int) -> int:
  """Where the parenthesis that opens at start closes."""
  depth = 0
  for match in re.compile(r'[()]').finditer(text, start):
    depth += 1 if match[0] == '(' else -1
    if not depth:
      return match.start()
  raise ValueError(f'unbalanced parentheses in {text[start : start + 80]!r}')


# Element type, dimensions, layout: bf16[8,3,128]{2,0,1:T(8,128)(2,1)S(1)}
_LEAF = re.compile(r'\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?')


def _array(kind: str, dims: str, layout: str) -> _Array:
  sizes = tuple(int(n) for n in dims.split(',') if n)
  digits = re.search(r'\d+', kind)
  width = 1 if kind == 'pred' else int(digits[0]) / 8 if digits else 0
  order, _, rest = layout.partition(':')
  minor_first = [sizes[int(i)] for i in order.split(',') if i]
  tile = re.search(r'T\(([\d,]+)\)', rest)
  if tile:
    for i, length in enumerate(reversed(tile[1].split(','))):
      if i < len(minor_first):
        minor_first[i] = -(-minor_first[i] // int(length)) * int(length)
  logical = math.ceil(math.prod(sizes) * width)
  stored = math.ceil(math.prod(minor_first) * width) if minor_first else logical
  # S(1) and up are the memories on the chip itself; scalars are not worth counting.
  return _Array(sizes, logical, stored, bool(sizes) and 'S(' not in rest)


def _trip_count(condition: _Computation) -> int | None:
  """Rounds of a loop that counts up from 0 by 1, as those of jax.lax.scan do; None of others."""
  root = condition.root
  if root.op != 'compare' or 'direction=LT' not in root.rest:
    return None
  limit = condition.instructions[root.operands[1]]
  return int(limit.rest.split(')')[0]) if limit.op == 'constant' else None


def _handled(instruction: _Instruction, operands: list[_Instruction]) -> int:
  before = [a.logical for operand in operands for a in operand.arrays]
  after = [a.logical for a in instruction.arrays]
  if instruction.op in _WITH_OPERANDS:
    after = after[len(before) :]
  return max(sum(before), sum(after))


def _convolution_flops(instruction: _Instruction, left: _Instruction, right: _Instruction) -> float:
  """Multiply-adds that meet no padding and no hole of a dilation, times 2.

  On TPUs every matrix product is a convolution, batch dimensions being spatial ones whose window is
  dilated so that each element meets its own partner alone.
  """
  (lhs,), (rhs,), out = left.arrays, right.arrays, instruction.arrays[0]
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', instruction.rest)
  left_labels, right_labels, out_labels = labels.groups()
  window = dict(re.findall(r'(\w+)=([\dx_-]+)', _window(instruction.rest)))
  products = 2.0 * out.dims[out_labels.index('b')] * out.dims[out_labels.index('f')]
  products *= rhs.dims[right_labels.index('i')]
  spatial = sum(label.isdigit() for label in left_labels)

  def field(name, default):
    return window[name].split('x') if name in window else [default] * spatial

  for i in range(spatial):
    products *= taps(
      lhs.dims[left_labels.index(str(i))],
      int(field('size', '1')[i]),
      out.dims[out_labels.index(str(i))],
      stride=int(field('stride', '1')[i]),
      pad=int(field('pad', '0_0')[i].split('_')[0]),
      dilation=int(field('lhs_dilate', '1')[i]),
      spread=int(field('rhs_dilate', '1')[i]),
    )
  return products


def _window(rest: str) -> str:
  found = re.search(r'window=\{([^}]*)\}', rest)
  return found[1] if found else ''


def _moved(
  instruction: _Instruction,
  operands: list[_Instruction],
  computations: dict[str, _Computation],
) -> int:
  """Bytes that an instruction outside fusions reads from HBM and writes to it."""
  if instruction.op in _FREE or instruction.op.endswith('-done'):
    return 0
  if 'custom_call_target="AllocateBuffer"' in instruction.rest:
    return 0
  if instruction.op == 'copy-start':  # a tuple of copy and original
    return sum(a.stored for a in instruction.arrays if a.in_hbm)
  moved = _written(instruction, operands, computations)
  for i, operand in enumerate(operands):
    whole = sum(a.stored for a in operand.arrays if a.in_hbm)
    moved += min(whole, _read(instruction, i, computations)) if whole else 0
  return moved


def _stored(instruction: _Instruction) -> int:
  return sum(a.stored for a in instruction.arrays)


def _read(instruction: _Instruction, i: int, computations: dict[str, _Computation]) -> float:
  """Bytes of operand i that an instruction reads at most: infinite, if it may read all of it."""
  op = instruction.op
  if op in ('dynamic-slice', 'slice', 'gather') and i == 0:
    return _stored(instruction)
  if op == 'slice-start':
    return instruction.arrays[1].stored
  if op in ('dynamic-update-slice', 'scatter') and i == 0:
    return 0  # updated in place
  if op != 'fusion':
    return math.inf
  inner = computations[instruction.called('calls')]
  return _read_of(inner, inner.parameters[i], computations)


def _read_of(inner: _Computation, name: str, computations: dict[str, _Computation]) -> float:
  total = 0
  for user in inner.users.get(name, ()):
    if user.op == 'bitcast':
      total += _read_of(inner, user.name, computations)
    elif user.op != 'tuple':  # a tuple hands on what is updated in place
      total += sum(_read(user, i, computations) for i, o in enumerate(user.operands) if o == name)
  return total


def _written(
  instruction: _Instruction,
  operands: list[_Instruction],
  computations: dict[str, _Computation],
) -> int:
  """Bytes written to HBM; of an array updated in place, the update alone."""
  if instruction.op == 'dynamic-update-slice':
    return _stored(operands[1]) if instruction.arrays[0].in_hbm else 0
  if instruction.op == 'scatter':
    return _stored(operands[2]) if instruction.arrays[0].in_hbm else 0
  arrays = instruction.arrays
  if instruction.op in _WITH_OPERANDS:
    arrays = arrays[sum(len(operand.arrays) for operand in operands) :]
  if instruction.op != 'fusion':
    return sum(a.stored for a in arrays if a.in_hbm)
  inner = computations[instruction.called('calls')]
  made = inner.root.operands if inner.root.op == 'tuple' else (inner.root.name,)
  total = 0
  for array, name in zip(arrays, made):
    source = inner.instructions[name]
    while source.op == 'bitcast':
      source = inner.instructions[source.operands[0]]
    update = {'dynamic-update-slice': 1, 'scatter': 2}.get(source.op)
    size = array.stored
    if update is not None:
      size = min(size, _stored(inner.instructions[source.operands[update]]))
    total += size if array.in_hbm else 0
  return total

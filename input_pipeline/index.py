"""The clips of a data set, whatever its layout."""

import collections
import os
from collections.abc import Sequence

from . import prepared
from .avsbench import SemanticClip
from .avsbench_object import ObjectClip
from .clips import SPLITS, Clip, tables_in
from .errors import UserError

KINDS: tuple[type[Clip], ...] = (SemanticClip, ObjectClip)  # another data set is added here


def read_index(
  root: str | os.PathLike, split: str | None = None, subsets: Sequence[str] | None = None
) -> list[Clip]:
  """The clips of a data set, in the order of the tables that list them.

  Which data set it is shows in the tables that it holds, see clips.DataSet.tables. Every row is
  checked, also those of other splits and subsets. Whether a clip's files exist shows when
  they are read.

  A folder that `aavs prepare` wrote gives the same clips (prepared.PreparedClip) in the same order.

  Args:
    root: folder of the data set.
    split: train, val or test; None for all three.
    subsets: names of those to read, of the data set's (clips.DataSet.subsets); None for all.

  Raises:
    UserError: there is no table, or those of two data sets; a table is not UTF-8 or not CSV, lacks
      a column, holds an unknown subset or split, an unsafe uid or the same uid twice in a subset;
      or no clip is left; or `split` or `subsets` is unknown; or `root` is in a bucket, or has
      damaged shards.
  """
  root = os.fspath(root)
  if split is not None and split not in SPLITS:
    raise UserError(f'split is {split!r}: choose one of {", ".join(SPLITS)}')
  if '://' in root:
    raise UserError(
      f'{root} is in a bucket, where neither images nor shards can be read piece by piece: mount '
      'the bucket or copy the folder, and name that'
    )
  if prepared.is_prepared(root):
    tables, found = [os.path.join(root, prepared.MANIFEST)], prepared.read_index(root, KINDS)
  else:
    kind = _kind_of(root)
    tables = kind.find_tables(root)
    found = kind.read(tables)

  if not found:
    raise UserError(f'{" and ".join(tables)}: no clip is listed there: complete the file')
  known = found[0].data_set.subsets
  unknown = [subset for subset in subsets or () if subset not in known]
  if unknown:
    raise UserError(f'{root} has no subset {unknown[0]!r}: choose from {", ".join(known)}')
  wanted = list(known) if subsets is None else subsets
  chosen = [clip for clip in found if clip.subset in wanted and split in (None, clip.split)]
  if not chosen:
    counts = collections.Counter(f'{clip.subset} {clip.split}' for clip in found)
    there = ', '.join(f'{count} of {name}' for name, count in counts.items())
    raise UserError(
      f'{" and ".join(tables)}: no clip for split {split or "any"} of {", ".join(wanted)} (found: '
      f'{there}): choose another split or subset, or complete the file'
    )
  return chosen


def _kind_of(root: str) -> type[Clip]:
  named = [kind for kind in KINDS if tables_in(root, kind.data_set)]
  if len(named) > 1:
    tables = (f'{kind.data_set.tables[0]} of {kind.data_set.name}' for kind in named)
    raise UserError(
      f'{root} holds {" and ".join(tables)}: keep each data set in a folder of its own'
    )
  found = named or [kind for kind in KINDS if kind.find_tables(root)]
  if not found:
    names = ' or '.join(name for kind in KINDS for name in kind.data_set.tables)
    raise UserError(f'{root} is no folder of a data set: name one that holds {names}')
  return found[0]


def require_classes(clips: Sequence[Clip]) -> None:
  """Raises UserError if the labels of a clip do not tell classes, as the semantic task needs."""
  for clip in clips:
    if clip.data_set.label_kind != 'semantic':
      raise UserError(
        f'{clip.table}: the labels of {clip.data_set.name} tell what sounds, but not as what: use '
        "it for a config with task 'binary', or give a data set whose labels are classes"
      )

"""The `aavs` command; every sub-command is a thin wrapper of a function of the library."""

import argparse
import dataclasses
import errno
import importlib.util
import io
import os
import re
import select
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from absl import logging as absl_logging
from etils import epath

from aavs_jax import configs
from aavs_jax.input_pipeline.errors import PASSING_CODES, UserError, is_refused, may_pass
from aavs_jax.input_pipeline.host import keep_freed
from aavs_jax.signals import Ending

# Before numpy is imported. Its products are small here, and of threads that read side by side:
# threads of their own, which wait in loops, took a third of the speed of reading raw files.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')

_CONFIGS = Path(configs.__path__[0])
# --config.KEY=VALUE
_TAKE_OVERRIDES = (
  'start', 'train', 'cross-fit', 'stepping-stones', 'bench', 'aot', 'quickstart',
)  # fmt: skip
_CONFIG_FILE = 'config file; override with --config.KEY=VALUE'


def _compose_arguments(sub) -> None:
  sub.add_argument('root', help='folder to write')
  sub.add_argument('--train', default='240,240,120', help='clips of v1s,v1m,v2 (%(default)s)')
  sub.add_argument('--val', default='12,20,8', help='(%(default)s)')
  sub.add_argument('--test', default='30,60,30', help='(%(default)s)')
  sub.add_argument('--classes', type=int, default=8, help='2 to 70 (%(default)s)')
  sub.add_argument('--size', default='160x120', help='of the frames (%(default)s)')
  sub.add_argument('--seed', type=int, default=0)
  sub.add_argument('--sprites', help='DIR/CLASS/*.png with alpha, *.wav|*.ogg|*.flac, to show')
  sub.add_argument(
    '--layout',
    default='semantic',
    choices=('semantic', 'object'),
    help='object: as AVSBench-object, v1s and v1m alone, 224x224, binary labels (%(default)s)',
  )
  sub.add_argument('--visible', action='store_true', help='label all that is seen; nothing sounds')


def _compose(args) -> None:
  from aavs_jax.console import Progress, say
  from aavs_jax.input_pipeline.compose.dataset import compose

  clips = {split: _per_subset(split, getattr(args, split)) for split in ('train', 'val', 'test')}
  if args.layout == 'object':
    for counts in clips.values():
      counts['v2'] = 0
  total = sum(sum(subsets.values()) for subsets in clips.values())
  with Progress('making clips', total, 'clips') as progress:
    compose(
      args.root,
      clips=clips,
      num_classes=args.classes,
      size=_size(args.size),
      seed=args.seed,
      sprites=args.sprites,
      layout=args.layout,
      visible=args.visible,
      progress=lambda done, _: progress.advance_to(done),
    )
  say(f'{total} clips in {args.root}' + (', none of v2' if args.layout == 'object' else ''))


def _per_subset(split: str, text: str) -> dict[str, int]:
  try:
    v1s, v1m, v2 = (int(number) for number in text.split(','))
  except ValueError:
    raise UserError(
      f'--{split} {text!r} is not three whole numbers: give clips of v1s,v1m,v2, as 240,240,120'
    ) from None
  return {'v1s': v1s, 'v1m': v1m, 'v2': v2}


def _size(text: str) -> tuple[int, int]:
  try:
    width, height = (int(number) for number in text.split('x'))
  except ValueError:
    raise UserError(f'--size {text!r} is not WIDTHxHEIGHT: write it as 160x120') from None
  return width, height


def _check_data_arguments(sub) -> None:
  sub.add_argument('root')
  sub.add_argument('--json', help='also write the report here')


def _check_data(args) -> int:
  from aavs_jax.console import Progress, say
  from aavs_jax.input_pipeline.check import check_data, format_check
  from aavs_jax.input_pipeline.files import write_json
  from aavs_jax.input_pipeline.index import read_index

  with Progress('checking', len(read_index(args.root)), 'clips') as progress:
    report = check_data(args.root, progress=lambda done, _: progress.advance_to(done))
  say(format_check(report))
  if args.json:
    write_json(args.json, report)
  return 0 if report['ok'] else 1


def _prepare_arguments(sub) -> None:
  sub.add_argument('root', help='the data set, in either layout')
  sub.add_argument('out', help='new folder, or one to go on with; then --data of the others')
  sub.add_argument(
    '--image-size', type=int, default=384, help='config.data.image_size (%(default)s)'
  )
  sub.add_argument('--eval-size', type=int, default=224, help='config.data.eval_size (%(default)s)')
  sub.add_argument(
    '--jpeg',
    type=int,
    default=0,
    metavar='QUALITY',
    help='store frames with loss, as 95 for a third of the size; 0 without (%(default)s)',
  )
  sub.add_argument('--workers', type=int, help='processes (one a core)')
  sub.add_argument(
    '--on-bad-clip', default='error', choices=('error', 'skip'), help='skip: leave it out'
  )
  sub.add_argument('--max-bad-clips', type=int, default=0, help='with skip; more are an error')


def _prepare(args) -> None:
  from aavs_jax.console import Progress, say
  from aavs_jax.input_pipeline.index import read_index
  from aavs_jax.input_pipeline.prepare import prepare

  if args.image_size % 32:
    say(
      f'  WARNING: --image-size {args.image_size} is no multiple of 32 pixels: only a method of '
      'your own can use these shards'
    )
  there = len([*epath.Path(args.out).glob('*.array_record')])
  with Progress('preparing', len(read_index(args.root)), 'clips') as progress:
    manifest = prepare(
      args.root,
      args.out,
      image_size=args.image_size,
      eval_size=args.eval_size,
      jpeg=args.jpeg,
      workers=args.workers,
      on_bad_clip=args.on_bad_clip,
      max_bad_clips=args.max_bad_clips,
      progress=lambda done, _: progress.advance_to(done),
    )
  for row in manifest['bad_clips']:
    say(f'  left out {row["clip"]}: {row["text"]}')
  size = sum(shard['bytes'] for shard in manifest['shards']) / 1e6
  say(
    f'{len(manifest["clips"])} clips in {len(manifest["shards"])} shards of {args.out}, '
    f'{size:,.0f} MB'
  )
  if there:
    say(
      f'{there} of them were there and are kept unless damaged: if the data set has changed since, '
      'name a new folder'
    )
  if args.jpeg:
    say(
      f'frames are stored as JPEG of quality {args.jpeg}: what the model sees is close to the raw '
      'data, not the same'
    )


def _distributed_argument(sub) -> None:
  sub.add_argument(
    '--distributed',
    nargs='?',
    const='auto',
    metavar='HOST:PORT,PROCESSES,INDEX',
    help='one of several processes; without a value on Cloud TPU, Slurm and GKE',
  )


def _start_arguments(sub) -> None:
  sub.add_argument('--config', required=True, help=_CONFIG_FILE)
  sub.add_argument('--data', required=True, help='labelled clips to learn from')
  sub.add_argument('--out', required=True, help='new folder, for --config.train.init')


def _start(args) -> None:
  from aavs_jax import config as config_lib
  from aavs_jax.console import say
  from aavs_jax.hearing import hear

  hear(config_lib.load(args.config, args.overrides), args.out, args.data)
  say(f'written to {args.out}: train from it with --config.train.init={quote(args.out)}')


def _train_arguments(sub) -> None:
  sub.add_argument('--config', required=True, help=_CONFIG_FILE)
  sub.add_argument('--workdir', required=True, help='where config, metrics and checkpoints go')
  sub.add_argument('--data', help='the data set (or --config.data.root)')
  sub.add_argument(
    '--profile',
    metavar='START:STOP',
    help='trace the steps after number START up to STOP into WORKDIR/profile',
  )
  sub.add_argument(
    '--wandb', default='', metavar='PROJECT', help='also send metrics to Weights & Biases'
  )
  _distributed_argument(sub)


def _train(args) -> None:
  from aavs_jax import config as config_lib
  from aavs_jax.train import train
  from aavs_jax.training import wandb_run

  config = config_lib.load(args.config, args.overrides)
  if args.data:
    config.data.root = args.data
  if not config.data.root:
    raise UserError('no data set: name its folder with --data ROOT')
  if args.wandb:
    wandb_run.require()
  profile = _range(args.profile) if args.profile else None
  train(config, args.workdir, profile=profile, wandb=args.wandb, keep_programs=True)


def _range(text: str) -> tuple[int, int]:
  try:
    start, stop = (int(number) for number in text.split(':'))
  except ValueError:
    raise UserError(f'--profile {text!r} is not START:STOP: write it as 10:13') from None
  return start, stop


def _masks_arguments(sub) -> None:
  sub.add_argument('--workdir', required=True, help='of stage 1')
  sub.add_argument('--data', required=True)
  sub.add_argument('--out', required=True)
  sub.add_argument('--splits', default='val,test', help='(%(default)s)')
  _soft_argument(sub)
  _distributed_argument(sub)


def _soft_argument(sub) -> None:
  sub.add_argument(
    '--soft', action='store_true', help='probabilities, for config.prior.soft of stage 2'
  )


def _masks(args) -> None:
  from aavs_jax.console import counted, say
  from aavs_jax.hand_over import write_masks

  written = write_masks(
    args.workdir,
    data=args.data,
    out=args.out,
    splits=tuple(dict.fromkeys(args.splits.split(','))),
    soft=args.soft,
  )
  say(f'masks of {counted(written, "clips")} written; all are in {args.out}')


def _cross_fit_arguments(sub) -> None:
  sub.add_argument('--config', required=True, help=f'of stage 1; {_CONFIG_FILE}')
  sub.add_argument('--data', required=True)
  sub.add_argument('--workdir', required=True, help='a work folder for each fold goes there')
  sub.add_argument('--out', required=True, help="folder of stage 1's masks")
  sub.add_argument('--folds', type=int, default=5, help='trainings of stage 1 (%(default)s)')
  _soft_argument(sub)


def _cross_fit(args) -> None:
  from aavs_jax import config as config_lib
  from aavs_jax.console import counted, say
  from aavs_jax.cross_fit import cross_fit

  config = config_lib.load(args.config, args.overrides)
  options = dict(data=args.data, out=args.out, folds=args.folds, soft=args.soft)
  written = cross_fit(config, args.workdir, **options)
  say(f'masks of {counted(written, "training clips")} written; all are in {args.out}')


def _eval_arguments(sub) -> None:
  sub.add_argument('--workdir', required=True)
  sub.add_argument('--data', required=True)
  sub.add_argument('--out', required=True, help='JSON file; the tables go beside it, as Markdown')
  sub.add_argument('--split', default='test', choices=('train', 'val', 'test'))
  sub.add_argument('--subsets', help='of v1s,v1m,v2, if not those it was trained on')
  sub.add_argument(
    '--audio',
    default='true',
    choices=('true', 'other', 'silence', 'noise', 'offscreen'),
    help="what the model hears: its clip, another clip, nothing, noise, a clip of what isn't seen",
  )
  sub.add_argument('--oracle', action='store_true', help='ground truth as the prior of stage 2')
  sub.add_argument('--no-prior', action='store_true', help='stage 2 without any prior')
  sub.add_argument('--masks', default='', help='prior of stage 2, if not that of its config')
  sub.add_argument('--maps', help='folder for the predicted maps')
  _distributed_argument(sub)


def _eval(args) -> None:
  from aavs_jax.console import say
  from aavs_jax.evaluate import evaluate
  from aavs_jax.scoring.tables import format_evaluation

  result = evaluate(
    args.workdir,
    data=args.data,
    out=args.out,
    split=args.split,
    audio=args.audio,
    oracle=args.oracle,
    no_prior=args.no_prior,
    mask_folder=args.masks,
    maps=args.maps,
    subsets=args.subsets.split(',') if args.subsets is not None else None,
  )
  say(format_evaluation(result))
  say(f'written to {args.out} and {epath.Path(args.out).with_suffix(".md")}')


def _predict_arguments(sub) -> None:
  sub.add_argument(
    'sources', nargs='+', metavar='SOURCE', help='video, folder of videos, or clip folder'
  )
  sub.add_argument('--stage1', help='work folder of stage 1')
  sub.add_argument('--stage2', help='work folder of stage 2; without it masks have no classes')
  sub.add_argument('--out', required=True, help='new folder; of several sources one in it for each')
  sub.add_argument(
    '--every',
    type=float,
    default=1,
    metavar='SECONDS',
    help='from a frame of a video to the next (%(default)s)',
  )


def _predict(args) -> None:
  from aavs_jax import predict
  from aavs_jax.console import say

  sources = [path for source in args.sources for path in predict.expand(source)]
  options = dict(stage1=args.stage1, stage2=args.stage2, out=args.out, every=args.every)
  if sources == [Path(args.sources[0])]:
    predict.predict(sources[0], **options)
  else:
    predict.predict_all(sources, **options)
  say(f'masks and overlays in {args.out}')


def _demo_arguments(sub) -> None:
  sub.add_argument('out', help='new folder')
  sub.add_argument('--stage1', help='work folder of stage 1')
  sub.add_argument('--stage2', help='work folder of stage 2; without it masks have no classes')
  sub.add_argument(
    '--onnxruntime', metavar='DIR', help='the unpacked npm package onnxruntime-web (npm fetches it)'
  )


def _demo(args) -> None:
  from aavs_jax.console import say
  from aavs_jax.demo import write_demo

  write_demo(args.out, stage1=args.stage1, stage2=args.stage2, runtime=args.onnxruntime)
  serve = f'python -m http.server --bind 127.0.0.1 --directory {quote(args.out)}'
  say(f'written to {args.out}: {serve}, then open http://127.0.0.1:8000')


def _convert_arguments(sub) -> None:
  sub.add_argument(
    'source',
    help='a released checkpoint (AAVS, TPAVI, AVSegFormer), Mask2Former, PVT-v2, ResNet or VGGish',
  )
  sub.add_argument('out', help='new work folder')
  sub.add_argument('--vggish', default='', help="torchvggish's file, or a folder made of it")


def _convert(args) -> None:
  from aavs_jax.console import say
  from aavs_jax.pytorch.convert import convert

  convert(args.source, args.out, args.vggish)
  say(f'written to {args.out}')


def _export_arguments(sub) -> None:
  sub.add_argument('workdir')
  sub.add_argument('out', help='new file, .pth or .safetensors; of the other formats a new folder')
  sub.add_argument(
    '--format',
    default='torch',
    choices=('torch', 'stablehlo', 'onnx'),
    help="the release's state dict, or what predicts without this package (%(default)s)",
  )
  sub.add_argument(
    '--stage1', help='work folder of the stage 1 that goes with a stage 2; not torch'
  )


def _export(args) -> None:
  from aavs_jax import export
  from aavs_jax.console import say
  from aavs_jax.pytorch import convert

  if args.format != 'torch':
    out = export.export(args.workdir, args.out, args.format, args.stage1)
    say(f'written to {out}: {export.MODEL} says how to use it')
    return
  if args.stage1:
    raise UserError('--stage1 is not for --format torch, which writes one stage: leave it out')
  out = convert.export(args.workdir, args.out)
  say(f'written to {out}, as the release has it: without VGGish, but for AVSegFormer')


def _report_arguments(sub) -> None:
  sub.add_argument('workdir')
  sub.add_argument('--data', required=True)
  sub.add_argument('--out', help='HTML file (WORKDIR/report.html)')


def _report(args) -> None:
  from aavs_jax.console import say
  from aavs_jax.studies.report import write_report

  say(f'open {write_report(args.workdir, args.data, args.out)}')


def _recipe_arguments(sub) -> None:
  sub.add_argument('config', nargs='?', help='config file; without it, all published recipes')


def _recipe(args) -> None:
  from aavs_jax import config as config_lib
  from aavs_jax.console import say
  from aavs_jax.studies import recipes

  if args.config:
    changes = recipes.format_recipe(config_lib.load(args.config))
    say(f'{args.config} is configs/base.py' + (f' with\n{changes}' if changes else ' itself'))
  else:
    say(recipes.format_recipes(recipes.published()))
    say('NAME is configs/NAME.py, NAME:VARIANT configs/NAME.py:VARIANT; base is configs/base.py')


def _reproduce_arguments(sub) -> None:
  sub.add_argument('--data', required=True, help='AVSBench-semantic')
  prior = sub.add_mutually_exclusive_group()
  prior.add_argument(
    '--masks', default='', help='released masks of stage 1 of AVSS, {v1s,v1m,v2}/UID/{0..}.png'
  )
  prior.add_argument('--stage1', default='', help='or the checkpoint of stage 1 that makes them')
  sub.add_argument('--stage2', default='', help='released checkpoint of stage 2 of AVSS')
  sub.add_argument('--vggish', default='', help="torchvggish's file, or a folder made of it")
  sub.add_argument('--s4', default='', help='released checkpoint of S4; its row is empty without')
  sub.add_argument('--ms3', default='', help='released checkpoint of MS3; likewise')
  sub.add_argument(
    '--other',
    action='append',
    default=[],
    metavar='TASK=FILE',
    help='one of TPAVI or AVSegFormer, of s4, ms3 or avss; may be given several times',
  )
  sub.add_argument('--workdir', required=True, help='an interrupted run goes on from what is there')
  sub.add_argument(
    '--batch', type=int, default=1, help='pieces of five frames at once (%(default)s)'
  )


def _reproduce(args) -> None:
  from aavs_jax.console import say
  from aavs_jax.studies.reproduce import format_table, reproduce

  result = reproduce(
    args.workdir,
    data=args.data,
    stage1=args.stage1,
    masks=args.masks,
    stage2=args.stage2,
    vggish=args.vggish,
    s4=args.s4,
    ms3=args.ms3,
    others=[text.partition('=')[::2] for text in args.other],
    batch_items=args.batch,
  )
  say(format_table(result))
  say(f'written to {args.workdir}: table.json, table.md and eval/')


def _stepping_stones_arguments(sub) -> None:
  sub.add_argument('--method', default='aavs', help='aavs, tpavi or avsegformer (%(default)s)')
  sub.add_argument('--data', required=True, help='AVSBench-semantic')
  sub.add_argument('--workdir', required=True, help='an interrupted run goes on from what is there')
  sub.add_argument('--masks', default='', help='of another stage 1, for the row "high"')


def _stepping_stones(args) -> None:
  from aavs_jax.console import say
  from aavs_jax.studies.reproduce import format_table
  from aavs_jax.studies.table2 import table2

  result = table2(
    args.method, args.workdir, data=args.data, masks=args.masks, overrides=args.overrides
  )
  say(format_table(result))
  say(f'written to {args.workdir}: table.json, table.md and eval/')


def _bench_arguments(sub) -> None:
  _add_commands(sub.add_subparsers(dest='what', required=True, metavar='WHAT'), _BENCHES)


def _bench_compile_arguments(sub) -> None:
  sub.add_argument('--config', required=True, help='override with --config.KEY=VALUE')
  sub.add_argument('--frames', type=int, default=5, help='of a batch (%(default)s)')
  sub.add_argument('--phase', type=int, default=2, choices=(1, 2), help='of training (%(default)s)')
  sub.add_argument('--json', help='also write the figures here')


def _bench_step_arguments(sub) -> None:
  _bench_compile_arguments(sub)
  sub.add_argument('--repeats', type=int, default=3, help='timed ones (%(default)s)')
  sub.add_argument(
    '--peer', action='store_true', help="also time the transformers library's Mask2Former"
  )


def _bench(args) -> None:
  from aavs_jax import config as config_lib
  from aavs_jax.console import say
  from aavs_jax.perf import bench

  config = config_lib.load(args.config, args.overrides)
  if args.what == 'compile':
    result = bench.compile_times(config, args.frames, args.phase)
    text = bench.format_compile_times(result)
  elif args.peer:
    result = bench.beside_peer(
      args.what, config, args.frames, args.phase, args.repeats, lambda line: say(f'  {line}')
    )
    text = bench.format_peer(result)
  else:
    result = bench.bench(args.what, config, args.frames, args.phase, args.repeats)
    text = bench.format_bench(result)
  _show(args, result, text)


def _bench_sweep_arguments(sub) -> None:
  sub.add_argument('out', metavar='OUT', help='folder for sweep.json and sweep.md')
  for stage in (1, 2):
    config = str(_CONFIGS / f'avss_stage{stage}.py')
    sub.add_argument(f'--stage{stage}', default=config, help=f'{_CONFIG_FILE} (%(default)s)')
  sub.add_argument('--minutes', type=float, default=9, help='to take (%(default)s)')


def _bench_sweep(args) -> int:
  from aavs_jax import config as config_lib
  from aavs_jax.console import say
  from aavs_jax.input_pipeline.files import write_text
  from aavs_jax.perf import sweep

  configs = {
    stage: config_lib.load(getattr(args, f'stage{stage}'), args.overrides) for stage in (1, 2)
  }
  result = sweep.sweep(args.out, configs, args.minutes, lambda line: say(f'  {line}'))
  text = sweep.format_sweep(result)
  write_text(f'{args.out}/sweep.md', text + '\n')
  say(f'{text}\nwritten to {args.out}: sweep.json and sweep.md')
  return 0 if any('error' not in row for row in result['rows']) else 1


def _show(args, result: dict, text: str) -> None:
  """The figures of a benchmark: as a file, if that is wanted, and as text."""
  from aavs_jax.console import say
  from aavs_jax.input_pipeline.files import write_json

  say(f'{args.config} {" ".join(args.overrides)}'.rstrip())
  say(text)
  if args.json:
    write_json(args.json, {'config': args.config, 'overrides': args.overrides, 'result': result})


def _bench_input_arguments(sub) -> None:
  sub.add_argument(
    '--config',
    default=str(_CONFIGS / 'avss_stage2.py'),
    help='override with --config.KEY=VALUE (%(default)s)',
  )
  sub.add_argument('--data', default='', help='a data set, raw or prepared, instead of made clips')
  sub.add_argument('--clips', type=int, default=3, help='to read (%(default)s)')
  sub.add_argument('--seconds', type=float, default=10, help='of each timing (%(default)s)')
  sub.add_argument(
    '--memory', type=int, metavar='CLIPS', help='watch memory over an epoch of so many, instead'
  )
  sub.add_argument('--json', help='also write the figures here')


def _bench_input(args) -> None:
  from aavs_jax import config as config_lib
  from aavs_jax.console import say
  from aavs_jax.input_pipeline import bench

  config = config_lib.load(args.config, args.overrides)
  # Made clips have neither masks by stage 1 nor, copied, a table.
  task = dataclasses.replace(config_lib.task_of(config), predicted=0.0, negative_sound=0.0)
  data = config.data
  loading = bench.Loading(data.item_frames, data.batch_items, data.threads, data.workers)
  if not args.data:
    say('  making clips of 1280x720 ...')
  if args.memory is not None:
    result = bench.bench_memory(task, loading, data=args.data, clips=args.memory, say=say)
    text = bench.format_memory(result)
  else:
    result = bench.bench_input(
      task, loading, data=args.data, clips=args.clips, seconds=args.seconds
    )
    text = bench.format_input(result, loading)
  _show(args, result, text)


def _aot_arguments(sub) -> None:
  sub.add_argument('--config', required=True, help=_CONFIG_FILE)
  sub.add_argument('--topology', required=True, help='sides, as v5e:16x16, or size, as v5e-256')
  sub.add_argument('--batch-per-chip', type=int, help='frames (as few as there can be)')
  sub.add_argument(
    '--fit', action='store_true', help='find how many frames fill the memory, from there'
  )
  sub.add_argument(
    '--breakdown', action='store_true', help='also cycles, FLOPs and bytes by part of the model'
  )
  sub.add_argument(
    '--part', metavar='CLASS', help='compile only modules of this class, such as SwinBlock, alone'
  )
  sub.add_argument('--json', help='also write the figures here')


def _aot(args) -> None:
  # The compiler alone is wanted: a TPU that is there stays free, and what is compiled for one that
  # is not cannot be read back from the cache.
  os.environ |= {'JAX_PLATFORMS': 'cpu', 'JAX_ENABLE_COMPILATION_CACHE': 'false'}
  from aavs_jax import config as config_lib
  from aavs_jax.console import say
  from aavs_jax.input_pipeline.files import write_json
  from aavs_jax.perf.aot import aot, format_breakdown, format_report, parse_topology
  from aavs_jax.perf.parts import parts

  if args.part and (args.fit or args.breakdown):
    raise UserError('--part compiles modules alone: leave out --fit and --breakdown')
  config = config_lib.load(args.config, args.overrides)
  parse_topology(args.topology)  # refused before anything is said of compiling
  say(f'compiling {" ".join([args.config, *args.overrides])} for {args.topology}')
  what = {'config': args.config, 'overrides': args.overrides}
  if args.part:
    found = parts(config, args.topology, args.part, args.batch_per_chip, progress=say)
    if args.json:
      write_json(args.json, {**what, 'part': args.part, 'calls': found})
    return
  result = aot(config, args.topology, args.batch_per_chip, fit=args.fit, progress=say)
  say(format_report(result))
  if args.breakdown:
    for name in ('train', 'predict'):
      say(f'{name}, by part\n{format_breakdown(result[name]["parts"])}')
  if args.json:
    write_json(args.json, {**what, **result})


def _selftest_arguments(sub) -> None:
  sub.add_argument(
    'files', nargs='*', metavar='FILE.npz', help='recordings (those of tests/goldens)'
  )


def _selftest(args) -> int:
  from aavs_jax.pytorch.selftest import selftest

  return 0 if selftest(args.files) else 1


def _quickstart_arguments(sub) -> None:
  sub.add_argument(
    '--config', default=str(_CONFIGS / 'quickstart.py'), help='a study (%(default)s)'
  )
  sub.add_argument('--workdir', default='runs/quickstart', help='(%(default)s)')
  sub.add_argument('--data', default='', help='a data set instead of made clips')
  sub.add_argument('--fresh', action='store_true', help='remove what is there and start anew')


def _quickstart(args) -> None:
  from aavs_jax.config import load_study
  from aavs_jax.console import say
  from aavs_jax.studies.study import run_study

  config = load_study(args.config, args.overrides)
  page = run_study(config, args.workdir, data=args.data, fresh=args.fresh)
  if page.name == 'report.html':  # of one pair of models, not a comparison
    run, missing = quote(str(page.parent)), importlib.util.find_spec('jax2onnx') is None
    say(
      f'to try it on a video of yours in a browser: aavs demo {run}/page --stage1 {run}/stage1 '
      f'--stage2 {run}/stage2' + missing * ' (it needs jax2onnx, see "Deploying" in README.md)'
    )


# Rows of name, arguments, what runs it, help, example.
_BENCHES = (
  ('step', _bench_step_arguments, _bench, 'time the training step',
   'aavs bench step --config configs/avss_stage1.py'),
  ('predict', _bench_step_arguments, _bench, 'time forward pass and post-processing',
   'aavs bench predict --config configs/avss_stage1.py'),
  ('compile', _bench_compile_arguments, _bench,
   'time how long both take to compile, anew and from the persistent cache',
   'aavs bench compile --config configs/avss_stage1.py'),
  ('input', _bench_input_arguments, _bench_input,
   'time what reads the data: CPU time a frame by part, and how many cores feed an accelerator',
   'aavs bench input --config.data.batch_items=8 --config.data.workers=2'),
  ('sweep', _bench_sweep_arguments, _bench_sweep,
   'time the steps by batch, dtype and form, the peer beside them, and list the largest kernels',
   'aavs bench sweep runs/sweep --minutes 9'),
)  # fmt: skip
_COMMANDS = (
  ('compose', _compose_arguments, _compose, 'write a small made data set in a layout of AVSBench',
   'aavs compose data --train 240,240,120 --val 12,20,8 --test 30,60,30'),
  ('check-data', _check_data_arguments, _check_data, 'read a whole data set and report its faults',
   'aavs check-data data'),
  ('prepare', _prepare_arguments, _prepare,
   'write a data set as shards, from which training reads much faster',
   'aavs prepare data data_shards'),
  ('start', _start_arguments, _start,
   'teach a small audio network to hear, from the labels of clips, as a start for training',
   'aavs start --config configs/quick_stage1.py --data data --out runs/start'),
  ('train', _train_arguments, _train, 'train one stage, or go on with it',
   'aavs train --config configs/avss_stage2.py --workdir runs/stage2 --data data '
   '--config.optimizer.lr=2e-4'),
  ('masks', _masks_arguments, _masks, "write stage 1's masks, the prior of stage 2",
   'aavs masks --workdir runs/stage1 --data data --out runs/masks'),
  ('cross-fit', _cross_fit_arguments, _cross_fit,
   'write such masks of training clips, each by a stage 1 that has not been trained on the clip',
   'aavs cross-fit --config configs/avss_stage1.py --data data --workdir runs/cross_fit '
   '--out runs/masks'),
  ('eval', _eval_arguments, _eval, 'score a trained stage on a split by every protocol',
   'aavs eval --workdir runs/stage2 --data data --out runs/stage2_test.json'),
  ('predict', _predict_arguments, _predict,
   'segment video files, or a folder with frames/ and audio.wav',
   'aavs predict video.mp4 --stage1 runs/stage1 --stage2 runs/stage2 --out prediction'),
  ('demo', _demo_arguments, _demo,
   'write a page on which a browser takes a video or the camera and marks what sounds',
   'aavs demo page --stage1 runs/stage1 --stage2 runs/stage2'),
  ('convert', _convert_arguments, _convert, 'make a work folder of weights that PyTorch trained',
   'aavs convert stage2.pth runs/stage2 --vggish vggish.pth'),
  ('export', _export_arguments, _export,
   "write a work folder's weights as a state dict of the release, or stages for serving",
   'aavs export runs/stage2 serve --format stablehlo --stage1 runs/stage1'),
  ('report', _report_arguments, _report, 'write the report of a finished quickstart',
   'aavs report runs/quickstart --data runs/quickstart/data'),
  ('recipe', _recipe_arguments, _recipe, 'show what the published recipes change, or one config',
   'aavs recipe configs/s4.py:paper'),
  ('reproduce', _reproduce_arguments, _reproduce,
   "score released checkpoints beside the paper's figures",
   'aavs reproduce --data ROOT --masks MASKS --stage2 stage2.pth --vggish vggish.pth '
   '--workdir runs/reproduce'),
  ('stepping-stones', _stepping_stones_arguments, _stepping_stones,
   "train a method in one stage and in two, and score both beside the paper's Table 2",
   'aavs stepping-stones --method avsegformer --data ROOT --workdir runs/avsegformer '
   '--config.train.init=runs/pvt'),
  ('bench', _bench_arguments, None,
   'time the real steps on a batch of noise, compiling them, or reading the data',
   'aavs bench step --config configs/avss_stage1.py --phase 2'),
  ('aot', _aot_arguments, _aot,
   'compile the real steps for a TPU slice, without one, and say what they need',
   'aavs aot --config configs/avss_stage2.py --topology v5e:16x16 --config.dtype=bfloat16'),
  ('selftest', _selftest_arguments, _selftest,
   "compare the model on this device with recorded runs of the authors' code",
   'aavs selftest'),
  ('quickstart', _quickstart_arguments, _quickstart,
   'both stages end to end, with evaluation and report',
   'aavs quickstart --workdir runs/quickstart'),
)  # fmt: skip


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='aavs', description='Audio-visual segmentation in JAX: Stepping Stones with AAVS.'
  )
  parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
  _add_commands(parser.add_subparsers(dest='command', required=True, metavar='COMMAND'), _COMMANDS)
  return parser


def _add_commands(parsers, rows: Sequence[tuple]) -> None:
  for name, add_arguments, run, text, example in rows:
    parser = parsers.add_parser(
      name,
      help=text,
      description=text[0].upper() + text[1:] + '.',
      epilog=f'example:\n  {example}',
      formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, parser=parser)
    # Also after the sub-command, where one adds it to a line that failed.
    parser.add_argument('--debug', action='store_true', default=argparse.SUPPRESS, help='traceback')
    add_arguments(parser)


def main(argv: Sequence[str] | None = None) -> int:
  """Entry point; returns the exit status.

  0, 1 (check-data or selftest found faults; a disk, a device or another process failed), 2 (bad
  input), or, ended from outside, 130 (Ctrl-C), 141 (nobody reads its output any more) or 143
  (SIGTERM).
  """
  if isinstance(sys.stdout, io.TextIOWrapper):  # a notebook's is none
    # Names of files need not be text in the encoding of the terminal, nor in any.
    sys.stdout.reconfigure(errors='backslashreplace')
  args = _parse(argv)
  several = getattr(args, 'distributed', None)
  _keep_compiled(args.workdir if several else None)
  _quiet_libraries()
  keep_freed()

  # So that files half written are removed; training, which saves first, has a handler of its own.
  ending = Ending()
  before = {signal.SIGTERM: signal.signal(signal.SIGTERM, ending.handle)}
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # what a shell ignores stays so
    before[signal.SIGINT] = signal.signal(signal.SIGINT, ending.handle)
  try:
    if several:
      from aavs_jax.devices import distributed

      distributed.start(several)
      if args.command != 'train':
        # JAX has taken the signal to tell all processes of it, for which training alone asks.
        signal.signal(signal.SIGTERM, ending.handle)
    if getattr(args, 'json', None):
      from aavs_jax.input_pipeline.files import require_place

      require_place(args.json)
    return args.run(args) or 0
  except SystemExit as stop:
    if args.command != 'train':  # which ends together with all other processes
      # A training that SIGTERM ends in good order says 0, but what it is a part of is not done.
      stop.code = stop.code or 128 + signal.SIGTERM
      if several:
        distributed.leave(stop.code, patience=3)
    raise
  except KeyboardInterrupt:
    if args.debug:
      traceback.print_exc()
    print('aavs: interrupted', file=sys.stderr)
    if several:
      distributed.leave(128 + signal.SIGINT, patience=3)
    return 128 + signal.SIGINT
  except Exception as error:
    status, text = _fault(error, args)
    explained = text is not None and not args.debug
    if not explained and not several:
      raise
    if explained and text:
      print(f'aavs: {text}', file=sys.stderr)
    elif not explained:
      traceback.print_exc()
    if several:
      distributed.leave(status)
    return status
  finally:
    ending.heard()
    for number, handler in before.items():
      signal.signal(number, handler)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """The arguments, those of the form --config.KEY=VALUE as `overrides`."""
  args, rest = _parser().parse_known_args(argv)
  args.overrides = [text for text in rest if text.startswith('--config.')]
  unknown = [text for text in rest if text not in args.overrides]
  if unknown or (args.overrides and args.command not in _TAKE_OVERRIDES):
    args.parser.error(f'unknown argument {(unknown or args.overrides)[0]}')
  return args


def _fault(error: Exception, args: argparse.Namespace) -> tuple[int, str | None]:
  """The exit status after an error and what to say of it: '' is nothing, None a fault of ours."""
  if isinstance(error, BrokenPipeError) and _output_is_closed():
    return 128 + signal.SIGPIPE, ''
  if (fault := _of_bucket(error)) is not None:
    return fault
  if isinstance(error, OSError) and may_pass(error):
    text = str(error)
    if error.errno == errno.ENOSPC and not error.filename:  # a write does not know its file's name
      places = (getattr(args, name, None) for name in ('out', 'workdir', 'root'))
      text += f', in writing {next(filter(None, places), "a file")}'
    return 1, text
  if isinstance(error, (UserError, FloatingPointError, OSError)):
    return 2, str(error)
  if isinstance(error, RuntimeError) and re.match(r'RESOURCE_EXHAUSTED.*emory', str(error)):
    return 2, (
      f'a device has too little memory ({_one_line(error)}): use fewer frames a step '
      '(config.data.batch_items), config.train.accumulate, config.dtype=bfloat16 or '
      'config.model.remat=full'
    )
  text = _absent_device()
  failed = isinstance(error, RuntimeError) or 'Gloo' in str(error)  # as of a collective
  if text is None and failed and getattr(args, 'distributed', None):
    text = (
      f'another process or the network between them has failed ({_one_line(error)}): start all '
      'processes again, they go on from the last checkpoint'
    )
  return 1, text


def _of_bucket(error: Exception) -> tuple[int, str] | None:
  """As _fault, of what Google's and other libraries raise for a bucket; None for anything else."""
  said = str(error)
  if isinstance(error, ImportError) and (found := re.search(r'[Ii]nstall (\w+) to access', said)):
    return 2, f'{said}: pip install {found[1]}, or name a folder that is no bucket'
  library = type(error).__module__.partition('.')[0]
  of_google, of_amazon = library in ('google', 'gcsfs', 'requests'), library == 'botocore'
  # TensorStore has ValueErrors for everything.
  code = said.partition(':')[0] if type(error) is ValueError else ''
  text = f'a bucket cannot be used ({_one_line(error) or type(error).__name__})'
  refused = isinstance(error, OSError) and error.errno is None and is_refused(error)
  if refused or code == 'PERMISSION_DENIED' or (of_google and getattr(error, 'code', 0) == 403):
    return 2, f'{text}: see "Permission denied on a bucket" in launch/README.md'
  if of_google or of_amazon or code in PASSING_CODES:
    advice = 'try again'
    if 'Credentials' in type(error).__name__:
      # These may come by themselves: in the cloud, a moment after a machine's start.
      command = 'gcloud auth application-default login' if of_google else 'aws configure'
      advice = f'give this machine some, as with `{command}`, and try again'
    return 1, f'{text}: {advice}'
  return None


def _output_is_closed() -> bool:
  """Whether nobody reads standard output any more, as where `head` has seen enough."""
  poll = select.poll()
  poll.register(sys.stdout, select.POLLOUT)
  closed = any(event & select.POLLERR for _, event in poll.poll(0))
  if closed:
    # The interpreter would try to write at its end what is left, and say that it cannot.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  return closed


def _absent_device() -> str | None:
  """What to say if JAX has no device to compute on; None if it has one, or was not asked for any.

  Asked after an error alone, for that of the first computation, of whatever type, need not say so.
  """
  if 'jax' not in sys.modules:
    return None
  import jax

  try:
    jax.devices()
    return None
  except Exception as error:
    return (
      f'JAX finds no device of JAX_PLATFORMS={jax.config.jax_platforms} '
      f'({_one_line(error) or "no reason given"}): see "When it fails" in launch/README.md, or use '
      'JAX_PLATFORMS=cpu'
    )


def _one_line(error: Exception) -> str:
  return ' '.join(str(error).split())[:200]


def _keep_compiled(workdir: str | None) -> None:
  """Compiled programs are kept between runs, unless the user has a cache already.

  Of several processes only the first one writes them, so all must see the folder.
  """
  home = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
  cache = f'{workdir}/compiled' if workdir else str(home / 'aavs_jax')
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', cache)


def _quiet_libraries() -> None:
  """Orbax warns of each folder it opens for reading only; warnings of ours are raised or said."""
  absl_logging.set_verbosity(absl_logging.ERROR)
  vendors = Path('/sys/bus/pci/devices').glob('*/vendor')
  if not any(vendor.read_text().strip() == '0x1ae0' for vendor in vendors):  # Google's
    # No TPU: libtpu, installed for its compiler, would go on about knowing nothing of one.
    os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
    os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-1')


if __name__ == '__main__':
  sys.exit(main())

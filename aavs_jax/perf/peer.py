"""The transformers library's Mask2Former, timed as the model's peer; runs without JAX."""

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aavs_jax.input_pipeline import host
from aavs_jax.input_pipeline.errors import UserError

DEVICES = {'cpu': 'cpu', 'gpu': 'cuda', 'cuda': 'cuda'}  # PyTorch's, by JAX's platform
# How the peer computes, by device, and the dtype of ours that each is compared with. On GPUs JAX
# itself takes TF32 for products in float32.
MODES = {
  'cpu': {'float32': 'float32'},
  'cuda': {
    'float32': 'float32',
    'TF32': 'float32',
    'TF32 compiled': 'float32',
    'bfloat16': 'bfloat16',
    'bfloat16 compiled': 'bfloat16',
    'bfloat16 compiled channels-last': 'bfloat16',
  },
}
# What trains: little, as in AAVS, but down to the backbone's first block where gradients go there.
_TRAINED = (
  r'queries_(embedder|features)|class_predictor',
  r'pixel_level_module\.decoder\.encoder\..*layer_norm',
)
_TRAINED_IN_BACKBONE = r'pixel_level_module\.encoder\..*layernorm_(before|after)'
TRAINED = (
  "of the peer train queries, class predictor and the LayerNorms of the pixel decoder's encoder, "
  "in phase 2 those of Swin's blocks too: gradients pass through all that ours pass through, and "
  'frozen weights get none'
)


def require() -> None:
  """Raises UserError if the peer is not installed."""
  names = ('torch', 'transformers', 'scipy')
  missing = ', '.join(name for name in names if importlib.util.find_spec(name) is None)
  if missing:
    raise UserError(f"--peer needs {missing}, not installed here: run `pip install -e '.[peer]'`")


def process_memory() -> int:
  """Bytes of host memory that this process has held at most."""
  status = Path('/proc/self/status')
  if status.exists():  # getrusage may count what the parent held before the process began
    return int(re.search(r'VmHWM:\s+(\d+) kB', status.read_text())[1]) * 1024
  unit = 1 if os.uname().sysname == 'Darwin' else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def build(sizes: Mapping[str, Any]):
  """Mask2Former of the sizes of a config, given as a plain dictionary; random weights."""
  import transformers

  transformers.logging.set_verbosity_error()
  model = sizes['model']
  swin = transformers.SwinConfig(
    image_size=sizes['data']['image_size'],
    embed_dim=model['swin']['embed_dim'],
    depths=list(model['swin']['depths']),
    num_heads=list(model['swin']['heads']),
    window_size=model['swin']['window'],
    mlp_ratio=model['swin']['mlp_ratio'],
    drop_path_rate=model['swin']['drop_path'],
    out_features=['stage1', 'stage2', 'stage3', 'stage4'],
  )
  config = transformers.Mask2FormerConfig(
    backbone_config=swin,
    hidden_dim=model['hidden'],
    feature_size=model['hidden'],
    mask_feature_size=model['hidden'],
    num_attention_heads=model['heads'],
    num_queries=model['num_queries'],
    encoder_layers=model['encoder_layers'],
    encoder_feedforward_dim=model['encoder_ffn'],
    decoder_layers=model['decoder_layers'] + 1,  # it counts the prediction before the first layer
    dim_feedforward=model['decoder_ffn'],
    num_labels=sizes['num_classes'],
    train_num_points=sizes['loss']['points'],
  )
  return transformers.Mask2FormerForUniversalSegmentation(config)


def choose_trained(model: Any, phase: int) -> dict[str, Any]:
  """The parameters that train, by name, see TRAINED; all others are frozen."""
  patterns = (*_TRAINED, _TRAINED_IN_BACKBONE) if phase == 2 else _TRAINED
  for name, parameter in model.named_parameters():
    parameter.requires_grad_(any(re.search(pattern, name) for pattern in patterns))
  return {name: p for name, p in model.named_parameters() if p.requires_grad}


def measure(
  what: str,
  sizes: Mapping[str, Any],
  batch: Mapping[str, np.ndarray],
  phase: int,
  repeats: int,
  device: str,
  mode: str,
) -> dict[str, Any]:
  """Times the peer's prediction or training step; to be called in a process of its own.

  Args:
    what: 'predict' (forward and post-processing to maps) or 'step' (forward, the library's own
      loss, backward, AdamW).
    sizes: the config as a plain dictionary.
    batch: of training, see types.Batch; its frames, labels and target_classes.
    phase: 1: no gradient enters the backbone.
    repeats: timed runs.
    device: 'cpu' or 'cuda'.
    mode: a key of MODES[device].

  Returns:
    frames, seconds of each run, peak_memory [bytes] and of what ('device' or 'process'), trained
    and total parameters, threads, versions.

  Raises:
    UserError: PyTorch sees no such device.
  """
  import torch

  if device == 'cuda' and not torch.cuda.is_available():
    raise UserError('--peer: JAX runs on a GPU, but this PyTorch sees none: install one with CUDA')
  torch.set_num_threads(host.cores())  # all that JAX takes
  torch.manual_seed(0)
  exact = mode == 'float32'
  torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not exact
  model = build(sizes).to(device)
  trained = list(choose_trained(model, phase).values())
  optimizer = torch.optim.AdamW(trained)
  layout = torch.channels_last if 'channels-last' in mode else torch.contiguous_format
  model = model.to(memory_format=layout)
  network = torch.compile(model.model) if 'compiled' in mode else model.model
  image_size, eval_size = sizes['data']['image_size'], sizes['data']['eval_size']
  frames = torch.from_numpy(batch['frames']).to(device)
  labels = torch.from_numpy(batch['labels']).to(device)
  classes = [torch.from_numpy(row[row >= 0]).long().to(device) for row in batch['target_classes']]
  masks = [
    (label[None] == targets[:, None, None]).float() for label, targets in zip(labels, classes)
  ]
  mean = torch.tensor([0.485, 0.456, 0.406], device=device)
  std = torch.tensor([0.229, 0.224, 0.225], device=device)

  def outputs():
    """Class and mask logits of all prediction sets, float32."""
    mixed = torch.autocast(device, torch.bfloat16) if 'bfloat16' in mode else None
    with mixed or contextlib.nullcontext():
      pixels = ((frames.float() / 255 - mean) / std).permute(0, 3, 1, 2)
      pixels = pixels.contiguous(memory_format=layout)
      found = network(pixel_values=pixels, output_hidden_states=True, return_dict=True)
    states = [state.float() for state in found.transformer_decoder_intermediate_states]
    class_logits = [model.class_predictor(state.transpose(0, 1)) for state in states]
    return class_logits, [logits.float() for logits in found.masks_queries_logits]

  def resize(maps, size):
    return torch.nn.functional.interpolate(maps, (size, size), mode='bilinear')

  def predict():
    with torch.inference_mode():
      class_logits, mask_logits = outputs()
      probability = class_logits[-1].softmax(-1)[..., :-1]
      inside = resize(mask_logits[-1], image_size).sigmoid()
      scores = resize(torch.einsum('nqc,nqhw->nchw', probability, inside), eval_size)
      return scores if sizes['task'] == 'binary' else scores.argmax(1)

  def step():
    class_logits, mask_logits = outputs()
    earlier = model.get_auxiliary_logits(class_logits, mask_logits)
    terms = model.get_loss_dict(mask_logits[-1], class_logits[-1], masks, classes, earlier)
    optimizer.zero_grad()
    model.get_loss(terms).backward()
    optimizer.step()

  model.train(what == 'step')
  run = step if what == 'step' else predict
  seconds = []
  warm_up = 3 if 'compiled' in mode else 1
  for _ in range(warm_up + repeats):
    started = time.perf_counter()
    run()
    if device == 'cuda':
      torch.cuda.synchronize()
    seconds.append(time.perf_counter() - started)
  return {
    'frames': len(frames),
    'seconds': seconds[warm_up:],
    'peak_memory': torch.cuda.max_memory_allocated() if device == 'cuda' else process_memory(),
    'peak_memory_of': 'device' if device == 'cuda' else 'process',
    'trained_parameters': sum(parameter.numel() for parameter in trained),
    'parameters': sum(parameter.numel() for parameter in model.parameters()),
    'threads': torch.get_num_threads(),
    'torch': torch.__version__,
    'transformers': importlib.metadata.version('transformers'),
  }

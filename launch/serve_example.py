"""Predicts with an artefact of `aavs export --format stablehlo`; needs jax, flatbuffers and numpy.

  python serve_example.py ARTEFACT FRAMES.npy SOUND.wav OUT.npz

FRAMES.npy: uint8 [n h w 3], RGB, one frame a second, at most ten. SOUND.wav: 16 bit, 16 kHz, mono.
OUT.npz: `mask` and, with stage 2, `classes`, uint8 [n e e].
"""

import json
import sys
import wave
from pathlib import Path

import numpy as np
from jax import export


def read_safetensors(path):
  """Arrays by name: 8 bytes say how long a JSON header is, which says where each of them lies."""
  data = path.read_bytes()
  start = 8 + int.from_bytes(data[:8], 'little')
  header = json.loads(data[8:start])
  header.pop('__metadata__', None)
  dtypes = {'F32': np.float32, 'I32': np.int32}

  def array(dtype, shape, data_offsets):
    count = np.prod(shape, dtype=int)
    return np.frombuffer(data, dtypes[dtype], count, start + data_offsets[0]).reshape(shape)

  return {name: array(**entry) for name, entry in header.items()}


def refuse(text):
  print(text, file=sys.stderr)
  sys.exit(2)


def main(folder, frames, sound, out):
  folder = Path(folder)
  for path in (folder / 'model.json', frames, sound):
    if not Path(path).is_file():
      refuse(f'{path} is not a file: give ARTEFACT FRAMES.npy SOUND.wav OUT.npz')
  if Path(out).is_dir() or not Path(out).absolute().parent.is_dir():
    refuse(f'{out} cannot be written: name a file in a folder that is there')
  model = json.loads((folder / 'model.json').read_text())

  def function(entry):
    return export.deserialize(bytearray((folder / entry['file']).read_bytes())).call

  with wave.open(sound) as file:
    if (file.getnchannels(), file.getsampwidth(), file.getframerate()) != (1, 2, 16000):
      refuse(f'{sound} is not mono, 16 bit and 16 kHz: ffmpeg -i {sound} -ac 1 -ar 16000 OTHER.wav')
    samples = np.frombuffer(file.readframes(file.getnframes()), '<i2').astype(np.float32) / 32768
  arrays = function(model['prepare'])({'frames': np.load(frames), 'samples': samples})
  outputs, count = {}, len(arrays['frames'])
  for _, stage in sorted(model['stages'].items()):  # stage 1 before stage 2
    weights = read_safetensors(folder / stage['weights']['file'])
    inputs = {row['name']: np.asarray(arrays[row['name']]) for row in stage['inputs']}
    if lacking := -count % stage['unit']:  # of frames that it sees together: the last one again
      inputs = {k: np.concatenate([v, v[-1:].repeat(lacking, 0)]) for k, v in inputs.items()}
    outputs |= {name: value[:count] for name, value in function(stage)(weights, inputs).items()}
    arrays['prior'] = outputs.get('mask')
  maps = {name: np.asarray(outputs[name]) for name in ('mask', 'classes') if name in outputs}
  np.savez_compressed(out, **maps)
  for second in range(len(arrays['frames'])):
    line = f'second {second}:'
    if 'mask' in maps:
      line += f' {(maps["mask"][second] >= 128).mean():.1%} of the frame sounds;'
    for i in np.unique(maps['classes'][second]) if 'classes' in maps else ():
      if i:
        line += f' {model["classes"][i]} {(maps["classes"][second] == i).mean():.1%}'
    print(line)


if __name__ == '__main__':
  if len(sys.argv) != 5:
    refuse(__doc__)
  main(*sys.argv[1:])

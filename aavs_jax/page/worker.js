// The models, beside the page, so that it stays quick.
import { logMel, resize } from './inputs.js';
import * as ort from './onnxruntime/ort.wasm.bundle.min.mjs';

ort.env.wasm.numThreads = 1; // so that a server need not send the headers that threads ask for
ort.env.logLevel = 'error'; // it warns of names that it does not need
let model, stages;

async function load() {
  const answer = await fetch('models/model.json');
  if (!answer.ok) throw new Error(`models/model.json: ${answer.statusText}`);
  model = await answer.json();
  stages = {};
  for (const [name, { file }] of Object.entries(model.stages)) {
    stages[name] = await ort.InferenceSession.create(`models/${file}`, { logSeverityLevel: 3 });
  }
  return { model };
}

// frame: ImageData; samples: Float32Array at 16 kHz -> class ids [e e], or 1 for what sounds where
// stage 1 is alone; the example of log-mel; and the milliseconds of each part.
async function answer({ frame, samples }) {
  const clock = [performance.now()];
  const tick = () => clock.push(performance.now());
  const example = logMel(samples);
  const values = { log_mel: new ort.Tensor('float32', example, [1, 96, 64]) };
  const frames = {}; // by size
  const sizeOf = (name) => model.stages[name].inputs.find((i) => i.name === 'frames').shape[1];
  for (const size of Object.keys(stages).map(sizeOf)) {
    frames[size] ??= new ort.Tensor('uint8', resize(frame, size), [1, size, size, 3]);
  }
  tick();
  const run = (name) => {
    values.frames = frames[sizeOf(name)];
    const { inputNames } = stages[name];
    return stages[name].run(Object.fromEntries(inputNames.map((input) => [input, values[input]])));
  };
  let ids;
  if (stages.stage1) {
    ({ mask: values.prior } = await run('stage1'));
    ids = values.prior.data.map((level) => level >= 128);
    tick();
  }
  if (stages.stage2) {
    ids = (await run('stage2')).classes.data;
    tick();
  }
  return { ids, example, times: clock.slice(1).map((time, i) => time - clock[i]) };
}

const tasks = { load, answer };
onmessage = async ({ data: { id, task, ...values } }) => {
  try {
    postMessage({ id, ...(await tasks[task](values)) });
  } catch (error) {
    postMessage({ id, error: error.message ?? String(error) });
  }
};

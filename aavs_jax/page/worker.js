// The models, beside the page, so that it stays quick.
import { logMel, resize } from './inputs.js';
import * as ort from './onnxruntime/ort.wasm.bundle.min.mjs';

ort.env.wasm.numThreads = 1; // so that a server need not send the headers that threads ask for
let model, stages;

async function load() {
  const answer = await fetch('models/model.json');
  if (!answer.ok) throw new Error(`models/model.json: ${answer.statusText}`);
  model = await answer.json();
  stages = {};
  for (const [name, { file }] of Object.entries(model.stages)) {
    stages[name] = await ort.InferenceSession.create(`models/${file}`);
  }
  return { model };
}

async function run(name, values) {
  const session = stages[name];
  return session.run(Object.fromEntries(session.inputNames.map((input) => [input, values[input]])));
}

// frame: ImageData; samples: Float32Array at 16 kHz -> class ids [e e], or 1 for what sounds where
// stage 1 is alone; the example of log-mel; and the milliseconds of each part.
async function answer({ frame, samples }) {
  const marks = [performance.now()];
  const size = model.image_size;
  const example = logMel(samples);
  const values = {
    frames: new ort.Tensor('uint8', resize(frame, size), [1, size, size, 3]),
    log_mel: new ort.Tensor('float32', example, [1, 96, 64]),
  };
  marks.push(performance.now());
  let ids;
  if (stages.stage1) {
    ({ mask: values.prior } = await run('stage1', values));
    ids = values.prior.data.map((level) => level >= 128);
    marks.push(performance.now());
  }
  if (stages.stage2) {
    ids = (await run('stage2', values)).classes.data;
    marks.push(performance.now());
  }
  return { ids, example, times: marks.slice(1).map((mark, i) => mark - marks[i]) };
}

const tasks = { load, answer };
onmessage = async ({ data: { id, task, ...values } }) => {
  try {
    postMessage({ id, ...(await tasks[task](values)) });
  } catch (error) {
    postMessage({ id, error: error.message ?? String(error) });
  }
};

// The page: a video or the camera, second by second to the worker, and what it says drawn.
import { halve } from './inputs.js';

const RATE = 16000;
const WINDOW_SECONDS = 10; // as `aavs predict` cuts videos: sound of a window in examples of 0.96 s
const EXAMPLE = 15360, NEEDED = 15600; // samples from example to example, and of one
const JUST_AFTER = 0.0015; // seconds; time stamps are rounded to milliseconds
const SIDE = 640; // of the canvas, the longer one
const ALPHA = 0.55;
const LARGEST = 2 ** 31 - 1; // bytes of a file that browsers hand out in one piece
const BEFORE = 5; // seconds by which the sound of the camera is shifted
const $ = (id) => document.getElementById(id);
const player = $('player'), reader = $('reader'), marks = $('marks');
const sleep = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));

const worker = new Worker('worker.js', { type: 'module' });
const waiting = new Map();
let asked = 0;
// Asks the worker; what it throws is thrown here.
function ask(task, values = {}, transfer = []) {
  const id = asked++;
  worker.postMessage({ id, task, ...values }, transfer);
  return new Promise((resolve, reject) => waiting.set(id, { resolve, reject }));
}
worker.onmessage = ({ data: { id, error, ...result } }) => {
  const { resolve, reject } = waiting.get(id);
  waiting.delete(id);
  error === undefined ? resolve(result) : reject(new Error(error));
};
worker.onerror = () =>
  fail('The page cannot run its models: the browser is too old, or files are missing.');

const say = (text) => ($('status').textContent = text);
function fail(text) {
  $('error').textContent = text;
  $('error').hidden = false;
  say('');
}

let model, colours;
let source; // { name, url, seconds, samples, answers } of a file, { stream, context } of the camera
const mode = () => document.querySelector('input[name=sound]:checked').value;

async function start() {
  say('Loading the model …');
  try {
    ({ model } = await ask('load'));
  } catch (error) {
    return fail(`The model failed to load: ${error.message}`);
  }
  colours = model.stages.stage2 ? model.colours : [[0, 0, 0], model.sounding_colour];
  if (!model.stages.stage2) model.classes = ['', 'sounds'];
  $('file').disabled = $('camera').disabled = false;
  say('Ready.');
}

function end(old) {
  old?.stream?.getTracks().forEach((track) => track.stop());
  old?.context?.close();
  if (old?.url) URL.revokeObjectURL(old.url);
}

// Ends what went on before; what is still under way sees that it is no more the source.
function begin(next) {
  end(source);
  player.srcObject = null;
  player.removeAttribute('src');
  marks.getContext('2d').clearRect(0, 0, marks.width, marks.height);
  $('error').hidden = $('stage').hidden = true;
  for (const id of ['classes', 'second', 'time', 'parts']) $(id).textContent = '';
  return (source = next);
}

async function openFile(file) {
  if (file.size > LARGEST) {
    begin();
    return fail(
      `${file.name} has more than 2 GB, which browsers cannot read at once: give a part of it.`);
  }
  const mine = begin({ name: file.name, url: URL.createObjectURL(file), answers: new Map() });
  say(`Reading ${file.name} …`);
  player.src = reader.src = mine.url;
  reader.play().catch(() => {}); // or some phones load nothing
  const happened = await new Promise((done) => {
    reader.onloadeddata = reader.onerror = (event) => done(event.type);
  });
  if (mine !== source) return;
  reader.pause();
  if (happened === 'error' || !reader.videoWidth) {
    return fail(`This browser cannot show ${file.name}: give it an MP4 or WebM video.`);
  }
  try {
    const context = new OfflineAudioContext(1, 1, 2 * RATE); // to whose rate it is resampled
    mine.samples = halve(mono(await context.decodeAudioData(await file.arrayBuffer())));
  } catch {
    return fail(`${file.name} has no sound that this browser can read: give a video with sound.`);
  }
  if (mine !== source) return;
  // What a browser has recorded may not tell its length.
  const length = Number.isFinite(reader.duration) ? reader.duration : mine.samples.length / RATE;
  mine.seconds = Math.max(1, Math.round(length));
  layOut(reader.videoWidth, reader.videoHeight);
  $('shift').textContent = mine.seconds < 2
    ? 'One second has no other that could be heard: shifted is true sound.'
    : `Shifted: the sound of ${mine.seconds >> 1} s later.`;
  $('at').max = length;
  $('at').value = 0;
  $('controls').hidden = false;
  await compute();
}

function mono(buffer) {
  const count = buffer.numberOfChannels;
  const channels = Array.from({ length: count }, (_, c) => buffer.getChannelData(c));
  return channels[0].map((_, i) => channels.reduce((sum, channel) => sum + channel[i], 0) / count);
}

// The samples that belong to a second, as `aavs predict` has them.
function soundOf({ samples, seconds }, second) {
  if (mode() === 'silence') return new Float32Array(NEEDED);
  if (mode() === 'shifted') second = (second + (seconds >> 1)) % seconds;
  const within = second % WINDOW_SECONDS;
  const from = (second - within) * RATE + within * EXAMPLE;
  return samples.slice(from, from + NEEDED);
}

async function seek(second) {
  // Another file that takes its place ends the wait as well.
  const happened = new Promise((done) => {
    reader.onseeked = reader.onemptied = reader.onerror = done;
  });
  if (!reader.error) {
    reader.currentTime = Math.min(second + JUST_AFTER, reader.duration);
    await happened;
  }
  return !reader.error;
}

const grabbed = new OffscreenCanvas(1, 1);
function grab(video) {
  grabbed.width = video.videoWidth;
  grabbed.height = video.videoHeight;
  const context = grabbed.getContext('2d', { willReadFrequently: true });
  context.drawImage(video, 0, 0);
  return context.getImageData(0, 0, grabbed.width, grabbed.height);
}

// Answers every second of the file in the present mode, from the one that is shown on.
let computing = false;
async function compute() {
  if (computing) return; // it sees by itself what has changed
  computing = true;
  try {
    for (let second; (second = nextSecond()) !== undefined; ) {
      const mine = source, key = `${mode()} ${second}`;
      const samples = soundOf(mine, second);
      const arrived = await seek(second);
      if (mine !== source) continue;
      if (!arrived) return fail(`${mine.name} is damaged: second ${second} cannot be read.`);
      const frame = grab(reader);
      const answer = await ask('answer', { frame, samples }, [frame.data.buffer]);
      mine.answers.set(key, answer);
      tell(answer.times);
      if (mine === source) showFile();
    }
  } catch (error) {
    fail(`The model failed: ${error.message}`);
  } finally {
    computing = false;
  }
}

const shownSecond = () => Math.min(Math.floor(player.currentTime + JUST_AFTER), source.seconds - 1);

function nextSecond() {
  if (!source.seconds) return undefined;
  const { name, seconds, answers } = source, first = shownSecond();
  const order = Array.from({ length: seconds }, (_, i) => (first + i) % seconds);
  const left = order.filter((second) => !answers.has(`${mode()} ${second}`));
  const done = left.length ? `${seconds - left.length} of ${seconds}` : `all ${seconds}`;
  say(`${name}: ${done} seconds done`);
  return left[0];
}

let shown;
function showFile() {
  if (!source?.seconds) return;
  const second = shownSecond(), answer = source.answers.get(`${mode()} ${second}`);
  player.muted = mode() !== 'true'; // the user hears what the model hears, or nothing
  if (answer === shown) return;
  show(answer, second);
}

async function openCamera() {
  if (!navigator.mediaDevices) {
    return fail('Browsers give the camera to pages of https:// or 127.0.0.1 alone: open it there.');
  }
  const mine = begin({});
  say('Waiting for permission to use camera and microphone …');
  try {
    mine.stream = await navigator.mediaDevices.getUserMedia({
      video: { facingMode: 'environment', width: { ideal: 640 } },
      audio: { echoCancellation: false, noiseSuppression: false, autoGainControl: false },
    });
  } catch (error) {
    if (mine !== source) return;
    return fail(error.name === 'NotAllowedError'
      ? 'Camera and microphone were refused: allow them for this page, and try again.'
      : `No camera with microphone can be used (${error.message}): give a video file.`);
  }
  if (mine !== source) return end(mine);
  try {
    await followCamera(mine);
  } catch (error) {
    if (mine === source) fail(`Camera or model failed: ${error.message}`);
  }
}

async function followCamera(mine) {
  mine.context = new AudioContext();
  await mine.context.audioWorklet.addModule('microphone.js');
  const microphone = new AudioWorkletNode(mine.context, 'microphone', { numberOfOutputs: 0 });
  let heard = [];
  microphone.port.onmessage = ({ data }) => heard.push(data);
  mine.context.createMediaStreamSource(mine.stream).connect(microphone);
  player.srcObject = mine.stream;
  player.muted = true;
  await player.play();
  $('shift').textContent = `Shifted: the sound of ${BEFORE} s before.`;
  $('controls').hidden = true;
  say('Camera and microphone, a second at a time.');
  const past = [];
  let seen;
  for (let second = 0; mine === source; second++) {
    const frame = grab(player);
    const size = `${frame.width} ${frame.height}`;
    if (size !== seen) layOut(frame.width, frame.height); // again when the device is turned
    seen = size;
    heard = [];
    await sleep(1);
    past.push(await at16kHz(heard, mine.context.sampleRate));
    if (past.length > BEFORE + 1) past.shift();
    const silence = new Float32Array(NEEDED);
    const samples = { true: past.at(-1), silence, shifted: past[0] }[mode()];
    const answer = await ask('answer', { frame, samples });
    if (mine !== source) return;
    tell(answer.times);
    show(answer, second, frame);
  }
}

// Pieces of mono sound at any rate to samples at 16 kHz.
async function at16kHz(pieces, rate) {
  const length = pieces.reduce((sum, piece) => sum + piece.length, 0);
  if (!length) return new Float32Array(NEEDED);
  const context = new OfflineAudioContext(1, Math.ceil((2 * length * RATE) / rate), 2 * RATE);
  const buffer = context.createBuffer(1, length, rate);
  let position = 0;
  for (const piece of pieces) {
    buffer.copyToChannel(piece, 0, position);
    position += piece.length;
  }
  const node = new AudioBufferSourceNode(context, { buffer });
  node.connect(context.destination);
  node.start();
  return halve((await context.startRendering()).getChannelData(0));
}

function layOut(width, height) {
  const scale = SIDE / Math.max(width, height);
  marks.width = Math.round(width * scale);
  marks.height = Math.round(height * scale);
  player.style.aspectRatio = `${width} / ${height}`;
  document.querySelector('.picture').style.maxWidth = `${(75 * width) / height}vh`;
  shown = undefined;
  $('stage').hidden = false;
}

// An answer, or undefined while there is none; the frame under it where no video shows that.
function show(answer, second, frame) {
  shown = answer;
  const context = marks.getContext('2d');
  context.clearRect(0, 0, marks.width, marks.height);
  $('second').textContent = second;
  if (!answer) return $('classes').replaceChildren('…');
  if (frame) {
    grabbed.getContext('2d').putImageData(frame, 0, 0);
    context.drawImage(grabbed, 0, 0, marks.width, marks.height);
  }
  context.drawImage(painted(answer.ids), 0, 0);
  legend(answer.ids);
  paintMel(answer.example);
}

// Classes in their colours, with a contour, white inside and black outside, as media/overlay.py.
function painted(ids) {
  const { width, height } = marks, side = model.eval_size;
  const canvas = new OffscreenCanvas(width, height), context = canvas.getContext('2d');
  const image = context.createImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer), alpha = Math.round(255 * ALPHA) << 24;
  const large = new Uint8Array(width * height);
  for (let y = 0, i = 0; y < height; y++) {
    const row = Math.floor(((y + 0.5) * side) / height) * side;
    for (let x = 0; x < width; x++, i++) {
      large[i] = ids[row + Math.floor(((x + 0.5) * side) / width)];
    }
  }
  const inks = colours.map(([r, g, b]) => alpha | (b << 16) | (g << 8) | r);
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) {
      const id = large[i];
      const border = (x && large[i - 1] !== id) || (x < width - 1 && large[i + 1] !== id)
        || (y && large[i - width] !== id) || (y < height - 1 && large[i + width] !== id);
      pixels[i] = border ? (id ? 0xffffffff : 0xff000000) : id ? inks[id] : 0;
    }
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

function legend(ids) {
  const counts = new Map();
  ids.forEach((id) => id && counts.set(id, (counts.get(id) ?? 0) + 1));
  const rows = [...counts].sort((a, b) => b[1] - a[1]).map(([id, count]) => {
    const row = document.createElement('li'), swatch = document.createElement('i');
    swatch.style.background = `rgb(${colours[id]})`;
    row.append(swatch, `${model.classes[id]} (${((100 * count) / ids.length).toFixed(0)} %)`);
    return row;
  });
  $('classes').replaceChildren(...(rows.length ? rows : ['nothing']));
}

function paintMel(example) {
  const context = $('mel').getContext('2d'), image = context.createImageData(96, 64);
  const [quiet, loud] = [Math.log(0.01), 2];
  example.forEach((value, i) => {
    const level = Math.min(1, Math.max(0, (value - quiet) / (loud - quiet)));
    const blue = 0.2 + 0.5 * level - 0.5 * level ** 4;
    const colour = [510 * level, 230 * level ** 1.5, 255 * blue, 255];
    image.data.set(colour, 4 * ((63 - (i % 64)) * 96 + Math.floor(i / 64)));
  });
  context.putImageData(image, 0, 0);
}

const costs = []; // of the last seconds; the median leaves out the first ones, which are slow
function tell(times) {
  costs.push(times);
  if (costs.length > 15) costs.shift();
  const stages = Object.keys(model.stages).map((name) => name.replace('stage', 'stage '));
  const names = ['frame and sound', ...stages];
  const median = (values) => values.sort((a, b) => a - b)[values.length >> 1];
  const parts = names.map((_, part) => median(costs.map((each) => each[part])));
  $('time').textContent = `${parts.reduce((a, b) => a + b).toFixed(0)} ms for a second of video`;
  const told = parts.map((time, i) => `${names[i]} ${time.toFixed(0)}`);
  $('parts').textContent = `(${told.join(', ')})`;
}

$('file').onchange = ({ target }) => {
  if (target.files.length) openFile(target.files[0]);
  target.value = ''; // so that the same file may be chosen again
};
$('camera').onclick = openCamera;
for (const radio of document.querySelectorAll('input[name=sound]')) {
  radio.onchange = () => {
    if (!source?.seconds) return;
    showFile();
    compute();
  };
}
$('play').onclick = () => (player.paused ? player.play() : player.pause());
$('at').oninput = ({ target }) => (player.currentTime = target.value);
let following;
function follow() {
  cancelAnimationFrame(following);
  $('play').textContent = player.paused ? 'Play' : 'Pause';
  $('at').value = player.currentTime;
  showFile();
  if (!player.paused) following = requestAnimationFrame(follow);
}
player.onplay = player.onpause = player.onseeked = follow;
start();

// Frame and sound as the models were trained on them.

// Log-mel, as input_pipeline/audio.py has it.
const RATE = 16000, STEPS = 96, BANDS = 64, WINDOW = 400, HOP = 160, FFT = 512, OFFSET = 0.01;
const RANGE = [125, 7500];
const mel = (hertz) => 1127 * Math.log1p(hertz / 700);
const hann = Float64Array.from({ length: WINDOW }, (_, n) => 0.5 - 0.5 * Math.cos((2 * Math.PI * n) / WINDOW));

// For each band [first bin, weights]: triangles that are linear in mel; the DC bin is left out.
const filters = Array.from({ length: BANDS }, (_, band) => {
  const [low, high] = RANGE.map(mel);
  const edge = (i) => low + ((high - low) * i) / (BANDS + 1);
  const [left, centre, right] = [edge(band), edge(band + 1), edge(band + 2)];
  const weights = Array.from({ length: FFT / 2 + 1 }, (_, bin) => {
    const x = mel((bin * RATE) / FFT);
    return bin && Math.max(0, Math.min((x - left) / (centre - left), (right - x) / (right - centre)));
  });
  const first = Math.max(0, weights.findIndex((weight) => weight > 0));
  return [first, weights.slice(first, weights.findLastIndex((weight) => weight > 0) + 1)];
});

// In place, of a power of two samples.
function fft(re, im) {
  const n = re.length;
  for (let i = 1, j = 0; i < n; i++) {
    let bit = n >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) {
      [re[i], re[j]] = [re[j], re[i]];
      [im[i], im[j]] = [im[j], im[i]];
    }
  }
  for (let half = 1; half < n; half *= 2) {
    for (let k = 0; k < half; k++) {
      const c = Math.cos((Math.PI * k) / half), s = -Math.sin((Math.PI * k) / half);
      for (let i = k; i < n; i += 2 * half) {
        const j = i + half;
        const x = re[j] * c - im[j] * s, y = re[j] * s + im[j] * c;
        re[j] = re[i] - x;
        im[j] = im[i] - y;
        re[i] += x;
        im[i] += y;
      }
    }
  }
}

// The example [96 64] of the first 15600 of these samples at 16 kHz; what is lacking is silent.
export function logMel(samples) {
  const example = new Float32Array(STEPS * BANDS);
  const re = new Float64Array(FFT), im = new Float64Array(FFT), magnitude = new Float64Array(FFT / 2 + 1);
  for (let t = 0; t < STEPS; t++) {
    re.fill(0);
    im.fill(0);
    for (let n = 0; n < WINDOW; n++) re[n] = (samples[t * HOP + n] ?? 0) * hann[n];
    fft(re, im);
    magnitude.forEach((_, bin) => (magnitude[bin] = Math.hypot(re[bin], im[bin])));
    filters.forEach(([first, weights], band) => {
      const sum = weights.reduce((total, weight, i) => total + weight * magnitude[first + i], 0);
      example[t * BANDS + band] = Math.log(sum + OFFSET);
    });
  }
  return example;
}

// Pillow's bilinear filter with antialias, in its fixed-point numbers, so equal to the last bit.
const BITS = 22;
function coefficients(from, to) {
  const scale = from / to, wide = Math.max(scale, 1);
  return Array.from({ length: to }, (_, i) => {
    const centre = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - wide + 0.5));
    const end = Math.min(from, Math.trunc(centre + wide + 0.5));
    const weights = [];
    for (let x = first; x < end; x++) weights.push(Math.max(0, 1 - Math.abs((x - centre + 0.5) * (1 / wide))));
    const sum = weights.reduce((a, b) => a + b);
    return [first, weights.map((weight) => Math.trunc(0.5 + (weight / sum) * 2 ** BITS))];
  });
}

// Along one axis; `step` is from value to value along it, `starts` where each line of it begins.
function resizeAxis(source, target, rows, starts, sourceStep, targetStarts, targetStep) {
  starts.forEach((start, line) => {
    rows.forEach(([first, weights], i) => {
      let sum = 2 ** (BITS - 1);
      for (let k = 0; k < weights.length; k++) sum += source[start + (first + k) * sourceStep] * weights[k];
      target[targetStarts[line] + i * targetStep] = sum >> BITS; // Uint8Clamped
    });
  });
}

// RGBA [height width 4] to RGB [size size 3].
export function resize({ data, width, height }, size) {
  const wide = new Uint8ClampedArray(height * size * 3), out = new Uint8ClampedArray(size * size * 3);
  const each = (count, of) => Array.from({ length: count * 3 }, (_, i) => of(Math.trunc(i / 3), i % 3));
  resizeAxis(data, wide, coefficients(width, size), each(height, (y, c) => y * width * 4 + c), 4,
    each(height, (y, c) => y * size * 3 + c), 3);
  resizeAxis(wide, out, coefficients(height, size), each(size, (x, c) => x * 3 + c), size * 3,
    each(size, (x, c) => x * 3 + c), size * 3);
  return new Uint8Array(out.buffer);
}

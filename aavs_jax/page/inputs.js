// Frame and sound as the models were trained on them.

// Log-mel, as input_pipeline/audio.py has it.
const RATE = 16000, STEPS = 96, BANDS = 64, WINDOW = 400, HOP = 160, FFT = 512, OFFSET = 0.01;
const BINS = FFT / 2 + 1;
const mel = (hertz) => 1127 * Math.log1p(hertz / 700);
const [LOW, HIGH] = [125, 7500].map(mel);
const turn = (2 * Math.PI) / WINDOW;
const hann = Float64Array.from({ length: WINDOW }, (_, n) => 0.5 - 0.5 * Math.cos(turn * n));

// For each band [first bin, weights]: triangles that are linear in mel; the DC bin is left out.
const filters = Array.from({ length: BANDS }, (_, band) => {
  const edge = (i) => LOW + ((HIGH - LOW) * (band + i)) / (BANDS + 1);
  const [left, centre, right] = [0, 1, 2].map(edge);
  const weights = Array.from({ length: BINS }, (_, bin) => {
    const x = mel((bin * RATE) / FFT);
    const rise = (x - left) / (centre - left), fall = (right - x) / (right - centre);
    return bin && Math.max(0, Math.min(rise, fall));
  });
  const first = weights.findIndex((weight) => weight > 0);
  return [first, weights.slice(first).filter((weight) => weight > 0)];
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
      for (let i = k, j = k + half; i < n; i += 2 * half, j += 2 * half) {
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
  const [re, im, magnitudes] = [FFT, FFT, BINS].map((length) => new Float64Array(length));
  for (let t = 0; t < STEPS; t++) {
    re.fill(0);
    im.fill(0);
    for (let n = 0; n < WINDOW; n++) re[n] = (samples[t * HOP + n] ?? 0) * hann[n];
    fft(re, im);
    for (let bin = 0; bin < BINS; bin++) magnitudes[bin] = Math.hypot(re[bin], im[bin]);
    filters.forEach(([first, weights], band) => {
      const sum = weights.reduce((total, weight, i) => total + weight * magnitudes[first + i], 0);
      example[t * BANDS + band] = Math.log(sum + OFFSET);
    });
  }
  return example;
}

// Mono sound at 32 kHz to 16 kHz. A browser that is asked for 16 kHz takes from what is above 6 kHz,
// which the upper bands hear. This half-band filter, a sinc in a Blackman window, leaves it to 7.5.
const HALF = 95;
const taps = Array.from({ length: (HALF + 1) / 2 }, (_, i) => {
  const k = 2 * i + 1, x = (Math.PI * k) / (HALF + 1);
  const blackman = 0.42 + 0.5 * Math.cos(x) + 0.08 * Math.cos(2 * x);
  return (Math.sin((Math.PI * k) / 2) / (Math.PI * k)) * blackman;
});
export function halve(samples) {
  return Float32Array.from({ length: Math.ceil(samples.length / 2) }, (_, i) => {
    let sum = samples[2 * i] / 2;
    for (let t = 0, k = 1; t < taps.length; t++, k += 2) {
      sum += taps[t] * ((samples[2 * i - k] ?? 0) + (samples[2 * i + k] ?? 0));
    }
    return sum;
  });
}

// Pillow's bilinear filter with antialias, in its fixed-point numbers, so equal to the last bit.
const BITS = 22;
function coefficients(from, to) {
  const scale = from / to, wide = Math.max(scale, 1), narrow = 1 / wide;
  return Array.from({ length: to }, (_, i) => {
    const centre = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - wide + 0.5));
    const end = Math.min(from, Math.trunc(centre + wide + 0.5));
    const weights = Array.from({ length: end - first }, (_, k) =>
      Math.max(0, 1 - Math.abs((first + k - centre + 0.5) * narrow)));
    const sum = weights.reduce((a, b) => a + b);
    return [first, Int32Array.from(weights, (weight) => 0.5 + (weight / sum) * 2 ** BITS)];
  });
}

// The rows of [height width channels] resized, as columns: [size height 3].
function resizeRows(source, height, width, channels, size) {
  const out = new Uint8Array(size * height * 3);
  coefficients(width, size).forEach(([first, weights], i) => {
    for (let y = 0; y < height; y++) {
      for (let c = 0; c < 3; c++) {
        let sum = 1 << (BITS - 1);
        const place = (y * width + first) * channels + c;
        for (let k = 0; k < weights.length; k++) sum += source[place + k * channels] * weights[k];
        out[(i * height + y) * 3 + c] = sum >> BITS;
      }
    }
  });
  return out;
}

// ImageData to RGB [size size 3].
export function resize({ data, width, height }, size) {
  return resizeRows(resizeRows(data, height, width, 4, size), size, height, 3, size);
}

// The embedded Stable Diffusion in a browser: noise, prompts, DDIM and guidance in JavaScript; its
// three networks run in ONNX Runtime. Twin of cf_guidance.pipelines and cf_guidance.lab.export.

import { apg, cfg, fullNorm, rescale, tNorm } from './rule_math.js';
import { familyWeights } from './schedule_design.js';
import { inInterval } from './schedule_math.js';

// ---------------------------------------------------------------------------- noise

// The Mersenne twister of torch.Generator: a function that returns 32 random bits.
function mersenne(seed) {
  const state = new Uint32Array(624);
  state[0] = seed;
  for (let i = 1; i < 624; i++) {
    const last = state[i - 1] ^ (state[i - 1] >>> 30);
    state[i] = Math.imul(1812433253, last) + i;
  }
  let at = 624;
  const twist = () => {
    for (let i = 0; i < 624; i++) {
      const y = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7fffffff);
      state[i] = state[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
    }
    at = 0;
  };
  return () => {
    if (at === 624) twist();
    let y = state[at++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  };
}

// torch.randn of `count` numbers, a multiple of 16.
function randn(seed, count) {
  const next = mersenne(seed);
  const out = Float32Array.from({ length: count }, () => (next() & 0xffffff) / 2 ** 24);
  for (let i = 0; i < count; i += 16) {
    for (let j = i; j < i + 8; j++) {
      const radius = Math.sqrt(-2 * Math.log(1 - out[j]));
      const turn = 2 * Math.PI * out[j + 8];
      out[j] = radius * Math.cos(turn);
      out[j + 8] = radius * Math.sin(turn);
    }
  }
  return out;
}

// The noise of one picture: the stream that cf_guidance.noise gives to the first sample of a seed.
export function noise(seed, count) {
  const next = mersenne(seed);
  next();
  return randn(next(), count);
}

// ---------------------------------------------------------------------------- prompts

// The tokens of a prompt, and the words that the model does not know (they are left out).
export function tokenize(table, prompt) {
  const words = prompt.toLowerCase().split(/\s+/).filter(Boolean);
  const known = words.filter((word) => Object.hasOwn(table.words, word));
  const ids = known.flatMap((word) => table.words[word]).slice(0, table.length - 2);
  const tokens = new Int32Array(table.length).fill(table.pad);
  tokens.set([table.begin, ...ids, table.end]);
  return { tokens, unknown: words.filter((word) => !known.includes(word)) };
}

// ---------------------------------------------------------------------------- steps

// The steps of DDIM: { time, alpha, next, sigma }, where alpha and next are shares of the image's
// variance before and after the step, and sigma is the noise level.
export function ddimSteps({ alphas_cumprod, final_alpha_cumprod, steps_offset }, n) {
  const stride = Math.floor(alphas_cumprod.length / n);
  return Array.from({ length: n }, (_, i) => {
    const time = (n - 1 - i) * stride + steps_offset;
    const alpha = alphas_cumprod[time];
    const next = time < stride ? final_alpha_cumprod : alphas_cumprod[time - stride];
    return { time, alpha, next, sigma: Math.sqrt((1 - alpha) / alpha) };
  });
}

// Rules by name. `norm`: w is a share of a length, usually 0.1 to 0.3.
export const RULES = {
  cfg: { title: 'CFG' },
  t_norm: { title: 'T-Norm', norm: true },
  full_norm: { title: 'Full-Norm', norm: true },
  rescale: { title: 'CFG, rescaled' },
  apg: { title: 'APG' },
};

// The settings of schedule_design.js. Every family has one main weight, called w here: its w, its
// max_val, or what the shares of `curve` multiply.
export function scheduleSettings(s, n = s.steps, w = s.w) {
  const points = s.curve.map(([tau, share]) => [tau, share * w]);
  const warmup = Math.round((s.num_warmup_steps * n) / s.steps);
  return { ...s, num_steps: n, num_warmup_steps: warmup, w, max_val: w, points };
}

// The weight at each of n steps.
export function weights(s, n, w) {
  return familyWeights(scheduleSettings(s, n, w));
}

// Which predictions a rule needs at a weight.
function needs(rule, w, guided) {
  if (!guided) return { pos: true, neg: false };
  if (RULES[rule].norm) return { pos: w !== 0, neg: true };
  const onlyNegative = rule === 'cfg' && w === 0;
  return { pos: !onlyNegative, neg: w !== 1 };
}

// The guided prediction of the noise. `x` is the state, in units where its variance is 1.
function combine(rule, { pos, neg }, w, x, { alpha }, memory) {
  if (!neg) return pos;
  if (!pos) return neg;
  if (rule === 'cfg') return cfg(neg, pos, w);
  if (rule === 't_norm') return tNorm(neg, pos, w);
  if (rule === 'full_norm') return fullNorm(neg, pos, w);
  const [signal, level] = [Math.sqrt(alpha), Math.sqrt(1 - alpha)];
  if (rule === 'apg') return apgNoise(neg, pos, w, x, signal, level, memory);
  // the velocity: v = signal * eps - level * image, so eps = signal * v + level * x
  const velocity = (eps) => eps.map((e, i) => (e - level * x[i]) / signal);
  const v = rescale(cfg(velocity(neg), velocity(pos), w), velocity(pos));
  return v.map((o, i) => signal * o + level * x[i]);
}

// APG compares images: x = signal * image + level * eps.
function apgNoise(neg, pos, w, x, signal, level, memory) {
  const image = (eps) => eps.map((e, i) => (x[i] - level * e) / signal);
  const [guided, state] = apg(image(neg), image(pos), w, memory.state);
  memory.state = state;
  return guided.map((v, i) => (x[i] - signal * v) / level);
}

function ddimMove(x, eps, { alpha, next }) {
  const [signal, level] = [Math.sqrt(alpha), Math.sqrt(1 - alpha)];
  const [signalAfter, levelAfter] = [Math.sqrt(next), Math.sqrt(1 - next)];
  return x.map((v, i) => signalAfter * ((v - level * eps[i]) / signal) + levelAfter * eps[i]);
}

// ---------------------------------------------------------------------------- the model

const SIZE_OF_PROGRESS = 65536;
const GPU_TOLERANCE = 1e-3; // of one prediction; latents after 20 steps then agree to 1e-2

async function download(url, fingerprint, onBytes) {
  const cache = await globalThis.caches?.open('cf_guidance').catch(() => null);
  const key = `${url}?${fingerprint}`;
  const kept = await cache?.match(key);
  const response = kept ?? (await fetch(key));
  if (!response.ok) throw new Error(`${url}: ${response.status}`);
  if (cache && !kept) await cache.put(key, response.clone());
  const parts = [];
  const reader = response.body.getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    parts.push(part.value);
    onBytes(part.value.length);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

// Load the networks. `base` is the folder with `ort/` and `model/`; `onProgress(done, all)` counts
// bytes.
export async function loadEngine(base, onProgress = () => {}) {
  const about = await (await fetch(new URL('model/model.json', base))).json();
  const ort = await loadRuntime(base, 'ort.wasm.min.mjs');
  ort.env.wasm.proxy = true; // the networks run in a worker, and the page stays responsive
  const files = Object.entries(about.files);
  const all = files.reduce((sum, [, { bytes }]) => sum + bytes, 0);
  let [done, shown] = [0, 0];
  const onBytes = (n) => {
    done += n;
    if (done - shown < SIZE_OF_PROGRESS && done < all) return;
    shown = done;
    onProgress(done, all);
  };
  const networks = {};
  for (const [name, { sha256 }] of files) {
    const data = await download(new URL(`model/${name}`, base), sha256, onBytes);
    networks[name.replace('.onnx', '')] = await makeNetwork(ort, data, 'wasm');
  }
  return makeEngine(base, about, networks);
}

async function loadRuntime(base, name) {
  const ort = await import(new URL(`ort/${name}`, base));
  ort.env.wasm.numThreads = 1; // more need headers that a static site cannot send
  return ort;
}

// A function of inputs by name, each [type, data, dims], that returns the network's output.
async function makeNetwork(ort, data, provider) {
  const options = { executionProviders: [provider], logSeverityLevel: 3 };
  const session = await ort.InferenceSession.create(data, options);
  return async (inputs) => {
    const tensors = Object.entries(inputs).map(([name, o]) => [name, new ort.Tensor(...o)]);
    return (await session.run(Object.fromEntries(tensors))).out;
  };
}

// ---------------------------------------------------------------------------- the GPU

// Is there a GPU, and can WebAssembly wait for it? `software`: an imitation counts, too.
async function hasGpu(software) {
  if (!globalThis.navigator?.gpu || !('Suspending' in WebAssembly)) return false;
  const adapter = await navigator.gpu.requestAdapter();
  const isSoftware = adapter?.info?.isFallbackAdapter ?? adapter?.isFallbackAdapter;
  return Boolean(adapter) && (software || !isSoftware);
}

// The U-Net on the GPU, if it predicts what `unet` predicts and is faster; else null.
async function gpuUnet(base, about, unet, software) {
  if (!(await hasGpu(software))) return null;
  const ort = await loadRuntime(base, 'ort.jspi.min.mjs');
  const url = new URL('model/unet.onnx', base);
  const data = await download(url, about.files['unet.onnx'].sha256, () => {});
  const found = await makeNetwork(ort, data, 'webgpu');
  const rows = software ? 2 : 20; // of one step: one picture, or the ten of the strip
  const cpu = await tryNetwork(unet, about, rows);
  const gpu = await tryNetwork(found, about, rows);
  const apart = Math.max(...cpu.out.map((v, i) => Math.abs(v - gpu.out[i])));
  const isSame = apart < GPU_TOLERANCE; // false for NaN
  return isSame && (software || gpu.time < cpu.time) ? found : null;
}

// Predictions for some rows, and the milliseconds they take once warm.
async function tryNetwork(unet, about, rows) {
  const wave = (...dims) => {
    const length = dims.reduce((p, q) => p * q);
    return ['float32', Float32Array.from({ length }, (_, i) => Math.sin(i)), dims];
  };
  const inputs = () => ({
    latents: wave(rows, ...about.latents),
    time: ['float32', new Float32Array(rows).fill(500), [rows]],
    text: wave(rows, ...about.text),
  });
  await unet(inputs());
  const begin = performance.now();
  const out = await unet(inputs());
  return { out: out.data, time: performance.now() - begin };
}

// Let the page handle its events.
function breathe() {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => resolve();
    port2.postMessage(null);
  });
}

function makeEngine(base, about, networks) {
  const [channels, height, width] = about.latents;
  const size = channels * height * width;
  const texts = new Map();

  const engine = { about, sample, decode, useGpu, isOnGpu: false };
  engine.unknownWords = (text) => tokenize(about.tokens, text).unknown;

  // Move the U-Net to the GPU where there is one that is as exact and faster. Resolves to whether
  // it did; a GPU that fails later is given up.
  async function useGpu({ software = false } = {}) {
    const { unet } = networks;
    const found = await gpuUnet(base, about, unet, software).catch(() => null);
    if (!found) return false;
    engine.isOnGpu = true;
    networks.unet = (inputs) =>
      found(inputs).catch(() => {
        networks.unet = unet;
        engine.isOnGpu = false;
        return unet(inputs);
      });
    return true;
  }

  async function encode(prompt) {
    if (!texts.has(prompt)) {
      const { tokens } = tokenize(about.tokens, prompt);
      const input = ['int32', tokens, [1, tokens.length]];
      texts.set(prompt, await networks.text_encoder({ tokens: input }));
    }
    return texts.get(prompt);
  }

  // Predictions of the noise for `rows`: [{ x, text }, ...], all at one time, in one forward.
  async function predict(rows, time) {
    const [, length, depth] = rows[0].text.dims;
    const latents = new Float32Array(rows.length * size);
    const text = new Float32Array(rows.length * length * depth);
    rows.forEach((row, i) => {
      latents.set(row.x, i * size);
      text.set(row.text.data, i * length * depth);
    });
    const times = new Float32Array(rows.length).fill(time);
    const out = await networks.unet({
      latents: ['float32', latents, [rows.length, channels, height, width]],
      time: ['float32', times, [rows.length]],
      text: ['float32', text, [rows.length, length, depth]],
    });
    return rows.map((_, i) => out.data.slice(i * size, (i + 1) * size));
  }

  // One step of several pictures that share their prompts. Counts network evaluations.
  async function step(pictures, settings, prompts, at, i) {
    const { interval, rule } = settings;
    const guided = !interval || inInterval(at.sigma, ...interval);
    const asked = pictures.map(({ ws }) => needs(rule, ws[i], guided));
    const rows = [];
    pictures.forEach(({ x }, k) => {
      for (const side of ['pos', 'neg']) if (asked[k][side]) rows.push({ k, side, x });
    });
    const out = await predict(
      rows.map(({ x, side }) => ({ x, text: prompts[side] })),
      at.time,
    );
    const found = pictures.map(() => ({}));
    rows.forEach(({ k, side }, j) => (found[k][side] = out[j]));
    pictures.forEach((o, k) => {
      const eps = combine(rule, found[k], o.ws[i], o.x, at, o.memory);
      o.x = ddimMove(o.x, eps, at);
    });
    return rows.length;
  }

  // Latents for each list of weights in `lists`, all from one seed. Returns null when
  // `cancelled()` turns true on the way.
  async function sample(settings, lists, { cancelled = () => false, onStep = () => {} } = {}) {
    const n = lists[0].length;
    const prompts = { pos: await encode(settings.prompt), neg: await encode(settings.negative) };
    const start = noise(settings.seed, size);
    const pictures = lists.map((ws) => ({ ws, x: start, memory: { state: null } }));
    let evaluations = 0;
    for (const [i, at] of ddimSteps(about.scheduler, n).entries()) {
      evaluations += await step(pictures, settings, prompts, at, i);
      onStep(i + 1, n);
      await breathe();
      if (cancelled()) return null;
    }
    return { latents: pictures.map(({ x }) => x), evaluations };
  }

  // Pictures as ImageData.
  async function decode(latents) {
    const all = new Float32Array(latents.length * size);
    latents.forEach((x, i) => all.set(x, i * size));
    const dims = [latents.length, channels, height, width];
    const out = await networks.vae_decoder({ latents: ['float32', all, dims] });
    const [, , rows, columns] = out.dims;
    return latents.map((_, i) => toImage(out.data, i, rows, columns));
  }

  return engine;
}

function toImage(data, i, rows, columns) {
  const image = new ImageData(columns, rows);
  const plane = rows * columns;
  for (let p = 0; p < plane; p++) {
    for (let c = 0; c < 3; c++) {
      image.data[4 * p + c] = Math.round(255 * data[(3 * i + c) * plane + p]);
    }
    image.data[4 * p + 3] = 255;
  }
  return image;
}

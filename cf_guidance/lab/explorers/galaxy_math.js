// The Gaussian mixture of cf_guidance.toy in two dimensions, and samplers of cf_guidance.karras.
// Points are stored as x0, y0, x1, y1, ... in a Float64Array. Every number equals Python's.

import { adg, apg, baseNorm, fullNorm, tNorm } from './rule_math.js';

export const SIGMA_MIN = 0.01;
export const SIGMA_MAX = 10;

// The components of cf_guidance.toy.galaxy: means, covariances (xx, xy, yy) and classes.
export function galaxy({ arms = 3, knots = 10, turn = 2, blur = 0 } = {}) {
  const n = arms * knots,
    mean = new Float64Array(2 * n),
    cov = new Float64Array(3 * n);
  const mix = { n, arms, mean, cov, label: new Int32Array(n) };
  for (let a = 0, i = 0; a < arms; a++) {
    for (let k = 0; k < knots; k++, i++) {
      const t = k / (knots - 1),
        r = 0.2 + 1.4 * t,
        angle = (2 * Math.PI * a) / arms + turn * t;
      const c = Math.cos(angle),
        s = Math.sin(angle);
      // along the arm, and across it: the derivative of r exp(i angle), and its normal
      const ax = (1.4 * c - turn * r * s) / (knots - 1);
      const ay = (1.4 * s + turn * r * c) / (knots - 1);
      const across = (0.04 + 0.05 * t) / Math.hypot(ax, ay);
      const ux = 0.6 * ax,
        uy = 0.6 * ay,
        vx = -ay * across,
        vy = ax * across;
      mean.set([r * c, r * s], 2 * i);
      const xx = ux * ux + vx * vx,
        xy = ux * uy + vx * vy,
        yy = uy * uy + vy * vy;
      cov.set([xx + blur * blur, xy, yy + blur * blur], 3 * i);
      mix.label[i] = a;
    }
  }
  return mix;
}

// The mixture at one noise level for one class (-1: all): means, precisions and constants.
export function atLevel(mix, sigma, label = -1) {
  const chosen = [];
  for (let i = 0; i < mix.n; i++) if (label < 0 || mix.label[i] === label) chosen.push(i);
  const n = chosen.length,
    v = sigma * sigma;
  const level = { n, v, data: new Float64Array(6 * n), logit: new Float64Array(n) };
  chosen.forEach((i, j) => {
    const xx = mix.cov[3 * i] + v,
      xy = mix.cov[3 * i + 1],
      yy = mix.cov[3 * i + 2] + v;
    const det = xx * yy - xy * xy;
    const log = -Math.log(n) - Math.log(2 * Math.PI) - Math.log(det) / 2;
    const [x, y] = mix.mean.subarray(2 * i, 2 * i + 2);
    level.data.set([x, y, yy / det, -xy / det, xx / det, log], 6 * j);
  });
  return level;
}

// Logarithm of weight times density of each component at a point, and the largest of them.
function compare({ n, data, logit }, px, py) {
  let top = -Infinity;
  for (let j = 0, o = 0; j < n; j++, o += 6) {
    const dx = px - data[o],
      dy = py - data[o + 1];
    const square = data[o + 2] * dx * dx + 2 * data[o + 3] * dx * dy + data[o + 4] * dy * dy;
    const l = data[o + 5] - square / 2;
    logit[j] = l;
    if (l > top) top = l;
  }
  return top;
}

export function logDensity(level, points, out = new Float64Array(points.length / 2)) {
  for (let i = 0; i < out.length; i++) {
    const top = compare(level, points[2 * i], points[2 * i + 1]);
    let sum = 0;
    for (let j = 0; j < level.n; j++) sum += Math.exp(level.logit[j] - top);
    out[i] = top + Math.log(sum);
  }
  return out;
}

// The best estimate of the data: x + sigma^2 * score (Tweedie's formula).
export function denoise(level, points, out = new Float64Array(points.length)) {
  const { n, v, data, logit } = level;
  for (let i = 0; i < points.length; i += 2) {
    const px = points[i],
      py = points[i + 1],
      top = compare(level, px, py);
    let sum = 0,
      sx = 0,
      sy = 0;
    for (let j = 0, o = 0; j < n; j++, o += 6) {
      const gap = logit[j] - top;
      if (gap < -40) continue; // less than 1e-17 of the largest
      const p = Math.exp(gap),
        dx = px - data[o],
        dy = py - data[o + 1];
      sum += p;
      sx += p * (data[o + 2] * dx + data[o + 3] * dy);
      sy += p * (data[o + 3] * dx + data[o + 4] * dy);
    }
    out[i] = px - (v * sx) / sum;
    out[i + 1] = py - (v * sy) / sum;
  }
  return out;
}

// Noise levels of Karras et al. in float32, as get_sigmas_karras gives them.
export function karrasSigmas(n, lo = SIGMA_MIN, hi = SIGMA_MAX, rho = 7) {
  const sigmas = [],
    a = hi ** (1 / rho),
    b = lo ** (1 / rho);
  for (let i = 0; i < n; i++) {
    const share = n > 1 ? i / (n - 1) : 0;
    sigmas.push(Math.fround((a + share * (b - a)) ** rho));
  }
  return [...sigmas, 0];
}

// How a rule is called, as in cf_guidance.transforms: its space, and the weights at which the
// result is exactly the positive or the negative.
export const RULES = {
  cfg: { title: 'CFG', space: 'any', posAt: 1, negAt: 0 },
  base_norm: { title: 'Base-Norm', space: 'eps', negAt: 0, f: baseNorm },
  t_norm: { title: 'T-Norm', space: 'eps', negAt: 0, f: tNorm },
  full_norm: { title: 'Full-Norm', space: 'eps', negAt: 0, f: fullNorm },
  apg: { title: 'APG', space: 'x0', posAt: 1, f: apg, stateful: true },
  adg: { title: 'ADG', space: 'x0', posAt: 1, f: adg },
};

// A guided denoiser D(points, sigma), as GuidedDenoiser(stars, negative, w=, rule=, interval=).
// Settings: label, negative ('all', 'other' or 'blurred'), other, blur, rule, w, interval.
export function guided(settings) {
  const { label = 0, negative = 'all', other = 1, blur = 0.15, w = 1, interval = null } = settings;
  const rule = RULES[settings.rule ?? 'cfg'];
  const stars = galaxy(),
    weak = negative === 'blurred' ? galaxy({ blur }) : stars;
  const negLabel = { all: -1, other, blurred: label }[negative];
  const states = [];
  function D(points, sigma) {
    const [lo, hi] = interval ?? [0, Infinity];
    const inside = sigma > lo * (1 + 1e-4) && sigma <= hi * (1 + 1e-4);
    const on = inside && w !== rule.posAt && (rule.space !== 'eps' || sigma <= SIGMA_MAX);
    if (on && w === rule.negAt) {
      D.evaluations += negative === 'blurred' ? 2 : 1;
      return denoise(atLevel(weak, sigma, negLabel), points);
    }
    const pos = denoise(atLevel(stars, sigma, label), points);
    D.evaluations += on ? 2 : 1;
    if (!on) return pos;
    const neg = denoise(atLevel(weak, sigma, negLabel), points);
    if (!rule.f) return lerp(neg, pos, w);
    return combine(rule, neg, pos, w, points, sigma, states);
  }
  D.evaluations = 0;
  return D;
}

// A rule for each point, in the space that it declares.
function combine(rule, neg, pos, w, points, sigma, states) {
  const out = new Float64Array(points.length),
    eps = rule.space === 'eps';
  const [a, b] = [new Float64Array(2), new Float64Array(2)];
  for (let i = 0; i < points.length; i += 2) {
    for (let k = 0; k < 2; k++) {
      a[k] = eps ? (points[i + k] - neg[i + k]) / sigma : neg[i + k];
      b[k] = eps ? (points[i + k] - pos[i + k]) / sigma : pos[i + k];
    }
    let pred;
    if (rule.stateful) [pred, states[i]] = rule.f(a, b, w, states[i] ?? null);
    else pred = rule.f(a, b, w);
    for (let k = 0; k < 2; k++) out[i + k] = eps ? points[i + k] - sigma * pred[k] : pred[k];
  }
  return out;
}

function lerp(a, b, share) {
  const out = new Float64Array(a.length);
  for (let i = 0; i < a.length; i++) out[i] = a[i] + share * (b[i] - a[i]);
  return out;
}

// The steps of cf_guidance.karras. `state` is an object that lasts for a run.
export const SAMPLERS = {
  euler: { title: 'Euler', step: (D, x, s, next) => lerp(D(x, s), x, next / s) },
  heun: {
    title: 'Heun',
    step(D, x, s, next) {
      const x0 = D(x, s),
        end = lerp(x0, x, next / s);
      if (next === 0) return end;
      const second = D(end, next),
        half = (next - s) / 2;
      return end.map((v, i) => x[i] + half * ((x[i] - x0[i]) / s + (v - second[i]) / next));
    },
  },
  dpmpp_2m: {
    title: 'DPM-Solver++(2M)',
    step(D, x, s, next, state) {
      const own = D(x, s);
      let x0 = own;
      if (state.old && next > 0) {
        x0 = lerp(state.old, own, 1 + Math.log(s / next) / Math.log(state.before / s) / 2);
      }
      state.old = own;
      state.before = s;
      return lerp(x0, x, next / s);
    },
  },
  euler_ancestral: {
    title: 'Euler ancestral',
    step(D, x, s, next, state) {
      const up = Math.min(next, (next * Math.sqrt(s * s - next * next)) / s);
      const out = lerp(D(x, s), x, Math.sqrt(next * next - up * up) / s);
      if (up === 0) return out;
      const z = state.noise(x.length);
      return out.map((v, i) => v + up * z[i]);
    },
  },
};

// Run a sampler from points with noise SIGMA_MAX. `path` holds the points before each step and at
// the end; `noise(n)` gives n normal numbers to samplers that draw.
export function sample(settings, points, noise = null) {
  const D = guided(settings),
    state = { noise };
  const sigmas = karrasSigmas(settings.steps),
    { step } = SAMPLERS[settings.sampler ?? 'heun'];
  const path = [points];
  for (let i = 0; i + 1 < sigmas.length; i++) {
    points = step(D, points, sigmas[i], sigmas[i + 1], state);
    path.push(points);
  }
  return { path, sigmas, evaluations: D.evaluations };
}

// Normal random numbers from a seed (mulberry32 and Box-Muller).
export function normals(seed) {
  let a = seed >>> 0,
    spare = null;
  function uniform() {
    a = (a + 0x6d2b79f5) >>> 0;
    let t = Math.imul(a ^ (a >>> 15), a | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  }
  function normal() {
    if (spare !== null) {
      const v = spare;
      spare = null;
      return v;
    }
    const r = Math.sqrt(-2 * Math.log(1 - uniform())),
      angle = 2 * Math.PI * uniform();
    spare = r * Math.sin(angle);
    return r * Math.cos(angle);
  }
  return { uniform, fill: (n) => Float64Array.from({ length: n }, normal) };
}

// Samples of the data of one class.
export function trueSamples(mix, label, n, random) {
  const chosen = [];
  for (let i = 0; i < mix.n; i++) if (label < 0 || mix.label[i] === label) chosen.push(i);
  const out = random.fill(2 * n);
  for (let i = 0; i < 2 * n; i += 2) {
    const k = chosen[Math.floor(random.uniform() * chosen.length)];
    const xx = Math.sqrt(mix.cov[3 * k]),
      xy = mix.cov[3 * k + 1] / xx;
    const yy = Math.sqrt(mix.cov[3 * k + 2] - xy * xy),
      [u, v] = [out[i], out[i + 1]];
    out[i] = mix.mean[2 * k] + xx * u;
    out[i + 1] = mix.mean[2 * k + 1] + xy * u + yy * v;
  }
  return out;
}

// How samples compare with true ones, as GaussianMixture.quality: mean log density, the share that
// is less likely than 99 % of the true ones, and the share of true ones with a sample nearby.
export function quality(level, samples, truth, radius = 0.1) {
  const sorted = logDensity(level, truth).sort(),
    last = sorted.length - 1;
  const at = 0.01 * last,
    i = Math.floor(at);
  const rare = sorted[i] + (at - i) * (sorted[Math.min(i + 1, last)] - sorted[i]);
  const logp = logDensity(level, samples),
    n = logp.length;
  let mean = 0,
    outside = 0,
    covered = 0;
  for (const l of logp) {
    mean += l / n;
    if (l < rare) outside++;
  }
  for (let j = 0; j < truth.length; j += 2) {
    for (let k = 0; k < samples.length; k += 2) {
      const dx = samples[k] - truth[j],
        dy = samples[k + 1] - truth[j + 1];
      if (dx * dx + dy * dy < radius * radius) {
        covered++;
        break;
      }
    }
  }
  return { density: mean, outside: outside / n, covered: (2 * covered) / truth.length };
}

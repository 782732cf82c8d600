// Twins of cf_guidance.schedules and of the noise levels in cf_guidance.karras.
// A schedule is a list with one weight per step, the noisiest step first.

function steps(n, valueAt) {
  return Array.from({ length: n }, (_, i) => valueAt(i));
}

function ramp(step, n, start, end) {
  return start + (step * (end - start)) / Math.max(1, n);
}

export function getCosSched({
  num_steps = 50,
  max_val = 7.5,
  min_val = 0.15,
  num_cycles = 0.5,
  num_warmup_steps = 0,
  warmup_init_val = 0,
  k_decay = 1,
  cycle_limit = 1,
} = {}) {
  // cycle_mul and cycle_decay have no effect: the list holds only one timm cycle
  const total = Math.max(1, num_steps - num_warmup_steps);
  const valueAt = (i) => {
    if (i < num_warmup_steps) return ramp(i, num_warmup_steps, warmup_init_val, max_val);
    if (cycle_limit <= 0) return min_val;
    const done = (i - num_warmup_steps) ** k_decay / total ** k_decay;
    const wave = 1 + Math.cos(Math.PI * 2 * num_cycles * done);
    return min_val + 0.5 * (max_val - min_val) * wave;
  };
  return steps(num_steps, valueAt);
}

export function invKdecaySched({
  num_steps = 50,
  max_val = 7.5,
  min_val = 0.15,
  k_decay = 1,
} = {}) {
  const down = getCosSched({ num_steps, max_val, min_val, k_decay });
  return down.map((w) => max_val + min_val - w);
}

// Values of f at the progress tau, from 0 (pure noise) to 1 (the clean image).
export function makeSched(f, num_steps = 50) {
  if (num_steps === 1) return [f(0.5)];
  return steps(num_steps, (i) => f(i / (num_steps - 1)));
}

const LANCZOS = [
  0.99999999999980993, 676.5203681218851, -1259.1392167224028, 771.32342877765313,
  -176.61502916214059, 12.507343278686905, -0.13857109526572012, 9.9843695780195716e-6,
  1.5056327351493116e-7,
];

function logGamma(x) {
  const z = x - 1;
  const series = LANCZOS.reduce((sum, c, i) => (i ? sum + c / (z + i) : c), 0);
  const t = z + 7.5;
  return 0.5 * Math.log(2 * Math.PI) + (z + 0.5) * Math.log(t) - t + Math.log(series);
}

function logPower(x, k) {
  if (x > 0) return k * Math.log(x);
  return k ? -Infinity : 0;
}

function betaDensity(x, a, b) {
  const scale = logGamma(a + b) - logGamma(a) - logGamma(b);
  return Math.exp(scale + logPower(x, a - 1) + logPower(1 - x, b - 1));
}

// The shapes of arXiv:2404.13040 and arXiv:2502.10574; all but pcs have the mean 1.
const SHAPES = {
  linear: (tau) => 2 * tau,
  invlinear: (tau) => 2 * (1 - tau),
  cosine: (tau) => 1 - Math.cos(Math.PI * tau),
  sine: (tau) => 1 + Math.cos(Math.PI * tau),
  tent: (tau) => 2 * (1 - Math.abs(2 * tau - 1)),
  v: (tau) => 2 * Math.abs(2 * tau - 1),
  pcs: (tau, { kappa = 1 }) => (1 - Math.cos(Math.PI * tau ** kappa)) / 2,
  beta: (tau, { a = 2, b = 3 }) => betaDensity(tau, a, b),
};

export function shapedSched(shape, { num_steps = 50, w = 7.5, base = 0, ...settings } = {}) {
  return makeSched((tau) => base + (w - base) * SHAPES[shape](tau, settings), num_steps);
}

function innerSlope(h0, h1, d0, d1) {
  if (d0 * d1 <= 0) return 0;
  const a = h0 + 2 * h1;
  const b = 2 * h0 + h1;
  return (a + b) / (a / d0 + b / d1);
}

function endSlope(h0, h1, d0, d1) {
  const d = ((2 * h0 + h1) * d0 - h0 * d1) / (h0 + h1);
  if (d * d0 <= 0) return 0;
  return d0 * d1 <= 0 && Math.abs(d) > 3 * Math.abs(d0) ? 3 * d0 : d;
}

// Slopes of the monotone cubic (PCHIP) at each point.
function pchipSlopes(points) {
  const h = points.slice(1).map(([x], i) => x - points[i][0]);
  const d = points.slice(1).map(([, y], i) => (y - points[i][1]) / h[i]);
  if (d.length === 1) return [d[0], d[0]];
  const inner = d.slice(1).map((_, i) => innerSlope(h[i], h[i + 1], d[i], d[i + 1]));
  const n = d.length;
  const last = endSlope(h[n - 1], h[n - 2], d[n - 1], d[n - 2]);
  return [endSlope(h[0], h[1], d[0], d[1]), ...inner, last];
}

export function curveThrough(points, kind = 'linear') {
  const sorted = [...points].sort((p, q) => p[0] - q[0]);
  const slopes = kind === 'pchip' && sorted.length > 1 ? pchipSlopes(sorted) : null;
  return (tau) => {
    const i = sorted.filter(([x]) => x <= tau).length;
    if (i === 0 || i === sorted.length) return sorted[Math.max(0, i - 1)][1];
    const [[x0, y0], [x1, y1]] = sorted.slice(i - 1, i + 1);
    const t = (tau - x0) / (x1 - x0);
    if (!slopes) return y0 + t * (y1 - y0);
    const line = t * t * (3 - 2 * t) * (y1 - y0);
    const bend = t * (1 - t) * (x1 - x0) * ((1 - t) * slopes[i - 1] - t * slopes[i]);
    return y0 + line + bend;
  };
}

export function pointsSched({ points, num_steps = 50, kind = 'linear' }) {
  return makeSched(curveThrough(points, kind), num_steps);
}

// Is lo < x <= hi? An x just above an end counts as that end.
export function inInterval(x, lo, hi, tolerance = 1e-4) {
  return x > lo * (1 + tolerance) && x <= hi * (1 + tolerance);
}

export function intervalSched({ xs, lo, hi, w = 7.5, outside = 1 }) {
  return xs.map((x) => (inInterval(x, lo, hi) ? w : outside));
}

export function clampSched(ws, low = null, high = null) {
  const above = low === null ? ws : ws.map((w) => Math.max(w, low));
  return high === null ? above : above.map((w) => Math.min(w, high));
}

export function warmupSched(ws, num_warmup_steps = 10, start = 1) {
  return [...steps(num_warmup_steps, (i) => ramp(i, num_warmup_steps, start, ws[0])), ...ws];
}

export function cycleSched(ws, num_cycles = 2, cycle_decay = 1, base = 1) {
  const cycles = steps(num_cycles, (c) => {
    const share = cycle_decay ** c;
    return ws.map((w) => base * (1 - share) + w * share);
  });
  return cycles.flat();
}

// n noise levels: ramp(0) is the largest, ramp(1) the smallest; in float32, as in Python.
function levels(n, ramp) {
  return steps(n, (i) => Math.fround(ramp(n > 1 ? i / (n - 1) : 0)));
}

export function karrasSigmas(n, sigma_min, sigma_max, rho = 7) {
  const [lo, hi] = [sigma_min ** (1 / rho), sigma_max ** (1 / rho)];
  return levels(n, (o) => (hi + o * (lo - hi)) ** rho);
}

export function exponentialSigmas(n, sigma_min, sigma_max) {
  const ratio = Math.log(sigma_max / sigma_min);
  return levels(n, (o) => Math.exp(Math.log(sigma_min) + (1 - o) * ratio));
}

export function vpSigmas(n, beta_d = 19.9, beta_min = 0.1, eps_s = 1e-3) {
  const sigma = (t) => Math.sqrt(Math.expm1((beta_d * t * t) / 2 + beta_min * t));
  return levels(n, (o) => sigma(1 + o * (eps_s - 1)));
}

// Network evaluations of one image: one where w is 1 (only the positive is needed) or 0 (only the
// negative), two elsewhere.
export function evaluations(ws) {
  return ws.reduce((n, w) => n + (w === 0 || w === 1 ? 1 : 2), 0);
}

// Intervals of arXiv:2404.07724.
export const INTERVALS = {
  'EDM2-XXL FID': { lo: 0.283, hi: 1.609, w: 2 },
  'EDM2-XXL FD-DINOv2': { lo: 0.844, hi: 5, w: 2.9 },
  SDXL: { lo: 0.28, hi: 5.42, w: 16 },
  'DiT-XL/2': { lo: 0.34, hi: 1.02, w: 2.5 },
};

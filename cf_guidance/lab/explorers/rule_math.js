// Twins of the rules in cf_guidance.transforms, for one sample: vectors are arrays of any length
// (an Array, Float32Array or Float64Array), and results have the type of `pos`.

export function length(x) {
  let sum = 0;
  for (const v of x) sum += v * v;
  return Math.sqrt(sum);
}

export function dot(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}

// p * a + q * b
export function blend(p, a, q, b) {
  return a.map((v, i) => p * v + q * b[i]);
}

export function subtract(a, b) {
  return a.map((v, i) => v - b[i]);
}

export function scaled(x, factor) {
  return x.map((v) => v * factor);
}

function ratio(a, b) {
  return b === 0 ? 1 : a / b;
}

// x, scaled to the length of `like`; a zero vector stays zero.
function matchLength(x, like) {
  const n = length(x);
  return scaled(x, length(like) / (n || 1));
}

export function perpendicular(a, b) {
  const n = dot(b, b);
  return blend(1, a, -dot(a, b) / (n || 1), b);
}

function unit(x) {
  return scaled(x, 1 / (length(x) || 1));
}

// The angle between two vectors, also accurate close to 0 and pi (Kahan's formula).
export function angle(a, b) {
  const [p, q] = [unit(a), unit(b)];
  return 2 * Math.atan2(length(subtract(p, q)), length(blend(1, p, 1, q)));
}

export function cfg(neg, pos, w) {
  if (w === 1) return pos.slice();
  return w === 0 ? neg.slice() : blend(1 - w, neg, w, pos);
}

export function baseNorm(neg, pos, w) {
  return w === 0 ? neg.slice() : matchLength(cfg(neg, pos, w), neg);
}

export function tNorm(neg, pos, w) {
  return w === 0 ? neg.slice() : blend(1, neg, w, matchLength(subtract(pos, neg), neg));
}

export function fullNorm(neg, pos, w) {
  return w === 0 ? neg.slice() : matchLength(tNorm(neg, pos, w), neg);
}

// Returns the prediction and the state: the deltas so far, which the next step adds to its own.
export function apg(neg, pos, w, state = null, { eta = 0, radius = Infinity, beta = -0.5 } = {}) {
  const delta = subtract(pos, neg);
  const g = state ? blend(1, delta, beta, state) : delta;
  const n = length(g);
  const cut = scaled(g, ratio(Math.min(n, radius), n));
  const across = perpendicular(cut, pos);
  const along = subtract(cut, across);
  const push = blend(1, across, eta, along);
  const pred = w === 1 ? pos.slice() : blend(1, pos, w - 1, push);
  return [pred, beta ? g : null];
}

export function adg(neg, pos, w, { most = Math.PI / 6 } = {}) {
  const delta = subtract(pos, neg);
  const across = perpendicular(delta, pos);
  const known = length(across) > 1e-5 * length(delta);
  if (w === 1 || !known) return pos.slice();
  const phi = Math.min(most, Math.max(-most, (w - 1) * angle(neg, pos)));
  return blend(Math.cos(phi), pos, Math.sin(phi) * length(pos), unit(across));
}

function machineEpsilon(x) {
  return x instanceof Float32Array ? 2 ** -23 : Number.EPSILON;
}

// Standard deviation; 0 where it is nothing but rounding.
function deviation(x) {
  let mean = 0;
  for (const v of x) mean += v / x.length;
  const d = length(x.map((v) => v - mean));
  return d > 8 * machineEpsilon(x) * length(x) ? d / Math.sqrt(x.length) : 0;
}

// The guided prediction with the contrast of `pos`; phi is how much of it, 0 is not at all.
export function rescale(pred, pos, phi = 0.7) {
  return scaled(pred, 1 + phi * (ratio(deviation(pos), deviation(pred)) - 1));
}

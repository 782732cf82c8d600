// The rules in a plane: what each of them makes of two predictions with two numbers.
import { cfg, baseNorm, tNorm, fullNorm, apg, adg, rescale } from './rule_math.js';

// rescale compares standard deviations. A picture's mean is near 0, and then its deviation is its
// length; so the plane stands for two such pictures, here of three pixels.
const AXES = [
  [Math.SQRT1_2, -Math.SQRT1_2, 0],
  [1 / Math.sqrt(6), 1 / Math.sqrt(6), -2 / Math.sqrt(6)],
];

function asPixels([x, y]) {
  return AXES[0].map((p, i) => x * p + y * AXES[1][i]);
}

function asPoint(pixels) {
  return AXES.map((axis) => axis.reduce((sum, p, i) => sum + p * pixels[i], 0));
}

function rescaled(neg, pos, w, phi) {
  return asPoint(rescale(asPixels(cfg(neg, pos, w)), asPixels(pos), phi));
}

// By the name of the Python rule. `own` is the weight it takes: T-Norm has a scale of its own.
export const RULES = {
  cfg: { title: 'CFG', own: 'w', of: (n, p, w) => cfg(n, p, w) },
  base_norm: { title: 'Base Norm', own: 'w', of: (n, p, w) => baseNorm(n, p, w) },
  t_norm: { title: 'T-Norm', own: 'w_t', of: (n, p, w) => tNorm(n, p, w) },
  full_norm: { title: 'Full Norm', own: 'w_t', of: (n, p, w) => fullNorm(n, p, w) },
  rescale: { title: 'CFG + rescale', own: 'w', of: (n, p, w, s) => rescaled(n, p, w, s.phi) },
  apg: {
    title: 'APG',
    own: 'w',
    of: (n, p, w, s) => apg(n, p, w, null, { eta: s.eta, radius: s.radius || Infinity })[0],
  },
  adg: { title: 'ADG', own: 'w', of: (n, p, w, s) => adg(n, p, w, { most: s.most }) },
};

export const DEFAULTS = {
  neg: [1.5, -0.4],
  pos: [1.3, 0.9],
  w: 3,
  w_t: 1.2,
  phi: 0.7,
  eta: 0,
  radius: 0,
  most: 0.5235987755982988,
  rules: ['cfg', 'full_norm', 'rescale', 'apg', 'adg'],
};

// The prediction of each rule, by name.
export function predictions(settings) {
  const s = { ...DEFAULTS, ...settings };
  const entries = Object.entries(RULES).map(([k, { own, of }]) => [k, of(s.neg, s.pos, s[own], s)]);
  return Object.fromEntries(entries);
}

// Where a rule leads as its weight goes from 0 to `most`.
export function trace(name, settings, most, count = 120) {
  const { of } = RULES[name];
  const weights = Array.from({ length: count + 1 }, (_, i) => (most * i) / count);
  return weights.map((w) => of(settings.neg, settings.pos, w, settings));
}

// A schedule as the designer's settings describe it: its values, its cost, and its Python.
import { getCosSched, invKdecaySched, shapedSched, pointsSched } from './schedule_math.js';
import { clampSched, warmupSched, cycleSched, intervalSched } from './schedule_math.js';
import { evaluations, karrasSigmas, exponentialSigmas, vpSigmas } from './schedule_math.js';

const weight = { min: 0, max: 20, step: 0.05, least: -1000, most: 1000 };

// Every number that can be set: the range of its slider, and the range that may be typed.
export const NUMBERS = {
  num_steps: { value: 50, min: 1, max: 100, step: 1, most: 1000, hint: 'steps of the sampler' },
  max_val: { ...weight, value: 7.5, hint: 'w where the cosine starts' },
  min_val: { ...weight, value: 0.15, hint: 'w that the cosine falls towards' },
  num_cycles: {
    ...{ value: 0.5, min: 0, max: 5, step: 0.25, least: -100, most: 100 },
    hint: '0.5 goes down once; 1.5 goes down, up and down',
  },
  num_warmup_steps: {
    ...{ value: 0, min: 0, max: 50, step: 1, most: 1000 },
    hint: 'steps of a straight line before the cosine',
  },
  warmup_init_val: { ...weight, value: 0, hint: 'w where that line starts' },
  k_decay: {
    ...{ value: 1, min: 0.1, max: 5, step: 0.05, least: 0.01, most: 20 },
    hint: 'more than 1 stays high for longer, less drops sooner',
  },
  cycle_mul: {
    ...{ value: 1, min: 0.5, max: 2, step: 0.25, least: 0.01, most: 100 },
    hint: 'no effect: the list holds only one timm cycle',
  },
  cycle_decay: {
    ...{ value: 1, min: 0, max: 1, step: 0.05, least: -100, most: 100 },
    hint: 'no effect, for the same reason',
  },
  cycle_limit: {
    ...{ value: 1, min: 0, max: 3, step: 1, least: -100, most: 100 },
    hint: '0: min_val all the way after the warm-up',
  },
  w: { ...weight, value: 7.5, hint: 'mean weight (of pcs_sched: the last one)' },
  base: { ...weight, value: 0, max: 5, hint: 'weight where the shape is 0; 1 is unguided' },
  kappa: {
    ...{ value: 1, min: 0.1, max: 5, step: 0.05, least: 0.01, most: 100 },
    hint: 'more than 1 rises later, less rises sooner',
  },
  a: { value: 2, min: 1, max: 10, step: 0.1, most: 100, hint: 'moves the peak to the image' },
  b: { value: 3, min: 1, max: 10, step: 0.1, most: 100, hint: 'moves the peak to the noise' },
  cycles: { value: 1, min: 1, max: 5, step: 1, most: 20, hint: 'how often the curve runs' },
  decay: { value: 1, min: 0, max: 1, step: 0.05, hint: 'each cycle is this share of the last' },
  warmup: { value: 0, min: 0, max: 30, step: 1, most: 1000, hint: 'steps put before the curve' },
  warmup_start: { ...weight, value: 1, hint: 'weight of the first of them' },
  low: { ...weight, value: 0, hint: 'no weight below this' },
  high: { ...weight, value: 20, hint: 'no weight above this' },
  lo: { value: 0.28, min: 0, max: 5, step: 0.01, most: 1000, hint: 'guide above this sigma' },
  hi: { value: 5.42, min: 0.1, max: 20, step: 0.01, most: 1000, hint: 'up to this sigma' },
  sigma_min: { value: 0.0292, min: 0.002, max: 0.5, step: 0.0002, least: 1e-4, most: 10 },
  sigma_max: { value: 14.6146, min: 1, max: 100, step: 0.01, least: 1e-3, most: 1000 },
  rho: {
    ...{ value: 7, min: 1, max: 15, step: 0.5, least: 0.1, most: 100 },
    hint: '7 spends more steps near sigma_min, 1 spaces evenly',
  },
};

const COSINE = ['max_val', 'min_val', 'num_cycles', 'num_warmup_steps', 'warmup_init_val'];
const CYCLES = ['k_decay', 'cycle_mul', 'cycle_decay', 'cycle_limit'];
const SHAPE = ['w', 'base'];

// The families by the name of their Python function: a title, and their settings after num_steps.
export const FAMILIES = {
  constant: { title: 'constant', numbers: ['w'] },
  get_cos_sched: { title: 'cosine with warm-up and k-decay', numbers: [...COSINE, ...CYCLES] },
  inv_kdecay_sched: { title: 'rising k-decay', numbers: ['max_val', 'min_val', 'k_decay'] },
  linear_sched: { title: 'rising line', numbers: SHAPE },
  invlinear_sched: { title: 'falling line', numbers: SHAPE },
  cosine_sched: { title: 'rising half-wave', numbers: SHAPE },
  sine_sched: { title: 'falling half-wave', numbers: SHAPE },
  tent_sched: { title: 'up and down, Λ', numbers: SHAPE },
  v_sched: { title: 'down and up, V', numbers: SHAPE },
  pcs_sched: { title: 'power cosine', numbers: ['w', 'kappa', 'base'] },
  beta_sched: { title: 'bump (density of a Beta)', numbers: ['w', 'a', 'b', 'base'] },
  points_sched: { title: 'drawn by hand', numbers: [] },
};

export const DEFAULTS = {
  ...Object.fromEntries(Object.entries(NUMBERS).map(([name, o]) => [name, o.value])),
  family: 'get_cos_sched',
  points: [
    [0, 1],
    [0.3, 8],
    [0.7, 6],
    [1, 1],
  ],
  kind: 'pchip',
  use_low: false,
  use_high: false,
  use_interval: false,
  sigmas: 'karras',
};

// The weights of the family alone.
export function familyWeights(settings) {
  const s = { ...DEFAULTS, ...settings };
  if (s.family === 'constant') return Array(s.num_steps).fill(s.w);
  if (s.family === 'get_cos_sched') return getCosSched({ ...s, num_warmup_steps: warmupSteps(s) });
  if (s.family === 'inv_kdecay_sched') return invKdecaySched(s);
  if (s.family === 'points_sched') return pointsSched(s);
  return shapedSched(s.family.replace('_sched', ''), s);
}

function warmupSteps(s) {
  return Math.min(s.num_warmup_steps, s.num_steps);
}

export function noiseLevels(s, n) {
  if (s.sigmas === 'vp') return vpSigmas(n);
  if (s.sigmas === 'exponential') return exponentialSigmas(n, s.sigma_min, s.sigma_max);
  return karrasSigmas(n, s.sigma_min, s.sigma_max, s.rho);
}

// What is wrong with the settings, in a sentence; '' if nothing is.
export function problem(settings) {
  const s = { ...DEFAULTS, ...settings };
  if (s.sigmas !== 'vp' && s.sigma_max <= s.sigma_min) return 'sigma_max must be above sigma_min.';
  if (s.use_interval && s.hi <= s.lo) return 'hi must be above lo.';
  if (s.use_low && s.use_high && s.high < s.low) return 'high must not be below low.';
  if (!familyWeights(s).every(Number.isFinite)) return 'These settings give no finite weights.';
  return '';
}

// { ws, sigmas, nfe }: a weight and a noise level per step, and the evaluations of one image.
export function designed(settings) {
  const s = { ...DEFAULTS, ...settings };
  let ws = cycleSched(familyWeights(s), s.cycles, s.decay);
  ws = warmupSched(ws, s.warmup, s.warmup_start);
  ws = clampSched(ws, s.use_low ? s.low : null, s.use_high ? s.high : null);
  const sigmas = noiseLevels(s, ws.length);
  if (s.use_interval) {
    const inside = intervalSched({ xs: sigmas, lo: s.lo, hi: s.hi, w: 1, outside: 0 });
    ws = ws.map((w, i) => (inside[i] ? w : 1));
  }
  return { ws, sigmas, nfe: evaluations(ws) };
}

// ---------------------------------------------------------------------------- Python

function literal(x) {
  if (Array.isArray(x)) {
    const items = x.map(literal).join(', ');
    return Array.isArray(x[0]) ? `[${items}]` : `(${items})`;
  }
  return typeof x === 'string' ? `'${x}'` : String(x);
}

// Points in one line, or four a line.
function pointsLiteral(points) {
  const line = literal(points);
  if (line.length <= 60) return line;
  const rows = [];
  for (let i = 0; i < points.length; i += 4) {
    rows.push(
      `        ${points
        .slice(i, i + 4)
        .map(literal)
        .join(', ')},`,
    );
  }
  return `[\n${rows.join('\n')}\n    ]`;
}

// `name(a, b, c=...)`, in one line or one argument per line.
function pythonCall(name, positional, keywords) {
  const named = Object.entries(keywords).map(([k, v]) => `${k}=${literal(v)}`);
  const args = [...positional.map((v) => (v.python ? v.python : literal(v))), ...named];
  const line = `${name}(${args.join(', ')})`;
  return line.length <= 84 ? line : `${name}(\n    ${args.join(',\n    ')},\n)`;
}

// Those settings that are not the defaults of the Python function.
function changed(s, names, defaults = DEFAULTS) {
  return Object.fromEntries(names.filter((o) => s[o] !== defaults[o]).map((o) => [o, s[o]]));
}

// Python that makes the weights of the family alone.
export function familyCall(s) {
  if (s.family === 'constant') return `[${literal(s.w)}] * ${s.num_steps}`;
  const n = { num_steps: s.num_steps };
  if (s.family === 'points_sched') {
    const kind = s.kind === 'linear' ? {} : { kind: s.kind };
    return pythonCall(s.family, [{ python: pointsLiteral(s.points) }], { ...n, ...kind });
  }
  const own = { ...s, num_warmup_steps: warmupSteps(s) };
  return pythonCall(s.family, [], { ...n, ...changed(own, FAMILIES[s.family].numbers) });
}

const ws = { python: 'ws' };

function changes(s) {
  const lines = [];
  if (s.cycles > 1) {
    const decay = s.decay === 1 ? {} : { cycle_decay: s.decay };
    lines.push(['cycle_sched', pythonCall('cycle_sched', [ws, s.cycles], decay)]);
  }
  if (s.warmup > 0) {
    const start = s.warmup_start === 1 ? {} : { start: s.warmup_start };
    lines.push(['warmup_sched', pythonCall('warmup_sched', [ws, s.warmup], start)]);
  }
  if (s.use_low || s.use_high) {
    const ends = { ...(s.use_low && { low: s.low }), ...(s.use_high && { high: s.high }) };
    lines.push(['clamp_sched', pythonCall('clamp_sched', [ws], ends)]);
  }
  return lines;
}

function sigmasCall(s, n) {
  const name = `get_sigmas_${s.sigmas}`;
  if (s.sigmas === 'vp') return [name, `${name}(${n})[:-1]`];
  const rho = s.sigmas === 'karras' && s.rho !== 7 ? { rho: s.rho } : {};
  return [name, `${pythonCall(name, [n, s.sigma_min, s.sigma_max], rho)}[:-1]`];
}

function intervalLines(s, isOnlyConstant) {
  const ends = [{ python: 'sigmas' }, s.lo, s.hi];
  if (isOnlyConstant) return [`ws = ${pythonCall('interval_sched', ends, { w: s.w })}`];
  return [
    `inside = ${pythonCall('interval_sched', ends, { w: 1, outside: 0 })}`,
    'ws = [w if on else 1.0 for w, on in zip(ws, inside)]',
  ];
}

function importLine(module, names) {
  const line = `from ${module} import ${names.join(', ')}`;
  return line.length <= 88 ? line : `from ${module} import (\n    ${names.join(',\n    ')},\n)`;
}

// Python that makes the weights, as `ws`.
export function pythonCode(settings) {
  const s = { ...DEFAULTS, ...settings };
  const later = changes(s);
  const isOnlyConstant = s.use_interval && s.family === 'constant' && later.length === 0;
  const names = later.map(([name]) => name);
  if (s.family !== 'constant') names.push(s.family);
  const lines = isOnlyConstant ? [] : [`ws = ${familyCall(s)}`];
  lines.push(...later.map(([, call]) => `ws = ${call}`));
  const imports = [];
  if (s.use_interval) {
    const [name, call] = sigmasCall(s, designed(s).ws.length);
    imports.push(`from cf_guidance.karras import ${name}`);
    names.push('interval_sched');
    lines.push(`sigmas = ${call}`, ...intervalLines(s, isOnlyConstant));
  }
  if (names.length) imports.push(importLine('cf_guidance.schedules', names.sort()));
  return [...imports, ...(imports.length ? [''] : []), ...lines].join('\n');
}

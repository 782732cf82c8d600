// Guidance in two dimensions, where the truth is known: a Gaussian mixture with three arms.

import { bind, button, canvas, change, checkbox, colours, copyButton } from './common.js';
import { element, formatNumber, mount, onChange, onWidth, oncePerFrame } from './common.js';
import { roundHandle, scale, select, slider, svgElement, withDefaults } from './common.js';
import { RULES, SAMPLERS, SIGMA_MAX, SIGMA_MIN, atLevel, galaxy } from './galaxy_math.js';
import { logDensity, normals, quality, sample, trueSamples } from './galaxy_math.js';

const DEFAULTS = {
  w: 3,
  label: 0,
  negative: 'all',
  other: 1,
  blur: 0.15,
  rule: 'cfg',
  interval: null, // [lo, hi]; null: everywhere
  sampler: 'heun',
  steps: 24,
  n: 500,
  seed: 0,
  paths: true,
};
const ARMS = ['red', 'green', 'blue'];
const ARM_COLOURS = ['s4', 's2', 's0'];
const SHORT = ['t_norm', 'full_norm']; // rules whose w is a share of a length, about 0.2
const NEGATIVES = [
  ['all', 'all arms'],
  ['other', 'another arm'],
  ['blurred', 'blurred model'],
];
const PATHS = 24;
const EXPLAINED =
  'log p: mean log density. outside: samples less likely than 99 % of true ones. ' +
  'covered: true samples with one of these within 0.1. evals: network evaluations per sample.';

const STARS = galaxy();

function settingsOf(model) {
  return Object.fromEntries(Object.keys(DEFAULTS).map((name) => [name, model.get(name)]));
}

// ---------------------------------------------------------------------------- one run

// Keeps the last results, so that only what a control has changed is computed again.
function makeRunner() {
  const kept = new Map();
  const cached = (name, key, f) => {
    const text = JSON.stringify(key);
    if (kept.get(name)?.text !== text) kept.set(name, { text, value: f() });
    return kept.get(name).value;
  };
  return (s) => {
    const start = cached('start', [s.seed, s.n], () =>
      normals(s.seed)
        .fill(2 * s.n)
        .map((v) => SIGMA_MAX * v),
    );
    const noise = () => normals(s.seed + 7919).fill;
    const truth = cached('truth', [s.label, s.n, s.seed], () => ({
      level: atLevel(STARS, 0, s.label),
      points: trueSamples(STARS, s.label, s.n, normals(s.seed + 104729)),
      others: trueSamples(STARS, s.label, s.n, normals(s.seed + 15485863)),
    }));
    const measured = (points) => quality(truth.level, points, truth.points);
    const plain = { ...s, w: 1, rule: 'cfg' };
    const base = cached('base', [s.seed, s.n, s.label, s.sampler, s.steps], () => {
      const run = sample(plain, start, noise());
      return { ...run, ...measured(run.path.at(-1)) };
    });
    const run = sample(s, start, noise());
    const rows = [
      ['guided', { ...run, ...measured(run.path.at(-1)) }],
      ['w = 1', base],
      ['truth', cached('true', [s.label, s.n, s.seed], () => measured(truth.others))],
    ];
    return { ...run, rows };
  };
}

// ---------------------------------------------------------------------------- the picture

// How far the picture reaches from its middle: out to the noise, or just to the data.
function extentAt(sigma) {
  return Math.hypot(2, 2.2 * sigma);
}

function rgb(colour) {
  const context = element('canvas', { width: 1, height: 1 }).getContext('2d');
  context.fillStyle = colour;
  context.fillRect(0, 0, 1, 1);
  return context.getImageData(0, 0, 1, 1).data;
}

// The density of all arms (grey) and of the chosen one (its colour) as an image.
function densityImage(sigma, label, extent, grey, tint, size = 112) {
  const points = new Float64Array(2 * size * size);
  for (let i = 0, o = 0; i < size; i++) {
    for (let j = 0; j < size; j++) {
      points[o++] = extent * ((2 * (j + 0.5)) / size - 1);
      points[o++] = extent * (1 - (2 * (i + 0.5)) / size);
    }
  }
  const blurred = Math.max(sigma, 0.03); // the picture has coarse pixels
  const [all, one] = [-1, label].map((k) => logDensity(atLevel(STARS, blurred, k), points));
  const top = all.reduce((a, b) => Math.max(a, b));
  const image = new ImageData(size, size);
  for (let i = 0; i < all.length; i++) {
    const share = Math.exp(one[i] - all[i]) / STARS.arms; // how much of it belongs to the arm
    for (let k = 0; k < 3; k++) {
      image.data[4 * i + k] = grey[k] + Math.min(1, share) * (tint[k] - grey[k]);
    }
    image.data[4 * i + 3] = 125 * Math.min(1, Math.exp(all[i] - top) ** 0.8);
  }
  const picture = element('canvas', { width: size, height: size });
  picture.getContext('2d').putImageData(image, 0, 0);
  return picture;
}

function drawPoints(context, points, place, radius, colour) {
  context.fillStyle = colour;
  context.globalAlpha = 0.75;
  for (let i = 0; i < points.length; i += 2) {
    const [x, y] = place(points[i], points[i + 1]);
    context.fillRect(x - radius, y - radius, 2 * radius, 2 * radius);
  }
  context.globalAlpha = 1;
}

function drawPaths(context, path, step, place, colour) {
  context.strokeStyle = colour;
  context.lineWidth = 1;
  context.globalAlpha = 0.7;
  for (let i = 0; i < 2 * PATHS && i < path[0].length; i += 2) {
    context.beginPath();
    for (let k = 0; k <= step; k++) context.lineTo(...place(path[k][i], path[k][i + 1]));
    context.stroke();
  }
  context.globalAlpha = 1;
}

// ---------------------------------------------------------------------------- the noise axis

// The noise levels of the sampler from left to right, the guided interval, and where we are.
function noiseAxis(frame, model, view) {
  const title = element('span', { class: 'name' }, 'Noise level σ and the guided interval');
  const svg = svgElement('svg', { height: 58, role: 'group', 'aria-label': 'guided noise levels' });
  const root = element('div', { class: 'control' }, title, svg);
  const handles = ['upper', 'lower'].map((which, i) =>
    roundHandle({
      label: `${which} end of the guided interval`,
      onMove: (x) => moveTo(i, axis.invert(x)),
      onKey: (dx, dy) => moveTo(i, ends()[i] * 1.05 ** (dy - dx)),
    }),
  );
  const drawing = svgElement('g'); // the handles stay in place: they may be focused
  svg.append(drawing, ...handles);
  let axis = null;
  const lowest = SIGMA_MIN / 2,
    highest = SIGMA_MAX;

  function ends() {
    const [lo, hi] = model.get('interval') ?? [0, highest];
    return [Math.min(hi, highest), Math.max(lo, lowest)];
  }

  function moveTo(i, value) {
    const now = ends();
    now[i] = Number(Math.min(highest, Math.max(lowest, value)).toPrecision(3));
    if (now[0] <= now[1]) return;
    const [hi, lo] = [now[0], now[1] <= lowest ? 0 : now[1]];
    change(model, { interval: lo === 0 && hi >= highest ? null : [lo, hi] });
  }

  function draw() {
    if (!axis) return;
    const [hi, lo] = ends(),
      y = 22;
    const line = (a, b, style) => {
      const place = { x1: axis(a), x2: axis(b), y1: y, y2: y };
      return svgElement('line', { ...place, style: `stroke-linecap: round; ${style}` });
    };
    const shown = view.sigmas.map((s) => Math.max(s, lowest));
    const dots = shown.map((s, i) =>
      svgElement('circle', {
        cx: axis(s),
        cy: y,
        r: i === view.step ? 5 : 2,
        style: `fill: var(${i === view.step ? '--text' : '--faint'})`,
      }),
    );
    const names = [10, 3, 1, 0.3, 0.1, 0.03, 0.01].map((s) =>
      svgElement('text', { x: axis(s), y: 52, 'text-anchor': 'middle' }, String(s)),
    );
    handles.forEach((node, i) => {
      const value = [hi, lo][i];
      node.setAttribute('transform', `translate(${axis(value)} ${y})`);
      node.setAttribute('aria-valuemin', lowest);
      node.setAttribute('aria-valuemax', highest);
      node.setAttribute('aria-valuenow', value);
      node.setAttribute('aria-valuetext', value <= lowest ? '0' : formatNumber(value));
    });
    drawing.replaceChildren(
      line(highest, lowest, 'stroke: var(--line); stroke-width: 4'),
      line(hi, lo, 'stroke: var(--accent); stroke-width: 8; opacity: 0.6'),
      ...dots,
      ...names,
    );
  }

  onWidth(frame, root, (width) => {
    svg.setAttribute('width', width);
    axis = scale([highest, lowest], [22, width - 22], { log: true });
    draw();
  });
  return { root, draw };
}

// ---------------------------------------------------------------------------- the Python line

function pythonCode(s) {
  const digits = (v) => (Number.isInteger(v) ? `${v}.0` : String(v));
  const negative = {
    all: 'dict(labels=torch.tensor([-1]))',
    other: `dict(labels=torch.tensor([${s.other}]))`,
    blurred: `galaxy(blur=${s.blur})`,
  }[s.negative];
  const rule = s.rule === 'cfg' ? '' : `, rule=${s.rule}`;
  const interval = s.interval ? `, interval=(${s.interval.map(digits).join(', ')})` : '';
  return [
    `G = GuidedDenoiser(galaxy(), ${negative}, w=${digits(s.w)}${rule}${interval})`,
    `x = 10 * torch.randn(${s.n}, 2, dtype=torch.float64)`,
    `sigmas = get_sigmas_karras(${s.steps}, 0.01, 10.0)`,
    `x = sample(G, x, sigmas, ${s.sampler}, dict(labels=torch.tensor([${s.label}])))`,
  ].join('\n');
}

// ---------------------------------------------------------------------------- the explorer

function numbersTable() {
  const head = ['', 'log p', 'outside', 'covered', 'evals'];
  const body = element('tbody');
  const names = element('tr', {}, ...head.map((h) => element('th', {}, h)));
  const root = element(
    'div',
    { class: 'scroll' },
    element('table', {}, element('thead', {}, names), body),
  );
  const percent = (v) => `${(100 * v).toFixed(1)} %`;
  const set = (rows) => {
    body.replaceChildren(
      ...rows.map(([name, q]) => {
        const each = String(q.evaluations ?? '');
        const density = q.density.toFixed(2).replace('-', '−');
        const cells = [name, density, percent(q.outside), percent(q.covered), each];
        return element('tr', { 'data-row': name }, ...cells.map((c) => element('td', {}, c)));
      }),
    );
  };
  return { root, set };
}

function render({ model, el }) {
  withDefaults(model, DEFAULTS);
  const frame = mount(el, 'Guidance of a galaxy in two dimensions');
  const compute = makeRunner();
  const view = { step: model.get('steps'), sigmas: [], path: [], images: new Map() };

  const picture = canvas(frame, {
    label: 'Samples on the density of the galaxy',
    height: (width) => Math.min(width, 520),
    draw: drawPicture,
  });
  const axis = noiseAxis(frame, model, view);
  const table = numbersTable();
  const code = element('pre');
  const status = element('span', { class: 'note' });

  function drawPicture(context, width, height) {
    const s = settingsOf(model),
      colour = colours(frame.root);
    const sigma = view.sigmas[view.step],
      extent = extentAt(sigma);
    const half = Math.min(width, height) / 2,
      left = width / 2 - half,
      top = height / 2 - half;
    const place = (x, y) => [left + (1 + x / extent) * half, top + (1 - y / extent) * half];
    const tint = getComputedStyle(frame.root).getPropertyValue(`--${ARM_COLOURS[s.label]}`).trim();
    const key = [sigma, s.label, colour.text].join();
    if (!view.images.has(key)) {
      if (view.images.size > 130) view.images.clear();
      view.images.set(key, densityImage(sigma, s.label, extent, rgb(colour.faint), rgb(tint)));
    }
    context.imageSmoothingEnabled = true;
    context.drawImage(view.images.get(key), left, top, 2 * half, 2 * half);
    if (s.paths) drawPaths(context, view.path, view.step, place, colour.faint);
    drawPoints(context, view.path[view.step], place, width < 360 ? 1 : 1.25, tint);
  }

  function showStep(step) {
    view.step = step;
    stepSlider.set(step);
    const sigma = view.sigmas[step];
    status.textContent = `σ = ${sigma === 0 ? 0 : formatNumber(sigma, 2)}`;
    axis.draw();
    picture.redraw();
  }

  const update = oncePerFrame(() => {
    const begin = performance.now(),
      s = settingsOf(model);
    const atEnd = view.step >= view.path.length - 1;
    const run = compute(s);
    Object.assign(view, { path: run.path, sigmas: run.sigmas });
    table.set(run.rows);
    const [[, q]] = run.rows;
    picture.node.setAttribute(
      'aria-label',
      `${s.n} samples of the ${ARMS[s.label]} arm: ${(100 * q.outside).toFixed(1)} % outside, ` +
        `${(100 * q.covered).toFixed(1)} % of the arm covered`,
    );
    code.textContent = pythonCode(s);
    stepSlider.limit({ max: s.steps });
    showStep(atEnd ? s.steps : Math.min(view.step, s.steps));
    frame.root.dataset.ms = (performance.now() - begin).toFixed(1);
  });

  // controls
  const weight = slider({ label: 'Guidance weight w (1 is unguided)', min: 0, max: 10, step: 0.1 });
  const fitWeight = () => {
    const short = SHORT.includes(model.get('rule'));
    weight.limit(short ? { max: 1, step: 0.01 } : { max: 10, step: 0.1 });
    weight.set(model.get('w'));
  };
  const pairs = (table) => Object.entries(table).map(([name, { title }]) => [name, title]);
  const arms = ARMS.map((name, i) => [i, `${name} arm`]);
  const rule = select({ label: 'Rule', options: pairs(RULES) });
  const controls = {
    w: weight,
    label: select({ label: 'Class', options: arms }),
    negative: select({ label: 'Negative', options: NEGATIVES }),
    other: select({ label: 'Other arm', options: arms }),
    blur: slider({ label: 'Blur of the negative model', min: 0.01, max: 0.5, step: 0.01 }),
    rule,
    sampler: select({ label: 'Sampler', options: pairs(SAMPLERS) }),
    steps: slider({ label: 'Steps', min: 2, max: 64, step: 1 }),
    n: slider({ label: 'Samples', min: 100, max: 1000, step: 100 }),
    paths: checkbox({ label: `paths of the first ${PATHS}` }),
  };
  for (const [name, made] of Object.entries(controls)) bind(frame, model, name, made);
  fitWeight();
  rule.onInput = (value) => {
    const before = SHORT.includes(model.get('rule')),
      now = SHORT.includes(value);
    change(model, { rule: value, ...(before === now ? {} : { w: now ? 0.2 : 3 }) });
  };
  const redraw = () => change(model, { seed: model.get('seed') + 1 });
  const fresh = button({ label: 'New noise', onClick: redraw });
  const everywhere = () => change(model, { interval: null });
  const reset = button({ label: 'Guide everywhere', onClick: everywhere });
  const last = model.get('steps');
  const stepSlider = slider({ label: 'Step of the sampler', min: 0, max: last, step: 1 });
  stepSlider.onInput = (step) => {
    stop();
    showStep(Math.round(step));
  };

  let timer = null;
  const play = button({ label: 'Play', primary: true, onClick: () => (timer ? stop() : start()) });
  function start() {
    if (view.step >= view.sigmas.length - 1) showStep(0);
    play.textContent = 'Stop';
    timer = setInterval(
      () => {
        if (view.step >= view.sigmas.length - 1) stop();
        else showStep(view.step + 1);
      },
      Math.max(40, 2500 / view.sigmas.length),
    );
  }
  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = 'Play';
  }
  frame.onCleanup(stop);

  function fitNegative() {
    const negative = model.get('negative');
    controls.other.root.style.display = negative === 'other' ? '' : 'none';
    controls.blur.root.style.display = negative === 'blurred' ? '' : 'none';
  }
  fitNegative();
  onChange(frame, model, ['negative'], fitNegative);
  onChange(frame, model, ['rule'], fitWeight);
  onChange(frame, model, Object.keys(DEFAULTS), update);

  const c = controls;
  const column = 'display: grid; gap: 0.6rem; align-content: start; min-width: 0';
  const stack = (...parts) => element('div', { style: column }, ...parts);
  const small = 'grid-template-columns: repeat(auto-fill, minmax(min(100%, 8.5rem), 1fr))';
  const group = (...made) =>
    element('div', { class: 'controls', style: small }, ...made.map((o) => o.root));
  stepSlider.root.style.flex = '1 1 12rem';
  const left = stack(picture.root, element('div', { class: 'row' }, play, stepSlider.root, status));
  const right = stack(
    table.root,
    element('p', { class: 'note' }, EXPLAINED),
    group(c.negative, c.other, c.label, c.rule, c.sampler),
    group(c.blur, c.steps, c.n),
    axis.root,
    element('div', { class: 'row' }, fresh, reset, c.paths.root),
  );
  const python = element(
    'details',
    {},
    element('summary', {}, 'The same in Python'),
    stack(
      code,
      element(
        'div',
        {},
        copyButton(() => code.textContent),
      ),
    ),
  );
  const columns = element('div', { class: 'columns' }, left, right);
  frame.root.append(stack(weight.root, columns, python));
  update();
  return frame.cleanup;
}

export default { render };

// Schedule designer: how w changes along the steps, what that costs, and the Python that makes it.
import { mount, withDefaults, onChange, change, bind, onWidth, oncePerFrame } from './common.js';
import { element, svgElement, select, checkbox, button, copyButton } from './common.js';
import { formatNumber, scale, ticks, logTicks, pathThrough, roundHandle } from './common.js';
import { makeHandle, shortest } from './common.js';
import { INTERVALS, curveThrough } from './schedule_math.js';
import { DEFAULTS, designed, problem, pythonCode, familyWeights } from './schedule_design.js';
import { familyControls, familySelect, numberSlider } from './schedule_controls.js';

const MARGIN = { left: 34, right: 12, top: 18, bottom: 38 };
const HEIGHT = 250;

function settingsOf(model) {
  return Object.fromEntries(Object.keys(DEFAULTS).map((name) => [name, model.get(name)]));
}

// ---------------------------------------------------------------------------- the two plots

// One plot of w: an SVG with an axis, the curve, and a dot per step.
class Plot {
  constructor(frame, { title, xLabel, redraw }) {
    this.title = title;
    this.xLabel = xLabel;
    this.width = 0;
    this.axis = svgElement('g', { 'aria-hidden': 'true' });
    this.curve = svgElement('g', { 'aria-hidden': 'true' });
    this.marker = svgElement('g', { 'aria-hidden': 'true' });
    this.handles = svgElement('g');
    const parts = [this.axis, this.curve, this.marker, this.handles];
    this.svg = svgElement('svg', { height: HEIGHT, role: 'group', 'aria-label': title }, ...parts);
    this.root = element('div', {}, this.svg);
    onWidth(frame, this.root, (width) => {
      this.width = width;
      this.svg.setAttribute('width', width);
      redraw();
    });
  }

  // Ranges of the axes; x may be logarithmic.
  setRanges(xRange, yRange, log) {
    this.log = log;
    this.xRange = xRange;
    this.x = scale(xRange, [MARGIN.left, this.width - MARGIN.right], { log });
    this.y = scale(yRange, [HEIGHT - MARGIN.bottom, MARGIN.top]);
    this.yRange = yRange;
  }

  drawAxis() {
    const bottom = HEIGHT - MARGIN.bottom;
    const [a, b] = [...this.xRange].sort((p, q) => p - q);
    const rows = ticks(...this.yRange, 5).map((w) => {
      const y = this.y(w);
      const line = { class: 'grid', x1: MARGIN.left, x2: this.width - MARGIN.right, y1: y, y2: y };
      const text = { x: MARGIN.left - 6, y: y + 4, 'text-anchor': 'end' };
      return [svgElement('line', line), svgElement('text', text, formatNumber(w))];
    });
    const count = this.width > 420 ? 6 : 4;
    const places = this.log ? spread(logTicks(a, b), count + 2) : ticks(a, b, count);
    const columns = places.map((v) => {
      const text = { x: this.x(v), y: bottom + 17, 'text-anchor': 'middle' };
      return svgElement('text', text, formatNumber(v));
    });
    const middle = { x: (MARGIN.left + this.width) / 2, y: HEIGHT - 4, 'text-anchor': 'middle' };
    const label = svgElement('text', middle, this.xLabel);
    const corner = svgElement('text', { x: MARGIN.left - 24, y: 10 }, 'w');
    this.axis.replaceChildren(...rows.flat(), ...columns, label, corner);
  }

  drawCurve(xs, ws) {
    const points = xs.map((x, i) => [this.x(x), this.y(ws[i])]);
    const line = { d: pathThrough(points), fill: 'none', stroke: 'var(--accent)' };
    const radius = xs.length > 60 ? 1.8 : 3;
    const dots = points.map(([cx, cy], i) => {
      const cheap = ws[i] === 1 || ws[i] === 0;
      const colour = cheap ? { fill: 'var(--back)' } : { fill: 'var(--accent)' };
      return svgElement('circle', { cx, cy, r: radius, stroke: 'var(--accent)', ...colour });
    });
    const one = this.y(1);
    const ends = { x1: MARGIN.left, x2: this.width - MARGIN.right, y1: one, y2: one };
    const dashes = { stroke: 'var(--faint)', 'stroke-dasharray': '2 4' };
    const unguided = svgElement('line', { ...ends, ...dashes });
    this.curve.replaceChildren(unguided, svgElement('path', { ...line, opacity: 0.5 }), ...dots);
    this.points = points;
  }

  mark(i) {
    const point = this.points?.[i];
    if (!point) return this.marker.replaceChildren();
    const ends = { x1: point[0], x2: point[0], y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom };
    const line = svgElement('line', { ...ends, stroke: 'var(--faint)' });
    const dot = { cx: point[0], cy: point[1], r: 5, fill: 'var(--s1)' };
    this.marker.replaceChildren(line, svgElement('circle', dot));
  }

  // The step nearest to a pointer.
  nearest(event) {
    const x = event.clientX - this.svg.getBoundingClientRect().left;
    const distances = this.points.map(([px]) => Math.abs(px - x));
    return distances.indexOf(Math.min(...distances));
  }
}

function spread(all, most) {
  const powers = all.filter((v) => /^0?\.?0*10*$/.test(String(v)));
  return all.length <= most ? all : powers;
}

// From 0, or below, to a little more than the largest weight.
function weightRange(ws) {
  const [low, high] = [Math.min(0, ...ws), Math.max(1.5, ...ws)];
  const room = 0.12 * (high - low);
  return [low < 0 ? low - room : 0, high + room];
}

// ---------------------------------------------------------------------------- points by hand

// A handle per point of `points`, in the plot over steps.
class PointHandles {
  constructor(model, plot) {
    this.model = model;
    this.plot = plot;
    this.selected = 0;
    this.nodes = [];
  }

  points() {
    return this.model.get('points').map((p) => [...p]);
  }

  lastStep() {
    return Math.max(1, this.model.get('num_steps') - 1);
  }

  draw() {
    const on = this.model.get('family') === 'points_sched';
    const points = on ? this.points() : [];
    while (this.nodes.length > points.length) this.nodes.pop().remove();
    while (this.nodes.length < points.length) this.add(this.nodes.length);
    points.forEach(([tau, w], i) => {
      const x = this.plot.x(this.model.get('warmup') + tau * this.lastStep());
      this.nodes[i].setAttribute('transform', `translate(${x} ${this.plot.y(w)})`);
      this.nodes[i].setAttribute('aria-valuenow', shortest(w));
      this.nodes[i].setAttribute('aria-valuetext', `w ${shortest(w)} at progress ${shortest(tau)}`);
    });
  }

  add(i) {
    const node = roundHandle({
      label: `point ${i + 1}`,
      onMove: (x, y) => {
        const tau = (this.plot.x.invert(x) - this.model.get('warmup')) / this.lastStep();
        this.move(i, tau, this.plot.y.invert(Math.min(y, HEIGHT - MARGIN.bottom)));
      },
      onKey: (dx, dy) => {
        const [tau, w] = this.points()[i];
        this.move(i, tau + dx / 100, w + dy / 10);
      },
      onDelete: () => this.remove(i),
    });
    node.addEventListener('focus', () => (this.selected = i));
    this.nodes.push(node);
    this.plot.handles.append(node);
  }

  // Points keep their order: none passes its neighbour.
  move(i, tau, w) {
    const points = this.points();
    const left = i > 0 ? points[i - 1][0] + 0.005 : 0;
    const right = i < points.length - 1 ? points[i + 1][0] - 0.005 : 1;
    const inside = Math.min(right, Math.max(left, tau));
    const top = this.plot.yRange[1];
    points[i] = [round(inside, 3), round(Math.min(top, w), 2)];
    change(this.model, { points });
  }

  remove(i = this.selected) {
    const points = this.points();
    if (points.length < 2) return;
    points.splice(Math.min(i, points.length - 1), 1);
    change(this.model, { points });
  }

  // A point at progress `tau`, or in the middle of the widest gap.
  insert(tau = this.widestGap(), w = curveThrough(this.points(), this.model.get('kind'))(tau)) {
    const points = this.points();
    if (points.some(([x]) => Math.abs(x - tau) < 0.005)) return;
    const added = [...points, [round(tau, 3), round(w, 2)]].sort((p, q) => p[0] - q[0]);
    change(this.model, { points: added });
  }

  widestGap() {
    const xs = this.points().map(([x]) => x);
    const all = [...(xs[0] > 0 ? [0] : []), ...xs, ...(xs.at(-1) < 1 ? [1] : [])];
    const gaps = all.slice(1).map((x, i) => x - all[i]);
    const i = gaps.indexOf(Math.max(...gaps));
    return (all[i] + all[i + 1]) / 2;
  }
}

function round(x, digits) {
  return Number(x.toFixed(digits));
}

// Points on the curve of any family, for drawing on by hand.
function asPoints(settings, count = 9) {
  const ws = familyWeights(settings);
  const places = Array.from({ length: count }, (_, i) => i / (count - 1));
  const at = (tau) => ws[Math.round(tau * (ws.length - 1))];
  return places.map((tau) => [round(tau, 3), round(at(tau), 2)]);
}

// ---------------------------------------------------------------------------- the interval

// The interval as a band with two handles, in the plot over sigma.
class IntervalBand {
  constructor(model, plot) {
    this.model = model;
    this.plot = plot;
    this.band = svgElement('rect', { fill: 'var(--accent)', opacity: 0.1 });
    this.ends = ['lo', 'hi'].map((name) => this.end(name));
  }

  end(name) {
    const shape = { y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom };
    const line = svgElement('line', { ...shape, stroke: 'var(--accent)', 'stroke-width': 2 });
    const reach = { class: 'reach', x: -16, y: MARGIN.top, width: 32, height: HEIGHT - 56 };
    const grip = { class: 'dot', x: -5, y: HEIGHT / 2 - 36, width: 10, height: 30, rx: 4 };
    const parts = [line, svgElement('rect', reach), svgElement('rect', grip)];
    return makeHandle(svgElement('g', {}, ...parts), {
      label: name === 'lo' ? 'lower end of the interval' : 'upper end of the interval',
      onMove: (x) => this.move(name, this.plot.x.invert(x)),
      onKey: (dx, dy) => this.move(name, this.model.get(name) * 1.03 ** (dy - dx)),
    });
  }

  move(name, sigma) {
    const [a, b] = this.plot.xRange;
    const inside = Math.min(Math.max(a, b), Math.max(Math.min(a, b), sigma));
    const [lo, hi] = [this.model.get('lo'), this.model.get('hi')];
    const apart = name === 'lo' ? Math.min(inside, hi / 1.02) : Math.max(inside, lo * 1.02);
    change(this.model, { [name]: Number(apart.toPrecision(3)) });
  }

  // Only when it changes: a handle that is put in again would lose the pointer.
  show(on) {
    const { handles } = this.plot;
    if (on === handles.hasChildNodes()) return;
    handles.replaceChildren(...(on ? [this.band, ...this.ends] : []));
  }

  draw() {
    const on = this.model.get('use_interval');
    this.show(on);
    if (!on) return;
    const [a, b] = this.plot.xRange;
    const within = (sigma) => Math.min(Math.max(a, b), Math.max(Math.min(a, b), sigma));
    const [lo, hi] = ['lo', 'hi'].map((name) => this.plot.x(within(this.model.get(name))));
    this.ends.forEach((node, i) => {
      node.setAttribute('transform', `translate(${[lo, hi][i]} 0)`);
      node.setAttribute('aria-valuenow', shortest(this.model.get(i ? 'hi' : 'lo')));
    });
    const box = { x: hi, width: Math.max(0, lo - hi), y: MARGIN.top, height: HEIGHT - 56 };
    for (const [name, value] of Object.entries(box)) this.band.setAttribute(name, value);
  }
}

// ---------------------------------------------------------------------------- controls

function switchBox(frame, model, name, label) {
  return bind(frame, model, name, checkbox({ label })).root;
}

function section(title, isOpen, ...rows) {
  const body = element('div', { class: 'controls' }, ...rows);
  return element('details', { open: isOpen }, element('summary', {}, title), body);
}

function paperSelect(model) {
  const names = Object.keys(INTERVALS);
  const options = [['', 'choose…'], ...names];
  const use = (name) => {
    if (name) change(model, { family: 'constant', use_interval: true, ...INTERVALS[name] });
  };
  return select({ label: 'interval of a paper (2404.07724)', options, onInput: use }).root;
}

function otherSections(frame, model) {
  const numbers = (...names) => names.map((name) => numberSlider(frame, model, name).root);
  const kinds = ['karras', 'exponential', 'vp'];
  const levels = bind(frame, model, 'sigmas', select({ label: 'noise levels', options: kinds }));
  const guide = switchBox(frame, model, 'use_interval', 'guide only in an interval of sigma');
  const low = switchBox(frame, model, 'use_low', 'at least low');
  const high = switchBox(frame, model, 'use_high', 'at most high');
  return [
    section(
      'Interval',
      model.get('use_interval'),
      guide,
      paperSelect(model),
      ...numbers('lo', 'hi'),
    ),
    section('Cycles and warm-up', false, ...numbers('cycles', 'decay', 'warmup', 'warmup_start')),
    section('Clamp', false, low, ...numbers('low'), high, ...numbers('high')),
    section('Noise levels', false, levels.root, ...numbers('sigma_min', 'sigma_max', 'rho')),
  ];
}

// Sends the settings to the live model; shown when one has been started on this page.
function sendButton(frame, model) {
  const send = () => {
    const detail = settingsOf(model);
    if (!problem(detail)) document.dispatchEvent(new CustomEvent('explorer-schedule', { detail }));
  };
  const node = button({ label: 'Use in the live model', onClick: send });
  const show = () => (node.hidden = !document.querySelector('.explorer[data-live]'));
  document.addEventListener('explorer-live', show);
  frame.onCleanup(() => document.removeEventListener('explorer-live', show));
  show();
  return node;
}

// ---------------------------------------------------------------------------- words

function costText({ ws, nfe }) {
  const two = nfe - ws.length;
  const one = ws.length - two;
  const steps = (n) => `${n} step${n === 1 ? '' : 's'}`;
  const parts = [two && `two in ${steps(two)}`, one && `one in ${steps(one)}`];
  return `${nfe} network evaluations per picture: ${parts.filter(Boolean).join(', ')}`;
}

function stepText({ ws, sigmas }, i) {
  const place = `step ${i}, sigma ${formatNumber(sigmas[i])}`;
  return `${place}: w = ${formatNumber(ws[i], 4)}`;
}

// ---------------------------------------------------------------------------- all together

function render({ model, el }) {
  withDefaults(model, DEFAULTS);
  const frame = mount(el, 'Schedule designer');
  let design = { ws: [1], sigmas: [1], nfe: 1 };
  let isDragging = false;
  let yRange = [0, 10];

  const redraw = oncePerFrame(draw);
  const overSteps = new Plot(frame, { title: 'w over steps', xLabel: 'step', redraw });
  const xLabel = 'sigma, the noise level';
  const overSigma = new Plot(frame, { title: 'w over sigma', xLabel, redraw });
  const plots = [overSteps, overSigma];
  const handles = new PointHandles(model, overSteps);
  const interval = new IntervalBand(model, overSigma);

  const cost = element('p', { 'aria-live': 'polite', style: 'font-weight: 600' });
  const step = element('p', { class: 'note', style: 'min-height: 1.4em' });
  const code = element('pre', { tabindex: 0, 'aria-label': 'Python' });

  function draw() {
    const settings = settingsOf(model);
    const wrong = problem(settings);
    if (wrong) {
      cost.textContent = wrong;
      return;
    }
    design = designed(settings);
    cost.textContent = costText(design);
    code.textContent = pythonCode(settings);
    if (plots.every((plot) => plot.width)) drawPlots();
  }

  function drawPlots() {
    const { ws, sigmas } = design;
    const drawn = model.get('family') === 'points_sched' ? model.get('points') : [];
    if (!isDragging) yRange = weightRange([...ws, ...drawn.map(([, w]) => w)]);
    overSteps.setRanges([0, Math.max(1, ws.length - 1)], yRange, false);
    const ends = sigmas.length > 1 ? [sigmas[0], sigmas.at(-1)] : [sigmas[0] * 2, sigmas[0] / 2];
    overSigma.setRanges(ends, yRange, true);
    for (const plot of plots) plot.drawAxis();
    overSteps.drawCurve([...ws.keys()], ws);
    overSigma.drawCurve(sigmas, ws);
    handles.draw();
    interval.draw();
    mark(-1);
  }

  function mark(i) {
    for (const plot of plots) plot.mark(i);
    step.textContent = i < 0 ? '' : stepText(design, i);
  }

  for (const plot of plots) {
    plot.svg.addEventListener('pointermove', (event) => {
      if (!isDragging && plot.points) mark(plot.nearest(event));
    });
    plot.svg.addEventListener('pointerleave', () => mark(-1));
    plot.svg.addEventListener('pointerdown', (event) => {
      isDragging = Boolean(event.target.closest('.handle'));
    });
    plot.svg.addEventListener('lostpointercapture', () => {
      isDragging = false;
      redraw();
    });
  }
  overSteps.svg.addEventListener('dblclick', (event) => {
    if (model.get('family') !== 'points_sched' || event.target.closest('.handle')) return;
    const box = overSteps.svg.getBoundingClientRect();
    const at = overSteps.x.invert(event.clientX - box.left) - model.get('warmup');
    const tau = Math.min(1, Math.max(0, at / handles.lastStep()));
    handles.insert(tau, overSteps.y.invert(event.clientY - box.top));
  });

  const byHand = button({
    label: 'Draw by hand',
    hint: 'turn this curve into points that can be dragged',
    onClick: () => {
      const points = asPoints(settingsOf(model));
      change(model, { points, kind: 'pchip', family: 'points_sched' });
    },
  });
  const more = button({ label: 'Add a point', onClick: () => handles.insert() });
  const fewer = button({ label: 'Remove the point', onClick: () => handles.remove() });
  const help = element(
    'span',
    { class: 'note' },
    'Drag the points, or use Tab and the arrow keys.',
  );

  function showButtons() {
    const isDrawn = model.get('family') === 'points_sched';
    byHand.hidden = isDrawn;
    for (const node of [more, fewer, help]) node.hidden = !isDrawn;
  }

  onChange(frame, model, Object.keys(DEFAULTS), redraw);
  onChange(frame, model, ['family'], showButtons);
  showButtons();
  const copy = copyButton(() => code.textContent, 'Copy the Python');
  el.append(
    familySelect(frame, model, 'family').root,
    element('div', { class: 'columns' }, ...plots.map((plot) => plot.root)),
    element('div', { class: 'row' }, cost, step),
    element('div', { class: 'row' }, byHand, more, fewer, help),
    familyControls(frame, model, { common: ['num_steps'] }).root,
    ...otherSections(frame, model),
    code,
    element('div', { class: 'row' }, copy, sendButton(frame, model)),
  );
  redraw();
  return frame.cleanup;
}

export default { render };

// Rule geometry: drag two predictions in the plane, and see what each rule makes of them.
import { mount, withDefaults, onChange, change, bind, onWidth, oncePerFrame } from './common.js';
import { element, svgElement, slider, checkbox, roundHandle } from './common.js';
import { formatNumber, scale, pathThrough } from './common.js';
import { length, angle } from './rule_math.js';
import { RULES, DEFAULTS, predictions, trace } from './rule_plane.js';

const MOST = { w: 15, w_t: 2 };
const SLIDERS = {
  w: {
    min: 0,
    max: MOST.w,
    step: 0.1,
    least: -100,
    most: 100,
    hint: 'of all other rules',
  },
  w_t: {
    ...{ min: 0, max: MOST.w_t, step: 0.01, least: -100, most: 100 },
    hint: 'of T-Norm, Full Norm',
  },
  phi: { min: 0, max: 1, step: 0.05, hint: 'how much of rescale' },
  eta: { min: 0, max: 1, step: 0.05, least: -10, most: 10, hint: 'parallel part kept by APG' },
  radius: { min: 0, max: 3, step: 0.05, most: 100, hint: 'longest delta of APG; 0: no limit' },
  most: { min: 0, max: 3.14, step: 0.01, most: Math.PI, hint: 'largest turn of ADG, in radians' },
};

function settingsOf(model) {
  return Object.fromEntries(Object.keys(DEFAULTS).map((name) => [name, model.get(name)]));
}

function colourOf(name) {
  return `var(--s${Object.keys(RULES).indexOf(name)})`;
}

// How far the plane reaches: in steps, so that it does not move with every small change.
function reach(vectors) {
  const far = 1.1 * Math.max(0.5, ...vectors.map(length));
  return 2 ** (Math.ceil(4 * Math.log2(far)) / 4);
}

// ---------------------------------------------------------------------------- the plane

class Plane {
  constructor(frame, model, redraw) {
    this.model = model;
    this.isDragging = false;
    this.drawing = svgElement('g', { 'aria-hidden': 'true', 'clip-path': 'url(#rule-plane)' });
    this.clip = svgElement('rect', {});
    const clipPath = svgElement('clipPath', { id: 'rule-plane' }, this.clip);
    this.handles = { neg: this.handle('neg', 'negative'), pos: this.handle('pos', 'positive') };
    const label = { role: 'group', 'aria-label': 'predictions in the plane' };
    const defs = svgElement('defs', {}, clipPath);
    const nodes = Object.values(this.handles);
    this.svg = svgElement('svg', label, defs, this.drawing, ...nodes);
    this.svg.addEventListener('pointerdown', (event) => {
      this.isDragging = Boolean(event.target.closest('.handle'));
    });
    this.svg.addEventListener('lostpointercapture', () => {
      this.isDragging = false;
      redraw();
    });
    this.root = element('div', {}, this.svg);
    onWidth(frame, this.root, (width) => {
      this.size = Math.min(width, 460);
      const box = { width: this.size, height: this.size };
      for (const [name, value] of Object.entries(box)) {
        this.svg.setAttribute(name, value);
        this.clip.setAttribute(name, value);
      }
      redraw();
    });
  }

  handle(name, label) {
    const move = (x, y) => {
      const inside = (v) => Math.min(this.reach, Math.max(-this.reach, v));
      change(this.model, { [name]: [x, y].map((v) => Number(inside(v).toFixed(3))) });
    };
    return roundHandle({
      label: `${label} prediction`,
      onMove: (px, py) => move(this.x.invert(px), this.y.invert(py)),
      onKey: (dx, dy) => {
        const [x, y] = this.model.get(name);
        move(x + dx / 20, y + dy / 20);
      },
    });
  }

  draw(settings, points) {
    if (!this.size) return;
    const shown = settings.rules.map((name) => points[name]);
    if (!this.isDragging) this.reach = reach([settings.neg, settings.pos, ...shown]);
    this.x = scale([-this.reach, this.reach], [0, this.size]);
    this.y = scale([-this.reach, this.reach], [this.size, 0]);
    this.drawing.replaceChildren(
      ...this.axes(),
      ...this.circles(settings),
      ...settings.rules.flatMap((name) => this.rule(name, settings, points[name])),
      ...this.arrow(settings.neg, 'negative'),
      ...this.arrow(settings.pos, 'positive'),
    );
    for (const [name, node] of Object.entries(this.handles)) {
      const [x, y] = settings[name];
      node.setAttribute('transform', `translate(${this.x(x)} ${this.y(y)})`);
      const place = `${formatNumber(x)}, ${formatNumber(y)}`;
      node.setAttribute('aria-valuetext', place);
      node.setAttribute('aria-valuenow', formatNumber(length(settings[name])));
    }
  }

  axes() {
    const middle = this.size / 2;
    const across = { class: 'grid', x1: 0, x2: this.size, y1: middle, y2: middle };
    const up = { class: 'grid', y1: 0, y2: this.size, x1: middle, x2: middle };
    return [svgElement('line', across), svgElement('line', up)];
  }

  // The lengths of the two predictions, which some rules keep.
  circles({ neg, pos }) {
    return [neg, pos].map((v) => {
      const r = this.x(length(v)) - this.x(0);
      const place = { cx: this.size / 2, cy: this.size / 2, r, fill: 'none' };
      return svgElement('circle', { ...place, stroke: 'var(--faint)', 'stroke-dasharray': '3 4' });
    });
  }

  place([x, y]) {
    return [this.x(x), this.y(y)];
  }

  arrow(v, label) {
    const [x2, y2] = this.place(v);
    const middle = this.size / 2;
    const line = { x1: middle, y1: middle, x2, y2, stroke: 'var(--text)', 'stroke-width': 2.5 };
    const side = x2 > this.size - 80 ? -1 : 1;
    const text = { x: x2 + 13 * side, y: y2 - 8, 'text-anchor': side < 0 ? 'end' : 'start' };
    return [svgElement('line', line), svgElement('text', text, label)];
  }

  rule(name, settings, point) {
    const most = Math.max(MOST[RULES[name].own], settings[RULES[name].own]);
    const path = pathThrough(trace(name, settings, most).map((v) => this.place(v)));
    const line = { d: path, fill: 'none', stroke: colourOf(name), 'stroke-width': 2 };
    const [cx, cy] = this.place(point);
    const dot = { cx, cy, r: 6, fill: colourOf(name), stroke: 'var(--back)', 'stroke-width': 1.5 };
    return [svgElement('path', { ...line, opacity: 0.55 }), svgElement('circle', dot)];
  }
}

// ---------------------------------------------------------------------------- the table

// A row per rule: whether it is shown, its prediction, its length, its angle to the positive.
class RuleTable {
  constructor(model) {
    this.model = model;
    const heads = ['rule', 'x', 'y', 'length', 'turned'];
    const head = element('tr', {}, ...heads.map((o) => element('th', { scope: 'col' }, o)));
    const rows = Object.keys(RULES).map((name) => this.row(name));
    this.cells = Object.fromEntries(rows.map(({ name, cells }) => [name, cells]));
    this.boxes = Object.fromEntries(rows.map(({ name, box }) => [name, box]));
    const body = element('tbody', {}, ...rows.map(({ root }) => root));
    const table = element('table', {}, element('thead', {}, head), body);
    this.root = element('div', { class: 'scroll' }, table);
  }

  row(name) {
    const box = checkbox({ label: RULES[name].title, colour: colourOf(name) });
    box.onInput = (on) => {
      const others = this.model.get('rules').filter((o) => o !== name);
      change(this.model, { rules: on ? [...others, name] : others });
    };
    const cells = Array.from({ length: 4 }, () => element('td'));
    return { name, box, cells, root: element('tr', {}, element('td', {}, box.root), ...cells) };
  }

  draw(settings, points) {
    for (const [name, cells] of Object.entries(this.cells)) {
      const point = points[name];
      const degrees = (180 / Math.PI) * angle(point, settings.pos);
      const texts = [...point, length(point)].map((v) => formatNumber(v, 3));
      [...texts, `${degrees.toFixed(0)}°`].forEach((text, i) => (cells[i].textContent = text));
      this.boxes[name].set(settings.rules.includes(name));
    }
  }
}

function render({ model, el }) {
  withDefaults(model, DEFAULTS);
  const frame = mount(el, 'Rule geometry');
  const redraw = oncePerFrame(() => {
    const settings = settingsOf(model);
    const points = predictions(settings);
    plane.draw(settings, points);
    table.draw(settings, points);
  });
  const plane = new Plane(frame, model, redraw);
  const table = new RuleTable(model);
  const sliders = Object.entries(SLIDERS).map(
    ([name, range]) => bind(frame, model, name, slider({ label: name, ...range })).root,
  );
  const help =
    'Drag the ends of the arrows, or use Tab and the arrow keys. A line shows where a rule leads ' +
    'as its weight grows from 0; the dashed circles have the lengths of the two predictions.';
  const [w, w_t, ...others] = sliders;
  const weights = element('div', { class: 'controls' }, w, w_t);
  const controls = element('div', { class: 'controls', style: 'margin-top: 0.6rem' }, ...others);
  const numbers = [table.root, element('p', { class: 'note' }, help), controls];
  const picture = element('div', {}, plane.root, weights);
  el.append(element('div', { class: 'columns' }, picture, element('div', {}, ...numbers)));
  onChange(frame, model, Object.keys(DEFAULTS), redraw);
  redraw();
  return frame.cleanup;
}

export default { render };

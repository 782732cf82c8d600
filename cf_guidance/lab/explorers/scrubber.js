// Scrubber: drag one setting of a sweep; its pictures flip one by one, its curves are smooth.
import { mount, withDefaults, onChange, change, onWidth, oncePerFrame } from './common.js';
import { element, svgElement, select, button, makeHandle } from './common.js';
import { formatNumber, shortest, scale, ticks, pathThrough } from './common.js';

const DEFAULTS = { sweeps: [], labels: [], sweep: 0, index: 0 };
const MARGIN = { left: 38, right: 14, top: 24, bottom: 24 };
const HEIGHT = 150;

function currentSweep(model) {
  const sweeps = model.get('sweeps');
  return sweeps[Math.min(model.get('sweep'), sweeps.length - 1)];
}

function currentIndex(model) {
  return Math.min(model.get('index'), currentSweep(model).values.length - 1);
}

// ---------------------------------------------------------------------------- pictures

// A row of the sprite: shows the tile of one value.
class Tile {
  constructor(label) {
    this.picture = element('div', { class: 'tile', role: 'img' });
    const caption = label ? element('figcaption', {}, label) : null;
    this.label = label;
    this.root = element('figure', { title: label || null }, this.picture, caption);
  }

  // Which row of which sprite.
  use(sweep, row) {
    this.sweep = sweep;
    this.row = row;
    const { style } = this.picture;
    style.backgroundImage = `url("${new URL(sweep.sprite, import.meta.url)}")`;
    style.backgroundSize = `${100 * sweep.values.length}% ${100 * sweep.rows}%`;
    style.aspectRatio = String(sweep.aspect ?? 1);
  }

  show(index) {
    const { values, rows, marks } = this.sweep;
    const share = (i, n) => (n > 1 ? (100 * i) / (n - 1) : 0);
    const place = `${share(index, values.length)}% ${share(this.row, rows)}%`;
    this.picture.style.backgroundPosition = place;
    const mark = marks?.[this.row]?.[index];
    this.picture.classList.toggle('right', mark === true);
    this.picture.classList.toggle('wrong', mark === false);
    const words = { true: ', right', false: ', wrong' }[mark] ?? '';
    this.picture.setAttribute('aria-label', `${this.label || `picture ${this.row + 1}`}${words}`);
  }
}

const TILE_STYLES = `
.explorer .tiles { display: grid; gap: 6px; margin: 0.6rem 0; }
.explorer figure { margin: 0; min-width: 0; }
.explorer .tile { width: 100%; image-rendering: pixelated; border-radius: 4px;
  border: 3px solid transparent; background-origin: content-box; background-clip: content-box;
  transition: border-color 0.15s; }
.explorer .tile.right { border-color: var(--good); }
.explorer .tile.wrong { border-color: var(--bad); border-style: dashed; }
.explorer figcaption { font-size: 11px; line-height: 1.2; color: var(--faint);
  overflow: hidden; text-overflow: ellipsis; margin: 2px 0 0; text-align: center; }
@container (max-width: 639px) { .explorer figcaption { display: none; } }
.explorer .now { font-weight: 600; min-width: 6.5rem; font-variant-numeric: tabular-nums; }
.explorer input[type='range'].wide { flex: 1 1 12rem; }
`;

// Rows of equal length, with tiles that are not too small.
function columnsFor(count, width) {
  const least = width < 600 ? 50 : 84;
  const most = Math.max(1, Math.floor(width / least));
  return Math.ceil(count / Math.ceil(count / most));
}

// ---------------------------------------------------------------------------- curves

// One curve over the setting, with a line at the value that is shown.
class CurvePlot {
  constructor(frame, model, number, redraw) {
    this.model = model;
    this.number = number;
    this.drawing = svgElement('g', { 'aria-hidden': 'true' });
    this.cursor = makeHandle(svgElement('g'), {
      label: 'value shown',
      onMove: (x) => this.pick(x),
      onKey: (dx, dy) => step(model, dx + dy),
    });
    this.svg = svgElement('svg', { height: HEIGHT }, this.drawing, this.cursor);
    this.svg.addEventListener('pointerdown', (event) => {
      if (!event.target.closest('.handle')) {
        this.pick(event.clientX - this.svg.getBoundingClientRect().left);
      }
    });
    this.root = element('div', {}, this.svg);
    onWidth(frame, this.root, (width) => {
      this.width = width;
      this.svg.setAttribute('width', width);
      redraw();
    });
  }

  pick(x) {
    const distances = currentSweep(this.model).values.map((v) => Math.abs(this.x(v) - x));
    change(this.model, { index: distances.indexOf(Math.min(...distances)) });
  }

  draw() {
    const { values, curves, name } = currentSweep(this.model);
    const curve = curves[this.number];
    if (!curve || !this.width) return;
    const index = currentIndex(this.model);
    this.x = scale([values[0], values.at(-1)], [MARGIN.left, this.width - MARGIN.right]);
    this.y = scale(curveRange(curve), [HEIGHT - MARGIN.bottom, MARGIN.top]);
    const colour = `var(--s${this.number})`;
    const parts = [...this.axes(values, curve, name), ...this.line(values, curve, colour)];
    const y = curve.ys[index];
    const title = { x: MARGIN.left, y: 12, style: `fill: ${colour}; font-weight: 600` };
    const spread = curve.spread ? ` ± ${formatNumber(curve.spread[index], 2)}` : '';
    parts.push(svgElement('text', title, `${curve.label}: ${formatNumber(y, 3)}${spread}`));
    this.drawing.replaceChildren(...parts);
    this.drawCursor(values[index], y, colour);
  }

  axes(values, curve, name) {
    const rows = ticks(...curveRange(curve), 3).map((v) => {
      const y = this.y(v);
      const line = { class: 'grid', x1: MARGIN.left, x2: this.width - MARGIN.right, y1: y, y2: y };
      const text = { x: MARGIN.left - 6, y: y + 4, 'text-anchor': 'end' };
      return [svgElement('line', line), svgElement('text', text, formatNumber(v))];
    });
    const columns = ticks(values[0], values.at(-1), 5).map((v) => {
      const text = { x: this.x(v), y: HEIGHT - 6, 'text-anchor': 'middle' };
      return svgElement('text', text, formatNumber(v));
    });
    const end = { x: this.width - MARGIN.right, y: 12, 'text-anchor': 'end' };
    return [...rows.flat(), ...columns, svgElement('text', end, `over ${name}`)];
  }

  line(values, { ys, spread }, colour) {
    const known = values.map((v, i) => [v, ys[i], spread?.[i] ?? 0]).filter((o) => o[1] !== null);
    const at = (side) => known.map(([v, y, s]) => [this.x(v), this.y(y + side * s)]);
    const band = { d: `${pathThrough([...at(1), ...at(-1).reverse()])}Z`, fill: colour };
    const path = { d: pathThrough(at(0)), fill: 'none', stroke: colour, 'stroke-width': 2 };
    const parts = spread ? [svgElement('path', { ...band, opacity: 0.15 })] : [];
    return [...parts, svgElement('path', path)];
  }

  drawCursor(value, y, colour) {
    const x = this.x(value);
    const ends = { x1: x, x2: x, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom };
    const reach = { class: 'reach', x: x - 18, y: MARGIN.top, width: 36, height: HEIGHT - 48 };
    const line = svgElement('line', { ...ends, stroke: 'var(--faint)' });
    const dot = { class: 'dot', cx: x, cy: y === null ? HEIGHT / 2 : this.y(y), r: 7 };
    const parts = [line, svgElement('rect', reach)];
    const round = svgElement('circle', { ...dot, style: `stroke: ${colour}` });
    this.cursor.replaceChildren(...parts, round);
    this.cursor.setAttribute('aria-valuenow', shortest(value));
  }
}

// From 0 to 1 for a share, else the range of the curve with some room.
function curveRange({ ys, spread }) {
  const known = ys.map((y, i) => [y, spread?.[i] ?? 0]).filter(([y]) => y !== null);
  const low = Math.min(...known.map(([y, s]) => y - s));
  const high = Math.max(...known.map(([y, s]) => y + s));
  if (low >= 0 && high <= 1 && high > 0.5) return [0, 1];
  const room = 0.08 * (high - low || 1);
  return [low >= 0 && low < 0.5 * high ? 0 : low - room, high + room];
}

// ---------------------------------------------------------------------------- the value shown

function step(model, by) {
  const last = currentSweep(model).values.length - 1;
  change(model, { index: Math.max(0, Math.min(last, currentIndex(model) + by)) });
}

// A button that runs through all values, and stops when it is pressed again.
function playButton(frame, model) {
  let timer = null;
  const node = button({ label: 'Play' });
  const stop = () => {
    clearInterval(timer);
    timer = null;
    node.textContent = 'Play';
  };
  const forward = () => {
    const last = currentSweep(model).values.length - 1;
    if (currentIndex(model) === last) stop();
    else step(model, 1);
  };
  node.addEventListener('click', () => {
    if (timer) return stop();
    const last = currentSweep(model).values.length - 1;
    if (currentIndex(model) === last) change(model, { index: 0 });
    node.textContent = 'Stop';
    timer = setInterval(forward, 400);
  });
  frame.onCleanup(stop);
  return node;
}

function countText({ marks, rows }, index) {
  if (!marks?.length) return '';
  const right = marks.filter((row) => row[index]).length;
  return `${right} of ${rows} right`;
}

function render({ model, el }) {
  withDefaults(model, DEFAULTS);
  const frame = mount(el, 'Pictures of a sweep');
  el.prepend(element('style', {}, TILE_STYLES));
  const redraw = oncePerFrame(draw);

  const rangeInput = { type: 'range', class: 'wide', min: 0, step: 1 };
  const range = element('input', rangeInput);
  range.addEventListener('input', () => change(model, { index: range.valueAsNumber }));
  const now = element('span', { class: 'now' });
  const count = element('span', { 'aria-live': 'polite' });
  const tiles = element('div', { class: 'tiles' });
  onWidth(frame, tiles, (width) => {
    const columns = columnsFor(currentSweep(model).rows, width);
    tiles.style.gridTemplateColumns = `repeat(${columns}, minmax(0, 1fr))`;
  });
  const plots = element('div', { class: 'columns' });
  const note = element('p', { class: 'note' });
  const names = model.get('sweeps').map(({ title }, i) => [i, title]);
  const choose = select({
    label: 'sweep',
    options: names,
    value: model.get('sweep'),
    onInput: (sweep) => change(model, { sweep }),
  });
  let shown = { tiles: [], plots: [] };

  // Everything that depends on which sweep it is.
  function showSweep() {
    const sweep = currentSweep(model);
    choose.set(model.get('sweep'));
    range.max = sweep.values.length - 1;
    range.setAttribute('aria-label', sweep.name);
    note.textContent = sweep.note ?? '';
    const labels = model.get('labels');
    shown = {
      tiles: Array.from({ length: sweep.rows }, (_, row) => new Tile(labels[row])),
      plots: sweep.curves.map((_, i) => new CurvePlot(frame, model, i, redraw)),
    };
    shown.tiles.forEach((tile, row) => tile.use(sweep, row));
    tiles.replaceChildren(...shown.tiles.map((tile) => tile.root));
    plots.replaceChildren(...shown.plots.map((plot) => plot.root));
    plots.style.gridTemplateColumns = sweep.curves.length === 1 ? 'minmax(0, 1fr)' : null;
    draw();
  }

  function draw() {
    const sweep = currentSweep(model);
    const index = currentIndex(model);
    range.value = index;
    const value = formatNumber(sweep.values[index], 4);
    range.setAttribute('aria-valuetext', value);
    now.textContent = `${sweep.name} = ${value}`;
    count.textContent = countText(sweep, index);
    for (const tile of shown.tiles) tile.show(index);
    for (const plot of shown.plots) plot.draw();
  }

  onChange(frame, model, ['sweep', 'sweeps', 'labels'], showSweep);
  onChange(frame, model, ['index'], redraw);
  const top = element('div', { class: 'row' }, now, range, playButton(frame, model), count);
  el.append(...(names.length > 1 ? [choose.root] : []), top, tiles, plots, note);
  showSweep();
  return frame.cleanup;
}

export default { render };

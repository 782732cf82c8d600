// The page of a gallery: thousands of pictures in a grid whose axes the reader chooses. Only the
// pictures in sight are elements of the page. All text comes from data and is set as text.
import { mount, oncePerFrame, element, select, slider, button, copyButton } from './common.js';
import { formatNumber } from './common.js';
import { axisNamed, named, valueOf, isListed, filtered, arranged } from './gallery_table.js';
import { linkOf, stateOf } from './gallery_link.js';

const STYLES = `
body { margin: 0; background: #fff; }
@media (prefers-color-scheme: dark) { body { background: #1b2028; } }
.explorer.gallery { border: 0; border-radius: 0; margin: 0; padding: 0.6rem 0.8rem;
  display: flex; flex-direction: column; gap: 0.4rem; height: 100dvh; overflow-y: auto; }
.gallery [hidden] { display: none; }
.gallery .controls { grid-template-columns: repeat(auto-fill, minmax(min(100%, 10rem), 1fr)); }
.gallery h1 { font-size: 1.15rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
.gallery .top { display: flex; flex-wrap: wrap; gap: 0.2rem 1rem; align-items: baseline; }
.gallery .filters { margin-top: 0.6rem; }
.gallery .values { max-height: 9rem; overflow-y: auto; overflow-wrap: anywhere; }
.gallery .values .check { display: flex; align-items: start; min-height: 26px; }
.gallery .tabs { display: flex; gap: 0.3rem; overflow-x: auto; flex: none; padding: 3px; }
.gallery .tabs button { flex: none; max-width: 20rem; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.gallery [aria-selected='true'] { background: var(--accent); color: var(--back); }
.gallery .held { display: flex; flex-wrap: wrap; gap: 0.2rem 0.8rem; align-items: center; }
.gallery .held span { overflow-wrap: anywhere; }
.gallery .stage { position: relative; flex: 1 0 auto; height: 0; min-height: 55dvh; overflow: auto;
  border: 1px solid var(--line); border-radius: 6px; }
.gallery .head { position: absolute; overflow: hidden; text-overflow: ellipsis; font-size: 12.5px;
  line-height: 1.25; color: var(--faint); }
.gallery .columns-head { position: sticky; top: 0; z-index: 2; height: 24px; min-width: 100%;
  background: var(--soft); }
.gallery .columns-head .head { white-space: nowrap; text-align: center; padding: 4px 2px; }
.gallery .row-heads { position: sticky; left: 0; z-index: 1; width: 0; height: 0; }
.gallery .row-head { overflow-wrap: anywhere; padding: 0 6px 0 4px; background: var(--back); }
.gallery .row-head.above { white-space: nowrap; }
.gallery .cell { position: absolute; display: block; padding: 0; min-height: 0; border: 0;
  background: none; border-radius: 2px; text-align: center; }
.gallery .cell .caption { display: block; font-size: 11px; line-height: 16px; overflow: hidden;
  white-space: nowrap; text-overflow: ellipsis; color: var(--faint); }
.gallery .picture { display: block; width: 100%; background-repeat: no-repeat; }
.gallery .crisp { image-rendering: pixelated; }
.gallery .picture.failed { display: grid; place-content: center; overflow: hidden; font-size: 12px;
  border: 1px dashed var(--bad); color: var(--bad); background: var(--soft); }
.gallery .held-one { outline: 3px solid var(--accent); outline-offset: -1px; }
.gallery dialog { width: min(70rem, 100vw - 1rem); max-width: none; max-height: calc(100dvh - 1rem);
  margin: auto; padding: 0.8rem; border: 1px solid var(--line); border-radius: 8px;
  background: var(--back); color: var(--text); overflow: auto; }
.gallery dialog::backdrop { background: rgb(0 0 0 / 55%); }
.gallery dialog h2 { font-size: 1rem; line-height: 1.3; margin: 0 0 0.3rem;
  overflow-wrap: anywhere; }
.gallery .two { display: grid; gap: 0.6rem 1.2rem; grid-template-columns: minmax(0, 1fr); }
.gallery .two > * { min-width: 0; }
@media (min-width: 720px) { .gallery .two { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
.gallery .view { width: min(100%, 62dvh); margin: 0 auto; }
.gallery .pair { display: grid; gap: 4px; grid-template-columns: 1fr 1fr; }
.gallery .over { position: relative; }
.gallery .over > :nth-child(2) { position: absolute; inset: 0; }
.gallery .over.slider > :nth-child(2) { clip-path: inset(0 0 0 var(--split)); }
.gallery .over.first > :nth-child(2), .gallery .over.second > :nth-child(1) { visibility: hidden; }
.gallery .view img { display: block; width: 100%; }
.gallery td, .gallery th { white-space: normal; overflow-wrap: anywhere; }
.gallery td:first-child { white-space: nowrap; }
.gallery td.other { font-weight: 600; }
.gallery pre { max-height: 16rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.gallery input[type='range'].split { width: 100%; }
`;

const NARROW = 640; // pixels of the window
const [HEAD, CAPTION, GAP] = [24, 16, 4]; // pixels

// ---------------------------------------------------------------------------- pictures

// Picture i, cut out of its sheet; it fills the width of its place.
function picture(data, i) {
  const ratio = `aspect-ratio: ${data.tile.width} / ${data.tile.height};`;
  if (data.place[i] < 0) return failedPicture(ratio);
  const { across, down } = data.tile;
  const sheet = Math.floor(data.place[i] / (across * down));
  const inSheet = data.place[i] % (across * down);
  const share = (k, n) => (n > 1 ? (100 * k) / (n - 1) : 0);
  const x = share(inSheet % across, across);
  const y = share(Math.floor(inSheet / across), down);
  const style = [
    ratio,
    `background-image: url("sheets/${sheet}.webp");`,
    `background-size: ${100 * across}% ${100 * down}%;`,
    `background-position: ${x}% ${y}%`,
  ];
  const crisp = data.tile.width <= 64 ? 'picture crisp' : 'picture';
  return element('span', { class: crisp, style: style.join('') });
}

function failedPicture(style) {
  return element('span', { class: 'picture failed', style }, 'failed');
}

// Picture i in its full size.
function largePicture(data, i) {
  const image = { role: 'img', 'aria-label': describe(data, i) };
  if (!data.full[data.place[i]]) {
    const node = picture(data, i);
    for (const [name, value] of Object.entries(image)) node.setAttribute(name, value);
    return node;
  }
  return element('img', { src: `pictures/${data.place[i]}.webp`, alt: image['aria-label'] });
}

// The values that tell picture i apart. With another picture: those they share, or do not share.
function describe(data, i, other = null, shared = true) {
  const varying = data.axes.filter((axis) => axis.varies);
  const axes = varying.filter(
    (axis) => other === null || (axis.of[i] === axis.of[other]) === shared,
  );
  const words = axes.map((axis) => named(axis, axis.of[i]));
  if (data.place[i] < 0 && (other === null || !shared)) words.push('failed');
  return words.join(', ') || `picture ${i + 1}`;
}

// ---------------------------------------------------------------------------- the grid

// The pictures of an arrangement, of which only those in sight are elements. `onOpen(i)` is called
// for a picture that is chosen.
class Stage {
  constructor(data, onOpen) {
    Object.assign(this, { data, onOpen, size: 96, caption: null, held: null, active: 0 });
    this.nodes = new Map();
    this.heads = element('div', { class: 'columns-head' });
    this.space = element('div', { style: 'position: relative' });
    this.rowHeads = element('div', { class: 'row-heads' });
    const group = { class: 'stage', role: 'group', 'aria-label': 'Pictures' };
    this.root = element('div', group, this.heads, this.rowHeads, this.space);
    const draw = oncePerFrame(() => this.draw());
    this.root.addEventListener('scroll', draw, { passive: true });
    this.root.addEventListener('keydown', (event) => this.onKey(event));
    this.redraw = oncePerFrame(() => this.layOut());
  }

  // Pictures that fit beside one another.
  get across() {
    const room = this.root.clientWidth || window.innerWidth;
    return Math.max(1, Math.floor((room - GAP) / (this.size + GAP)));
  }

  show(arrangement) {
    this.arrangement = arrangement;
    const { at } = arrangement;
    if (!(at[this.active] >= 0))
      this.active = Math.max(
        0,
        at.findIndex((i) => i >= 0),
      );
    this.root.scrollTo(0, 0);
    this.layOut();
  }

  // The sizes of everything, then the pictures anew.
  layOut() {
    const { rows, columns } = this.arrangement;
    const headed = rows.some(Boolean);
    const narrow = window.innerWidth < NARROW;
    const ratio = this.data.tile.height / this.data.tile.width;
    this.left = headed && !narrow ? 150 : GAP;
    this.above = headed && narrow ? 20 : 0;
    this.height = Math.round(this.size * ratio) + (this.caption ? CAPTION : 0);
    this.step = { x: this.size + GAP, y: this.height + this.above + GAP };
    this.heads.hidden = !columns.some(Boolean);
    const width = this.left + columns.length * this.step.x;
    this.space.style.width = this.heads.style.width = `${width}px`;
    this.space.style.height = `${rows.length * this.step.y + GAP}px`;
    this.nodes.forEach((node) => node.remove());
    this.nodes.clear();
    this.draw();
  }

  // First and last row and column in sight, and one more on each side.
  inSight() {
    const { scrollTop, scrollLeft, clientHeight, clientWidth } = this.root;
    const range = (from, room, step, count) => [
      Math.max(0, Math.floor(from / step) - 1),
      Math.min(count - 1, Math.floor((from + room) / step) + 1),
    ];
    const { rows, columns } = this.arrangement;
    return {
      rows: range(scrollTop, clientHeight, this.step.y, rows.length),
      columns: range(scrollLeft - this.left, clientWidth, this.step.x, columns.length),
    };
  }

  // Make the elements that came into sight, and take away those that left it.
  draw() {
    const wanted = new Map();
    const sight = this.inSight();
    const { rows, columns, at } = this.arrangement;
    for (let r = sight.rows[0]; r <= sight.rows[1]; r++) {
      if (rows[r]) wanted.set(`row ${r}`, () => this.rowHead(r));
      for (let c = sight.columns[0]; c <= sight.columns[1]; c++) {
        const k = r * columns.length + c;
        if (at[k] >= 0) wanted.set(k, () => this.cell(k));
      }
    }
    for (let c = sight.columns[0]; c <= sight.columns[1]; c++) {
      if (columns[c]) wanted.set(`column ${c}`, () => this.columnHead(c));
    }
    if (at[this.active] >= 0) wanted.set(this.active, () => this.cell(this.active));
    for (const [key, node] of this.nodes) {
      if (wanted.has(key)) continue;
      node.remove();
      this.nodes.delete(key);
    }
    for (const [key, make] of wanted) if (!this.nodes.has(key)) this.add(key, make());
  }

  add(key, node) {
    this.nodes.set(key, node);
    const kind = String(key).split(' ')[0];
    (({ column: this.heads, row: this.rowHeads })[kind] ?? this.space).append(node);
  }

  placeOf(k) {
    const width = this.arrangement.columns.length;
    const [r, c] = [Math.floor(k / width), k % width];
    const top = r * this.step.y + this.above + GAP;
    return { r, c, left: this.left + c * this.step.x, top };
  }

  cell(k) {
    const { data, caption } = this;
    const i = this.arrangement.at[k];
    const { left, top } = this.placeOf(k);
    const style = `left: ${left}px; top: ${top}px; width: ${this.size}px; height: ${this.height}px`;
    const number = caption && formatNumber(caption.of[i] ?? NaN);
    const text = caption && element('span', { class: 'caption' }, number);
    const label = describe(data, i) + (caption ? `, ${caption.name} ${number}` : '');
    const about = { type: 'button', 'aria-label': label, title: data.errors[i] ?? label };
    const classes = i === this.held ? 'cell held-one' : 'cell';
    const place = { class: classes, style, tabindex: k === this.active ? 0 : -1, 'data-at': k };
    const node = element('button', { ...about, ...place }, picture(data, i), text);
    node.addEventListener('click', () => this.open(k));
    return node;
  }

  rowHead(r) {
    const text = this.arrangement.rows[r];
    const top = r * this.step.y + GAP;
    const width = this.above ? this.root.clientWidth : this.left - GAP;
    const height = this.above || this.height;
    const style = `top: ${top}px; left: 0; width: ${width}px; height: ${height}px`;
    const classes = this.above ? 'head row-head above' : 'head row-head';
    return element('div', { class: classes, style, title: text }, text);
  }

  columnHead(c) {
    const text = this.arrangement.columns[c];
    const style = `left: ${this.left + c * this.step.x}px; width: ${this.size}px`;
    return element('div', { class: 'head', style, title: text }, text);
  }

  activate(k) {
    this.nodes.get(this.active)?.setAttribute('tabindex', '-1');
    this.active = k;
    this.nodes.get(k)?.setAttribute('tabindex', '0');
  }

  open(k) {
    this.activate(k);
    this.onOpen(this.arrangement.at[k]);
  }

  // The picture dx columns and dy rows further on, over empty places; null at the edge.
  next(dx, dy) {
    const { rows, columns, at } = this.arrangement;
    let { r, c } = this.placeOf(this.active);
    for (;;) {
      [r, c] = [r + dy, c + dx];
      if (r < 0 || c < 0 || r >= rows.length || c >= columns.length) return null;
      if (at[r * columns.length + c] >= 0) return r * columns.length + c;
    }
  }

  // Go to the next picture in a direction; the picture, or null at the edge.
  move(dx, dy) {
    const k = this.next(dx, dy);
    if (k === null) return null;
    this.goTo(k);
    return this.arrangement.at[k];
  }

  goTo(k) {
    this.activate(k);
    this.bringIntoSight(k);
    this.draw();
  }

  bringIntoSight(k) {
    const { left, top } = this.placeOf(k);
    const head = this.heads.hidden ? 0 : HEAD;
    const near = (from, room, start, length) =>
      start < from ? start : start + length > from + room ? start + length - room : from;
    const { scrollTop, scrollLeft, clientHeight, clientWidth } = this.root;
    const upper = top - this.above;
    this.root.scrollTop = near(scrollTop, clientHeight - head, upper, this.step.y + GAP);
    this.root.scrollLeft = near(scrollLeft, clientWidth, left - this.left, this.left + this.step.x);
  }

  onKey(event) {
    const direction = arrow(event);
    if (!direction || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    if (this.move(...direction) !== null) this.focus();
  }

  focus() {
    this.nodes.get(this.active)?.focus({ preventScroll: true });
  }
}

function arrow({ key }) {
  return { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key];
}

// ---------------------------------------------------------------------------- one picture, or two

const WAYS = ['slider', 'flicker', 'side by side'];

// The dialog with a picture, what is known of it, and another picture that it is compared with.
// `onMove(dx, dy)` gives the next picture in a direction, `onShow(i)` is told of the one that is
// shown, and `onHold(i)` of one that is kept.
class Detail {
  constructor(data, { onMove, onShow, onHold, onClose }) {
    Object.assign(this, { data, onMove, onShow, onHold, held: null, way: WAYS[0] });
    this.root = element('dialog', { tabindex: -1, 'aria-label': 'Picture', onclose: onClose });
    this.root.addEventListener('close', () => this.stop());
    this.root.addEventListener('keydown', (event) => this.onKey(event));
  }

  show(i) {
    this.picture = i;
    this.stop();
    const compared = this.held !== null && this.held !== i;
    const left = element('div', {}, this.buttons(compared), compared ? this.pair() : this.single());
    const parts = [this.table(compared), ...this.repeat()];
    const two = element('div', { class: 'two' }, left, element('div', {}, ...parts));
    const title = element('h2', {}, this.title(compared));
    const focused = this.root.open && document.activeElement.textContent;
    this.root.replaceChildren(title, two);
    if (!this.root.open) this.root.showModal();
    const again = [...this.root.querySelectorAll('button')].find((o) => o.textContent === focused);
    (again ?? this.root).focus();
    this.onShow(i);
  }

  title(compared) {
    const [i, j] = [this.held, this.picture];
    if (!compared) return describe(this.data, j);
    const own = [describe(this.data, i, j, false), describe(this.data, j, i, false)];
    return `${describe(this.data, i, j)}: ${own.join(' — ')}`;
  }

  buttons(compared) {
    const go = (dx, label) => button({ label, onClick: () => this.move(dx, 0) });
    const hold = button({
      label: compared ? 'End comparison' : 'Compare with…',
      onClick: () => {
        this.hold(compared ? null : this.picture);
        if (compared) this.show(this.picture);
        else this.root.close();
      },
    });
    const close = button({ label: 'Close', onClick: () => this.root.close(), primary: true });
    const row = element(
      'div',
      { class: 'row' },
      go(-1, '‹ Previous'),
      go(1, 'Next ›'),
      hold,
      close,
    );
    return row;
  }

  hold(i) {
    this.held = i;
    this.onHold(i);
  }

  move(dx, dy) {
    const i = this.onMove(dx, dy);
    if (i !== null) this.show(i);
  }

  onKey(event) {
    const direction = arrow(event);
    if (!direction || event.target.closest('input, select')) return;
    event.preventDefault();
    this.move(...direction);
  }

  single() {
    const error = this.data.errors[this.picture];
    const text = error && element('p', {}, error);
    return element('div', {}, this.view(largePicture(this.data, this.picture)), text);
  }

  view(...children) {
    return element('div', { class: 'view' }, ...children);
  }

  // ------------------------------------------------------------------------ two pictures

  pair() {
    const choose = select({
      label: 'compare by',
      options: WAYS,
      value: this.way,
      onInput: (way) => {
        this.way = way;
        this.show(this.picture);
        this.root.querySelector('select').focus();
      },
    });
    const both = [this.held, this.picture].map((i) => largePicture(this.data, i));
    const made = { slider: () => this.bySlider(both), flicker: () => this.byFlicker(both) };
    const shown = made[this.way]?.() ?? element('div', { class: 'pair' }, ...both);
    return element('div', {}, choose.root, shown);
  }

  bySlider(both) {
    const over = element('div', { class: 'over slider', style: '--split: 50%' }, ...both);
    const range = { type: 'range', class: 'split', min: 0, max: 100, value: 50 };
    const input = element('input', { ...range, 'aria-label': 'part of the first picture' });
    const split = (share) => {
      input.value = share;
      over.style.setProperty('--split', `${share}%`);
    };
    input.addEventListener('input', () => split(input.valueAsNumber));
    over.addEventListener('pointermove', (event) => {
      const box = over.getBoundingClientRect();
      split((100 * (event.clientX - box.left)) / box.width);
    });
    return this.view(over, input);
  }

  // One picture, then the other. They change by themselves unless the reader wants less motion.
  byFlicker(both) {
    const over = element('div', { class: 'over first' }, ...both);
    const name = element('span', { class: 'note' }, 'first');
    const swap = () => {
      const first = over.classList.toggle('first');
      over.classList.toggle('second', !first);
      name.textContent = first ? 'first' : 'second';
    };
    const onClick = () => {
      this.stop();
      swap();
    };
    const still = matchMedia('(prefers-reduced-motion: reduce)').matches;
    if (!still) this.timer = setInterval(swap, 500);
    return this.view(
      over,
      element('div', { class: 'row' }, button({ label: 'Swap', onClick }), name),
    );
  }

  stop() {
    clearInterval(this.timer);
  }

  // ------------------------------------------------------------------------ what is known

  table(compared) {
    const { data } = this;
    const shown = compared ? [this.held, this.picture] : [this.picture];
    const names = ['', ...(compared ? ['first', 'second'] : ['value'])];
    const head = element('tr', {}, ...names.map((text) => element('th', {}, text)));
    const numbers = ({ of }) => shown.map((i) => (of[i] === null ? '–' : formatNumber(of[i], 5)));
    const rows = [
      ...data.axes.map((axis) => [axis.name, shown.map((i) => valueOf(axis, i))]),
      ...data.measurements.map((o) => [o.name, numbers(o)]),
    ];
    return element('table', {}, head, ...rows.map(([name, texts]) => tableRow(name, texts)));
  }

  repeat() {
    const line = this.data.lines[this.picture];
    const request = element('pre', { class: 'request' }, requestText(this.data, this.picture));
    const details = element('details', {}, element('summary', {}, 'Its request'), request);
    if (!line) return [details];
    const text = `${this.data.imports}\n\n${line}`;
    const copy = copyButton(() => text, 'Copy with its imports');
    return [
      element('p', {}, 'This line draws it again: ', copy),
      element('pre', { class: 'line' }, line),
      details,
    ];
  }
}

function tableRow(name, texts) {
  const other = texts.length > 1 && texts[0] !== texts[1] ? 'other' : null;
  const cells = texts.map((text) => element('td', { class: other }, text));
  return element('tr', {}, element('td', {}, name), ...cells);
}

// A request as JSON. Its fields are stored as text, each value once.
function requestText(data, i) {
  const known = data.request.filter(({ of }) => of[i] >= 0);
  const lines = known.map(({ name, values, of }) => `  ${JSON.stringify(name)}: ${values[of[i]]}`);
  return `{\n${lines.join(',\n')}\n}`;
}

// ---------------------------------------------------------------------------- filters

// Checkboxes for a few values, a text field for many. `onFilter(filter)` gets the values that are
// checked or the text, or null for all; `filter` is the first one.
function filterOf(axis, filter, onFilter) {
  return (isListed(axis) ? listFilter : textFilter)(axis, filter, onFilter);
}

function listFilter(axis, filter, onFilter) {
  const boxes = axis.values.map((text) => {
    const checked = filter === null || filter.includes(text);
    const box = element('input', { type: 'checkbox', checked });
    return { box, root: element('label', { class: 'check' }, box, text) };
  });
  const summary = element('summary', {});
  const count = () => {
    const kept = axis.values.filter((_, v) => boxes[v].box.checked);
    const all = kept.length === boxes.length;
    summary.textContent = all ? axis.name : `${axis.name}: ${kept.length} of ${boxes.length}`;
    return all ? null : kept;
  };
  const update = () => onFilter(count());
  count();
  const setAll = (checked) => () => {
    for (const { box } of boxes) box.checked = checked;
    update();
  };
  const all = button({ label: 'All', onClick: setAll(true) });
  const none = button({ label: 'None', onClick: setAll(false) });
  const values = element('div', { class: 'values', onchange: update }, ...boxes.map((o) => o.root));
  return element('details', {}, summary, element('div', { class: 'row' }, all, none), values);
}

function textFilter(axis, filter, onFilter) {
  const hint = axis.numbers ? '1, 5, 10-20' : 'words';
  const type = { type: 'text', value: filter ?? '' };
  const input = element('input', { ...type, placeholder: hint, 'aria-label': axis.name });
  input.addEventListener('input', () => onFilter(input.value.trim() ? input.value : null));
  const name = element('span', { class: 'name' }, axis.name);
  return element('label', { class: 'control' }, name, input);
}

// ---------------------------------------------------------------------------- the page

class Gallery {
  constructor(data, el) {
    this.data = data;
    this.frame = mount(el, data.title);
    el.classList.add('gallery');
    el.prepend(element('style', {}, STYLES));
    // view, tab, filters, below, picture
    Object.assign(this, stateOf(data, location.hash.slice(1)));
    this.stage = new Stage(data, (i) => this.detail.show(i));
    if (window.innerWidth < NARROW) this.stage.size = 72;
    this.detail = new Detail(data, {
      onMove: (dx, dy) => this.stage.move(dx, dy),
      onShow: (i) => this.open(i),
      onHold: (i) => this.hold(i),
      onClose: () => this.close(),
    });
    this.count = element('span', { class: 'note', 'aria-live': 'polite' });
    this.tabs = element('div', { class: 'tabs', role: 'tablist', hidden: true });
    this.held = element('div', { class: 'held', hidden: true, 'aria-live': 'polite' });
    const top = element('div', { class: 'top' }, element('h1', {}, data.title), this.count);
    const parts = [top, this.settings(), this.tabs, this.held, this.stage.root, this.detail.root];
    el.append(...parts);
    this.update = oncePerFrame(() => this.show());
    window.addEventListener('resize', this.update);
    window.addEventListener('hashchange', () => location.reload());
    this.show();
    if (this.picture !== null) this.openFirst(this.picture);
  }

  // ------------------------------------------------------------------------ its address

  // Have the address of the page tell what is shown. This is no step back in the history.
  writeLink() {
    const link = linkOf(this.data, this);
    if (link === location.hash.slice(1)) return;
    history.replaceState(null, '', link ? `#${link}` : location.pathname + location.search);
  }

  openFirst(i) {
    const k = this.stage.arrangement.at.indexOf(i);
    if (k >= 0) this.stage.goTo(k);
    this.detail.show(i);
  }

  open(i) {
    this.picture = i;
    this.writeLink();
  }

  close() {
    this.stage.focus();
    this.open(null);
  }

  // ------------------------------------------------------------------------ settings

  settings() {
    const controls = [...this.axisControls(), this.sortControl(), ...this.lookControls()];
    const filters = this.data.axes
      .filter((axis) => axis.values.length > 1)
      .map((axis) => {
        const first = this.filters.get(axis.name) ?? null;
        return filterOf(axis, first, (filter) => this.filter(axis.name, filter));
      });
    const open = window.innerWidth >= NARROW;
    const parts = [element('div', { class: 'controls' }, ...controls)];
    if (filters.length) {
      const inner = element('div', { class: 'controls' }, ...filters);
      const summary = element('summary', {}, 'Filter');
      parts.push(element('details', { class: 'filters' }, summary, inner));
    }
    const summary = element('summary', {}, 'Settings');
    return element('details', { class: 'settings', open }, summary, ...parts);
  }

  // An axis has one place: chosen for a second one, it leaves the first.
  axisControls() {
    const names = this.data.axes.filter((axis) => axis.varies).map((axis) => axis.name);
    const options = [['', 'none'], ...names];
    const made = ['columns', 'rows', 'tabs'].map((place) => {
      const onInput = (name) => {
        this.view[place] = name || null;
        for (const [other, control] of made) {
          if (other === place || !name || this.view[other] !== name) continue;
          this.view[other] = null;
          control.set('');
        }
        this.tab = 0;
        this.update();
      };
      return [place, select({ label: place, options, value: this.view[place] ?? '', onInput })];
    });
    return made.map(([, control]) => control.root);
  }

  sortControl() {
    const ways = this.data.measurements.flatMap(({ name }) => [
      { name, falling: true, text: `${name}, highest first` },
      { name, falling: false, text: `${name}, lowest first` },
    ]);
    const options = [['', 'as planned'], ...ways.map(({ text }, k) => [String(k), text])];
    const onInput = (k) => {
      this.view.sort = k === '' ? null : ways[k];
      this.update();
    };
    const { sort } = this.view;
    const first = ways.findIndex((o) => o.name === sort?.name && o.falling === sort.falling);
    return select({ label: 'sort', options, value: first < 0 ? '' : first, onInput }).root;
  }

  lookControls() {
    const { stage, data } = this;
    const caption = select({
      label: 'below each picture',
      options: [['', 'nothing'], ...data.measurements.map(({ name }) => name)],
      value: this.below ?? '',
      onInput: (name) => {
        this.below = name || null;
        this.update();
      },
    });
    const range = { min: 16, max: 512, step: 8, value: stage.size };
    const resize = (size) => {
      stage.size = size;
      this.update();
    };
    const size = slider({ label: 'size', ...range, onInput: resize });
    return [caption.root, size.root];
  }

  filter(name, filter) {
    if (filter === null) this.filters.delete(name);
    else this.filters.set(name, filter);
    this.update();
  }

  // ------------------------------------------------------------------------ what is shown

  show() {
    const { data, view, stage } = this;
    const pictures = this.showTabs(filtered(data, this.filters));
    stage.caption = data.measurements.find(({ name }) => name === this.below) ?? null;
    stage.show(arranged(data, pictures, view, stage.across));
    const all = data.count.toLocaleString('en');
    const few = pictures.length.toLocaleString('en');
    this.count.textContent =
      pictures.length === data.count ? `${all} pictures` : `${few} of ${all}`;
    this.writeLink();
  }

  // The pictures of the tab that is open.
  showTabs(pictures) {
    const axis = axisNamed(this.data, this.view.tabs);
    this.tabs.hidden = !axis;
    if (!axis) return pictures;
    const used = [...new Set(pictures.map((i) => axis.of[i]))].sort((a, b) => a - b);
    const open = used.includes(this.tab) ? this.tab : (used[0] ?? 0);
    const choose = (value) => {
      this.tab = value;
      this.show();
    };
    const make = isListed(axis) ? tabButtons : tabList;
    this.tabs.replaceChildren(...make(axis, used, open, choose));
    return pictures.filter((i) => axis.of[i] === open);
  }

  hold(i) {
    const { stage, held } = this;
    stage.held = i;
    stage.redraw();
    held.hidden = i === null;
    const text = i === null ? '' : `Choose a picture to compare with ${describe(this.data, i)}`;
    const end = button({ label: 'End comparison', onClick: () => this.detail.hold(null) });
    held.replaceChildren(element('span', {}, text), end);
  }
}

function tabButtons(axis, used, open, choose) {
  const nodes = used.map((value) => {
    const role = { type: 'button', role: 'tab', 'aria-selected': String(value === open) };
    const tabindex = value === open ? 0 : -1;
    const tab = { ...role, tabindex, onclick: () => choose(value) };
    return element('button', tab, named(axis, value));
  });
  nodes.forEach((node, k) =>
    node.addEventListener('keydown', (event) => {
      const to = used[k + (arrow(event)?.[0] ?? 0)];
      if (to === undefined || to === used[k]) return;
      event.preventDefault();
      const { parentElement } = node;
      choose(to);
      parentElement.querySelector('[aria-selected="true"]').focus();
    }),
  );
  return nodes;
}

function tabList(axis, used, open, choose) {
  const options = used.map((value) => [value, axis.values[value]]);
  return [select({ label: axis.name, options, value: open, onInput: choose }).root];
}

export function showGallery(data, el) {
  el.gallery = new Gallery(data, el);
}

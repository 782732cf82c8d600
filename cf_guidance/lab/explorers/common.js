// What the explorers share: the frame with its styles, controls, axes, pictures on a canvas.

// ---------------------------------------------------------------------------- styles

const STYLES = `
.explorer {
  --back: #fff; --text: #1d2530; --faint: #5b6675; --line: #d5dbe3; --soft: #f3f5f8;
  --accent: #1769aa; --good: #1a7f37; --bad: #c62f2f;
  --s0: #1769aa; --s1: #c4500b; --s2: #1a7f37; --s3: #8a3ab9; --s4: #b3261e; --s5: #00757a;
  --s6: #9a6700; --s7: #c2186b;
  container-type: inline-size; box-sizing: border-box; max-width: 100%; margin: 0.5rem 0;
  padding: 0.9rem; border: 1px solid var(--line); border-radius: 8px;
  background: var(--back); color: var(--text); font: 15px/1.4 system-ui, sans-serif;
}
.explorer.explorer-dark {
  --back: #1b2028; --text: #e6eaf0; --faint: #a3adba; --line: #3c4552; --soft: #262d37;
  --accent: #6cb6ff; --good: #56d364; --bad: #ff7b72;
  --s0: #6cb6ff; --s1: #ff9f5a; --s2: #56d364; --s3: #d2a8ff; --s4: #ff7b72; --s5: #4dd0d6;
  --s6: #e3b341; --s7: #ff8fc7; color-scheme: dark;
}
.explorer * { box-sizing: border-box; }
.explorer p { margin: 0.3rem 0; }
.explorer .columns {
  display: grid; gap: 0.9rem 1.4rem; grid-template-columns: minmax(0, 1fr); margin-top: 0.5rem;
}
.explorer .controls {
  display: grid; gap: 0.5rem 1.4rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 15.5rem), 1fr));
}
.explorer .row {
  display: flex; flex-wrap: wrap; gap: 0.5rem 0.9rem; align-items: center; margin: 0.4rem 0;
}
/* the site's own styles make the children of a row as wide as the row */
.explorer .row > * { width: auto; flex-shrink: 1; margin-top: 0; }
.explorer .row > :not(button, input, select) { padding-inline: 0; }
.explorer .control { display: block; min-width: 0; margin: 0; }
.explorer .control > .name { display: block; font-size: 13px; line-height: 1.3; }
.explorer .control .hint { color: var(--faint); margin-left: 0.5rem; }
.explorer .control > .inputs { display: flex; gap: 0.5rem; align-items: center; }
.explorer .check {
  display: inline-flex; gap: 0.4rem; align-items: center; margin: 0; min-height: 32px;
}
.explorer input, .explorer select, .explorer button {
  font: inherit; color: inherit; accent-color: var(--accent); margin: 0;
}
.explorer input[type='range'] {
  flex: 1 1 auto; min-width: 0; height: 32px; padding: 0; touch-action: pan-y;
}
.explorer input[type='checkbox'] { width: 18px; height: 18px; flex: none; }
.explorer input[type='number'], .explorer input[type='text'], .explorer select {
  background: var(--back); border: 1px solid var(--line); border-radius: 5px;
  padding: 0.2rem 0.4rem;
  min-height: 32px; max-width: 100%;
}
.explorer input[type='number'] {
  width: 5.4rem; flex: none; font-variant-numeric: tabular-nums; appearance: textfield;
}
.explorer input[type='number']::-webkit-inner-spin-button { appearance: none; }
.explorer select { width: 100%; }
.explorer button {
  background: var(--soft); border: 1px solid var(--line); border-radius: 5px; cursor: pointer;
  padding: 0.25rem 0.75rem; min-height: 34px;
}
.explorer button:hover { border-color: var(--accent); }
.explorer button.primary {
  background: var(--accent); border-color: var(--accent); color: var(--back);
}
.explorer button:disabled { opacity: 0.5; cursor: default; }
.explorer :focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.explorer svg { display: block; max-width: 100%; overflow: visible; }
.explorer svg text { fill: var(--faint); font: 12px system-ui, sans-serif; }
.explorer svg .grid { stroke: var(--line); stroke-width: 1; }
.explorer svg .handle { cursor: grab; touch-action: none; outline: none; }
.explorer svg .handle .dot { fill: var(--back); stroke: var(--accent); stroke-width: 2.5; }
.explorer svg .handle .reach { fill: transparent; stroke: none; }
.explorer svg .handle:hover .dot, .explorer svg .handle:focus .dot { fill: var(--accent); }
.explorer svg .handle:focus-visible .dot { stroke-width: 5; }
.explorer canvas { display: block; max-width: 100%; }
.explorer pre {
  margin: 0; padding: 0.6rem 0.75rem; overflow-x: auto; background: var(--soft); color: var(--text);
  border: 0; border-radius: 6px; font: 13px/1.45 ui-monospace, monospace; white-space: pre;
}
.explorer table { border-collapse: collapse; font-size: 13.5px; width: 100%; margin: 0; }
.explorer .scroll { overflow-x: auto; }
.explorer th, .explorer td {
  padding: 0.2rem 0.5rem; border: 0; border-bottom: 1px solid var(--line); text-align: right;
  font-variant-numeric: tabular-nums; white-space: nowrap; background: none; color: inherit;
}
.explorer th { font-weight: 600; color: var(--faint); }
.explorer th:first-child, .explorer td:first-child { text-align: left; }
.explorer summary { cursor: pointer; padding: 0.3rem 0; }
.explorer .note { color: var(--faint); font-size: 13.5px; }
.explorer .swatch {
  display: inline-block; width: 0.8rem; height: 0.8rem; border-radius: 3px; flex: none;
}
@container (max-width: 639px) {
  .explorer th, .explorer td { padding: 0.2rem 0.3rem; }
}
@container (min-width: 640px) {
  .explorer .columns { grid-template-columns: repeat(2, minmax(0, 1fr)); }
}
@media (prefers-reduced-motion: reduce) { .explorer * { transition: none !important; } }
`;

function injectStyles(el) {
  const root = el.getRootNode();
  const place = root instanceof ShadowRoot ? root : document.head;
  if (place.querySelector('style[data-explorer-styles]')) return;
  place.append(element('style', { 'data-explorer-styles': '' }, STYLES));
}

// ---------------------------------------------------------------------------- elements

const SVG = 'http://www.w3.org/2000/svg';

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, '');
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

// element('p', { class: 'note', onclick: f }, 'text', child)
export function element(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svgElement(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

// ---------------------------------------------------------------------------- the frame

function luminance(colour) {
  const parts = colour.match(/[\d.]+/g)?.map(Number);
  if (!parts || parts[3] === 0) return null;
  return (0.3 * parts[0] + 0.59 * parts[1] + 0.11 * parts[2]) / 255;
}

// Does the page say that it is dark or light? The site, Jupyter, Colab and VS Code each have a way.
function themeOfPage(el) {
  const [html, body] = [document.documentElement, document.body];
  const marker = el.closest('[data-bs-theme]')?.dataset.bsTheme ?? html.getAttribute('theme');
  if (marker) return marker === 'dark';
  if (body.classList.contains('quarto-dark') || body.classList.contains('vscode-dark')) return true;
  if (body.classList.contains('quarto-light') || body.classList.contains('vscode-light')) {
    return false;
  }
  const jupyter = body.dataset.jpThemeLight;
  return jupyter ? jupyter === 'false' : null;
}

export function isDark(el) {
  const theme = themeOfPage(el);
  if (theme !== null) return theme;
  for (let node = el.parentElement; node; node = node.parentElement) {
    const light = luminance(getComputedStyle(node).backgroundColor);
    if (light !== null) return light < 0.5;
  }
  return matchMedia('(prefers-color-scheme: dark)').matches;
}

// Make `el` the frame of an explorer. Returns { root, onTheme, onCleanup, cleanup }: `onTheme(f)`
// calls f when the page turns dark or light, `onCleanup(f)` when the explorer is taken away;
// return `cleanup` from `render`.
export function mount(el, label) {
  el.replaceChildren();
  el.classList.add('explorer');
  el.setAttribute('role', 'group');
  el.setAttribute('aria-label', label);
  injectStyles(el);
  const [themed, leaving] = [[], []];
  const update = () => {
    const dark = isDark(el);
    if (el.classList.contains('explorer-dark') === dark) return;
    el.classList.toggle('explorer-dark', dark);
    themed.forEach((f) => f());
  };
  const watch = { attributes: true, attributeFilter: ['class', 'data-bs-theme', 'theme'] };
  const observer = new MutationObserver(update);
  observer.observe(document.documentElement, watch);
  observer.observe(document.body, watch);
  const query = matchMedia('(prefers-color-scheme: dark)');
  query.addEventListener('change', update);
  update();
  requestAnimationFrame(update); // by then a notebook has put `el` into its page
  const cleanup = () => {
    observer.disconnect();
    query.removeEventListener('change', update);
    leaving.forEach((f) => f());
  };
  return {
    root: el,
    onTheme: (f) => themed.push(f),
    onCleanup: (f) => leaving.push(f),
    cleanup,
  };
}

// Colours for a canvas, as they are now: { back, text, faint, line, soft, accent, good, bad,
// series: [8 colours] }. Elements and SVG use the variables themselves: `var(--s0)`.
export function colours(el) {
  const style = getComputedStyle(el);
  const read = (name) => style.getPropertyValue(`--${name}`).trim();
  const names = ['back', 'text', 'faint', 'line', 'soft', 'accent', 'good', 'bad'];
  const series = Array.from({ length: 8 }, (_, i) => read(`s${i}`));
  return { ...Object.fromEntries(names.map((name) => [name, read(name)])), series };
}

// Call f at most once per frame, however often it is asked for.
export function oncePerFrame(f) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      f();
    });
  };
}

// Call f(width) when the width of `el` changes.
export function onWidth(frame, el, f) {
  let last = 0;
  const observer = new ResizeObserver(([entry]) => {
    const width = Math.round(entry.contentRect.width);
    if (width === last || width === 0) return;
    last = width;
    f(width);
  });
  observer.observe(el);
  frame.onCleanup(() => observer.disconnect());
}

// ---------------------------------------------------------------------------- the model

// Give the model the values of `defaults` where it has none.
export function withDefaults(model, defaults) {
  for (const [name, value] of Object.entries(defaults)) {
    if (model.get(name) === undefined) model.set(name, value);
  }
  return model;
}

// Call f when one of `names` changes; it is not called now.
export function onChange(frame, model, names, f) {
  for (const name of names) {
    model.on(`change:${name}`, f);
    frame.onCleanup(() => model.off?.(`change:${name}`, f));
  }
}

export function change(model, values) {
  for (const [name, value] of Object.entries(values)) model.set(name, value);
  model.save_changes();
}

// Tie a control to the model's value `name`, in both directions. Returns the control.
export function bind(frame, model, name, control) {
  control.set(model.get(name));
  control.onInput = (value) => change(model, { [name]: value });
  onChange(frame, model, [name], () => control.set(model.get(name)));
  return control;
}

// ---------------------------------------------------------------------------- controls

// Every control is { root, set(value), onInput(value) }: put `root` into the page, set `onInput`
// (or give it as an option, or use `bind`). `set` does not call `onInput`.
function control(root, set, options) {
  return { root, set, onInput: options.onInput ?? (() => {}) };
}

// Sliders have a comfortable range, `min` to `max`; what is typed may go from `least` to `most`.
function clamped(value, { min, max, least = min, most = max }) {
  return Math.min(most ?? Infinity, Math.max(least ?? -Infinity, value));
}

// The name of a control, and what it does.
function nameLine(label, hint) {
  const more = hint ? element('span', { class: 'hint' }, hint) : null;
  return element('span', { class: 'name' }, label, more);
}

function numberInput({ label, min, max, least = min, most = max, step = 'any' }) {
  return element('input', { type: 'number', min: least, max: most, step, 'aria-label': label });
}

// A range with a number beside it:
// slider({ label, min, max, step, least, most, value, hint, onInput })
export function slider(options) {
  const { label, min, max, step = 'any', value = min, hint } = options;
  const range = element('input', { type: 'range', min, max, step, 'aria-label': label });
  const number = numberInput({ ...options, label: `${label}, number` });
  const inputs = element('span', { class: 'inputs' }, range, number);
  const root = element('div', { class: 'control' }, nameLine(label, hint), inputs);
  const set = (v) => {
    if (document.activeElement !== number || Number(number.value) !== v) number.value = shortest(v);
    range.value = v;
  };
  const made = control(root, set, options);
  range.addEventListener('input', () => {
    number.value = shortest(range.valueAsNumber);
    made.onInput(range.valueAsNumber);
  });
  number.addEventListener('input', () => {
    const typed = number.valueAsNumber;
    if (Number.isNaN(typed) || typed !== clamped(typed, options)) return;
    range.value = typed;
    made.onInput(typed);
  });
  number.addEventListener('change', () => {
    const typed = number.valueAsNumber;
    const kept = Number.isNaN(typed) ? range.valueAsNumber : clamped(typed, options);
    set(kept);
    made.onInput(kept);
  });
  set(value);
  made.limit = (limits) => {
    Object.assign(options, limits);
    for (const node of [range, number]) fill(node, limits, []);
  };
  return made;
}

// numberField({ label, min, max, step, value, hint, onInput })
export function numberField(options) {
  const { label, value = 0, hint } = options;
  const number = numberInput(options);
  const inputs = element('span', { class: 'inputs' }, number);
  const root = element('label', { class: 'control' }, nameLine(label, hint), inputs);
  const set = (v) => {
    if (number.value === '' || Number(number.value) !== v) number.value = shortest(v);
  };
  const made = control(root, set, options);
  number.addEventListener('change', () => {
    const typed = number.valueAsNumber;
    if (Number.isNaN(typed)) return;
    set(clamped(typed, options));
    made.onInput(clamped(typed, options));
  });
  set(value);
  return made;
}

// select({ label, options: [[value, text], ...] or [value, ...], value, onInput })
export function select(options) {
  const { label, value, hint } = options;
  const pairs = options.options.map((o) => (Array.isArray(o) ? o : [o, o]));
  const items = pairs.map(([v, text]) => element('option', { value: v }, String(text)));
  const list = element('select', { 'aria-label': label }, ...items);
  const root = element('label', { class: 'control' }, nameLine(label, hint), list);
  const set = (v) => {
    list.value = v;
  };
  const made = control(root, set, options);
  list.addEventListener('change', () => made.onInput(pairs[list.selectedIndex][0]));
  if (value !== undefined) set(value);
  return made;
}

// checkbox({ label, value, colour, onInput })
export function checkbox(options) {
  const { label, value = false, colour, hint } = options;
  const box = element('input', { type: 'checkbox', 'aria-label': label });
  const swatch = colour && element('span', { class: 'swatch', style: `background: ${colour}` });
  const root = element('label', { class: 'check', title: hint }, box, swatch, label);
  const set = (v) => {
    box.checked = Boolean(v);
  };
  const made = control(root, set, options);
  box.addEventListener('change', () => made.onInput(box.checked));
  set(value);
  return made;
}

// button({ label, onClick, primary, hint }): the element itself.
export function button({ label, onClick, primary = false, hint }) {
  const type = { type: 'button', title: hint, class: primary ? 'primary' : null };
  return element('button', { ...type, onclick: onClick }, label);
}

// A button that copies `getText()` and says so; its element.
export function copyButton(getText, label = 'Copy') {
  const node = button({ label });
  node.setAttribute('aria-live', 'polite');
  node.addEventListener('click', async () => {
    const done = await copy(getText(), node);
    node.textContent = done ? 'Copied' : 'Not copied: select the text';
    setTimeout(() => (node.textContent = label), 1500);
  });
  return node;
}

async function copy(text, near) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = element('textarea', { style: 'position: fixed; opacity: 0' });
    area.value = text;
    near.after(area);
    area.select();
    const done = document.execCommand('copy');
    area.remove();
    return done;
  }
}

// ---------------------------------------------------------------------------- numbers and axes

// The number to 6 digits, for an input: 0.1 + 0.2 becomes '0.3'.
export function shortest(x) {
  return Number.isFinite(x) ? String(Number(x.toPrecision(6))) : '';
}

// A number to read, with `digits` significant digits and a real minus sign.
export function formatNumber(x, digits = 3) {
  if (x === Infinity) return '∞';
  if (!Number.isFinite(x)) return '–';
  return String(Number(x.toPrecision(digits))).replace('-', '−');
}

// A map from [a, b] to [p, q], with its inverse as `.invert`; `log` for a logarithmic axis.
export function scale([a, b], [p, q], { log = false } = {}) {
  const to = log ? Math.log : (x) => x;
  const from = log ? Math.exp : (x) => x;
  const span = to(b) - to(a) || 1;
  const map = (x) => p + ((to(x) - to(a)) / span) * (q - p);
  map.invert = (y) => from(to(a) + ((y - p) / (q - p)) * span);
  return map;
}

// Round numbers from a to b, about `count` of them.
export function ticks(a, b, count = 5) {
  const rough = Math.abs(b - a) / Math.max(1, count) || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= rough * 0.999);
  const first = Math.ceil(Math.min(a, b) / step - 1e-9);
  const last = Math.floor(Math.max(a, b) / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) =>
    Number(((first + i) * step).toPrecision(12)),
  );
}

// 1, 2, 5, 10, ... between a and b
export function logTicks(a, b) {
  const powers = Array.from({ length: 13 }, (_, i) => 10 ** (i - 6));
  const all = powers.flatMap((p) => [1, 2, 5].map((m) => Number((m * p).toPrecision(3))));
  return all.filter((x) => x >= a * 0.999 && x <= b * 1.001);
}

export function pathThrough(points) {
  return points.map(([x, y], i) => `${i ? 'L' : 'M'}${x.toFixed(2)} ${y.toFixed(2)}`).join('');
}

// ---------------------------------------------------------------------------- dragging

// Make an SVG group a handle that is dragged by mouse, finger or arrow keys. `onMove(x, y)` gets
// coordinates of the SVG; `onKey(dx, dy, event)` gets -1, 0 or 1, times 10 with Shift.
export function makeHandle(node, { label, onMove, onKey, onDelete }) {
  fill(node, { class: 'handle', tabindex: 0, role: 'slider', 'aria-label': label }, []);
  node.addEventListener('pointerdown', (event) => {
    event.preventDefault();
    node.focus({ preventScroll: true });
    node.setPointerCapture(event.pointerId);
  });
  node.addEventListener('pointermove', (event) => {
    if (!node.hasPointerCapture(event.pointerId)) return;
    const box = node.ownerSVGElement.getBoundingClientRect();
    onMove(event.clientX - box.left, event.clientY - box.top);
  });
  node.addEventListener('keydown', (event) => {
    const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
    if (onDelete && ['Delete', 'Backspace'].includes(event.key)) {
      event.preventDefault();
      onDelete();
    } else if (arrows[event.key]) {
      event.preventDefault();
      const size = event.shiftKey ? 10 : 1;
      onKey(...arrows[event.key].map((d) => d * size), event);
    }
  });
  return node;
}

// A round handle of the size of a finger, at (0, 0); move it with its `transform`.
export function roundHandle(options) {
  const reach = svgElement('circle', { class: 'reach', r: 20 });
  const dot = svgElement('circle', { class: 'dot', r: 7 });
  return makeHandle(svgElement('g', {}, reach, dot), options);
}

// ---------------------------------------------------------------------------- canvas

// A canvas as wide as its place, sharp on any screen. `draw(context, width, height)` is called in
// CSS pixels, when the size or the theme changes and after `redraw()`. `height` may be a number or
// a function of the width.
export function canvas(frame, { label, height, draw }) {
  const node = element('canvas', { role: 'img', 'aria-label': label, style: 'width: 100%' });
  const root = element('div', {}, node);
  const made = { root, node, width: 0, height: 0 };
  made.redraw = oncePerFrame(() => {
    if (!made.width) return;
    const context = node.getContext('2d');
    const ratio = node.width / made.width;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, made.width, made.height);
    draw(context, made.width, made.height);
  });
  onWidth(frame, root, (width) => {
    const ratio = window.devicePixelRatio || 1;
    made.width = width;
    made.height = typeof height === 'function' ? height(width) : height;
    node.width = Math.round(made.width * ratio);
    node.height = Math.round(made.height * ratio);
    node.style.height = `${made.height}px`;
    made.redraw();
  });
  frame.onTheme(made.redraw);
  return made;
}

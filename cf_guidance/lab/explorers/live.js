// The embedded Stable Diffusion, drawing in the reader's browser.

import { bind, button, change, checkbox, copyButton, element, mount } from './common.js';
import { numberField, onChange, onWidth, oncePerFrame, pathThrough } from './common.js';
import { roundHandle, scale, select, shortest, slider, svgElement } from './common.js';
import { withDefaults } from './common.js';
import { RULES, loadEngine, weights } from './live_engine.js';

const DEFAULTS = {
  garment: 'sneaker',
  colour: 'red',
  background: 'blue',
  negative: '',
  seed: 3,
  steps: 20,
  w: 3,
  rule: 'cfg',
  schedule: 'constant',
  low: 1,
  decay: 1,
  curve: [0, 0.25, 0.5, 0.75, 1].map((tau) => [tau, 1]),
  interval: null,
};
const GARMENTS = [
  ...['t-shirt', 'trouser', 'pullover', 'dress', 'coat'],
  ...['sandal', 'shirt', 'sneaker', 'bag', 'boot'],
];
const COLOURS = ['red', 'green', 'blue', 'yellow', 'purple', 'orange', 'white', 'black'];
const SCHEDULES = [
  ['constant', 'the same at each step'],
  ['cosine', 'a cosine that falls'],
  ['curve', 'drawn by hand'],
];
const STRIP = [0, 0.5, 1, 1.5, 2, 3, 5, 7.5, 10, 15];
const NORM_STRIP = [0.01, 0.03, 0.06, 0.09, 0.12, 0.15, 0.18, 0.22, 0.26, 0.3];
const DRAFT = 8; // steps of a picture that is drawn while a control moves
const PAUSE = 200; // milliseconds without a change, after which all steps are taken
const INTERVAL = [0.3, 5];
const DOWNLOAD = '10 MB, and once 14 MB for ONNX Runtime';

const isNorm = (rule) => Boolean(RULES[rule].norm);
const startWeight = (rule) => (isNorm(rule) ? 0.2 : 3);
const article = (word) => (/^[aeiou]/.test(word) ? 'an' : 'a');

function settingsOf(model) {
  const s = Object.fromEntries(Object.keys(DEFAULTS).map((name) => [name, model.get(name)]));
  const what = `${article(s.colour)} ${s.colour} ${s.garment}`;
  return { ...s, prompt: `${what} on ${article(s.background)} ${s.background} background` };
}

// The folder with the model: beside this file on a site, elsewhere where the model says.
function baseOf(model) {
  const own = import.meta.url;
  return new URL('.', own.startsWith('http') ? own : model.get('base'));
}

// ---------------------------------------------------------------------------- Python

const number = (v) => (Number.isInteger(v) ? `${v}.0` : shortest(Number(v.toPrecision(4))));

function weightCode(s) {
  if (s.schedule === 'constant') return number(s.w);
  if (s.schedule === 'cosine') {
    const ends = `max_val=${number(s.w)}, min_val=${number(s.low)}`;
    return `get_cos_sched(num_steps=${s.steps}, ${ends}, k_decay=${number(s.decay)})`;
  }
  return `[${weights(s, s.steps).map(number).join(', ')}]`;
}

export function pythonCode(s) {
  const rule = { cfg: '', rescale: ', post=rescale' }[s.rule] ?? `, rule=${s.rule}`;
  const interval = s.interval ? `, interval=(${s.interval.map(number).join(', ')})` : '';
  const negative = s.negative.trim() ? `, negative_prompt=${JSON.stringify(s.negative)}` : '';
  return [
    'pipe = StableDiffusionPipeline.from_pretrained(embedded_path())',
    `w = ${weightCode(s)}`,
    `sd = guided(pipe, w=w${rule}${interval})`,
    `options = dict(num_inference_steps=${s.steps}${negative})`,
    `image = sd('${s.prompt}', latents=randn((1, 4, 8, 8), ${s.seed}), **options).images[0]`,
  ].join('\n');
}

// ---------------------------------------------------------------------------- controls

// A line of text: { root, set, onInput }, as the controls of common.js.
function textField({ label, hint }) {
  const input = element('input', { type: 'text', 'aria-label': label, style: 'width: 100%' });
  const name = element('span', { class: 'name' }, label, element('span', { class: 'hint' }, hint));
  const made = { root: element('label', { class: 'control' }, name, input), onInput: () => {} };
  made.set = (value) => {
    if (input.value !== value) input.value = value;
  };
  input.addEventListener('input', () => made.onInput(input.value));
  return made;
}

// The weight at each step, with handles that bend the curve.
function weightPlot(frame, model) {
  const svg = svgElement('svg', { height: 130, role: 'group', 'aria-label': 'weight per step' });
  const title = element('span', { class: 'name' }, 'Weight at each step: drag the curve');
  const root = element('div', { class: 'control' }, title, svg);
  const drawing = svgElement('g');
  const handles = DEFAULTS.curve.map((_, k) =>
    roundHandle({
      label: `weight after ${25 * k} % of the steps`,
      onMove: (x, y) => bend(k, axes.y.invert(y) / axes.top),
      onKey: (dx, dy) => bend(k, shares()[k] + 0.02 * (dy + dx)),
    }),
  );
  svg.append(drawing, ...handles);
  let axes = null;

  // The curve's handles as shares of the largest weight.
  function shares() {
    const s = settingsOf(model);
    if (s.schedule === 'curve') return s.curve.map(([, share]) => share);
    const ws = weights(s, 101);
    return DEFAULTS.curve.map(([tau]) => ws[Math.round(100 * tau)] / (s.w || 1));
  }

  function bend(k, share) {
    const values = shares();
    values[k] = Math.min(1, Math.max(0, Number(share.toFixed(3))));
    const curve = DEFAULTS.curve.map(([tau], i) => [tau, values[i]]);
    change(model, { curve, schedule: 'curve' });
  }

  function draw() {
    const width = Number(svg.getAttribute('width'));
    if (!width) return;
    const s = settingsOf(model);
    const ws = weights(s, s.steps);
    const top = Math.max(s.w, ...ws) || 1;
    const x = scale([0, 1], [34, width - 16]);
    const y = scale([0, top], [106, 16]);
    axes = { x, y, top: s.w || 1 };
    const at = (i) => x(s.steps > 1 ? i / (s.steps - 1) : 0.5);
    const line = (w) => {
      const place = { x1: x(0), x2: x(1), y1: y(w), y2: y(w) };
      const label = svgElement('text', { x: 28, y: y(w) + 4, 'text-anchor': 'end' }, shortest(w));
      return [svgElement('line', { class: 'grid', ...place }), label];
    };
    const path = pathThrough(ws.map((w, i) => [at(i), y(w)]));
    const names = [
      [0, 'start', 'noise'],
      [1, 'end', 'picture'],
    ].map(([tau, anchor, text]) =>
      svgElement('text', { x: x(tau), y: 126, 'text-anchor': anchor }, text),
    );
    const style = 'fill: none; stroke: var(--accent); stroke-width: 2';
    drawing.replaceChildren(
      ...[0, Number(top.toPrecision(3))].flatMap(line),
      svgElement('path', { d: path, style }),
      ...names,
    );
    shares().forEach((share, k) => {
      const [tau] = DEFAULTS.curve[k];
      handles[k].setAttribute('transform', `translate(${x(tau)} ${y(share * (s.w || 1))})`);
      handles[k].setAttribute('aria-valuemin', 0);
      handles[k].setAttribute('aria-valuemax', s.w);
      handles[k].setAttribute('aria-valuenow', shortest(share * s.w));
    });
  }

  onWidth(frame, root, (width) => {
    svg.setAttribute('width', width);
    draw();
  });
  onChange(frame, model, ['steps', 'w', 'schedule', 'low', 'decay', 'curve'], oncePerFrame(draw));
  return { root };
}

// Guide only where the noise level is between two numbers?
function intervalControls(frame, model) {
  const on = checkbox({ label: 'Guide only at some noise levels' });
  const low = slider({ label: 'from sigma', min: 0, max: 3, step: 0.05 });
  const high = slider({ label: 'to sigma', min: 0.5, max: 15, step: 0.1 });
  const ends = element('div', { class: 'controls' }, low.root, high.root);
  const root = element('div', {}, on.root, ends);
  const show = () => {
    const interval = model.get('interval');
    on.set(interval);
    ends.style.display = interval ? '' : 'none';
    low.set((interval ?? INTERVAL)[0]);
    high.set((interval ?? INTERVAL)[1]);
  };
  on.onInput = (guided) => change(model, { interval: guided ? INTERVAL : null });
  low.onInput = (v) => change(model, { interval: [v, Math.max(v, model.get('interval')[1])] });
  high.onInput = (v) => change(model, { interval: [Math.min(v, model.get('interval')[0]), v] });
  onChange(frame, model, ['interval'], show);
  show();
  return { root };
}

function makeControls(frame, model) {
  const weight = slider({ label: 'Guidance weight w (1 is unguided)', min: 0, max: 15, step: 0.1 });
  const fitWeight = () => {
    const norm = isNorm(model.get('rule'));
    weight.limit(norm ? { max: 0.5, step: 0.01 } : { max: 15, step: 0.1 });
    weight.set(model.get('w'));
  };
  const rules = Object.entries(RULES).map(([name, { title }]) => [name, title]);
  const rule = select({ label: 'Rule', options: rules });
  const made = {
    w: weight,
    garment: select({ label: 'Garment', options: GARMENTS }),
    colour: select({ label: 'Colour', options: COLOURS }),
    background: select({ label: 'Background', options: COLOURS }),
    negative: textField({ label: 'Negative prompt', hint: 'empty, or such as: a green boot' }),
    seed: numberField({ label: 'Seed', min: 0, max: 2 ** 32 - 1, step: 1 }),
    steps: slider({ label: 'Steps', min: 4, max: 50, step: 1 }),
    rule,
    schedule: select({ label: 'Weight over the steps', options: SCHEDULES }),
    low: slider({ label: 'Weight at the end', min: 0, max: 5, step: 0.05 }),
    decay: slider({ label: 'k-decay', min: 0.3, max: 3, step: 0.1 }),
  };
  for (const [name, control] of Object.entries(made)) bind(frame, model, name, control);
  fitWeight();
  rule.onInput = (value) => {
    const same = isNorm(value) === isNorm(model.get('rule'));
    const low = isNorm(value) ? 0.05 : 1;
    change(model, { rule: value, ...(same ? {} : { w: startWeight(value), low }) });
  };
  const showCosine = () => {
    const cosine = model.get('schedule') === 'cosine';
    for (const name of ['low', 'decay']) made[name].root.style.display = cosine ? '' : 'none';
  };
  showCosine();
  onChange(frame, model, ['rule'], fitWeight);
  onChange(frame, model, ['schedule'], showCosine);
  return made;
}

// ---------------------------------------------------------------------------- pictures

// A small picture, shown large with sharp pixels.
function pictureOf(label) {
  const style = 'width: 100%; image-rendering: pixelated; aspect-ratio: 1; border-radius: 4px';
  const size = { width: 32, height: 32 };
  const node = element('canvas', { ...size, role: 'img', 'aria-label': label, style });
  const set = (image, text) => {
    Object.assign(node, { width: image.width, height: image.height });
    node.getContext('2d').putImageData(image, 0, 0);
    node.setAttribute('aria-label', text);
  };
  return { node, set };
}

// Ten weights side by side; a click takes one of them.
function stripOf(model) {
  const style = 'display: grid; grid-template-columns: repeat(5, minmax(0, 1fr)); gap: 4px';
  const plain = 'padding: 2px; border: 1px solid transparent; background: none; min-width: 0';
  const root = element('div', { style, role: 'group', 'aria-label': 'The same at ten weights' });
  const tiles = STRIP.map(() => {
    const picture = pictureOf('');
    const caption = element('span', { style: 'font-size: 12px; display: block' });
    const node = element('button', { type: 'button', style: plain }, picture.node, caption);
    root.append(node);
    return { picture, caption, node };
  });
  const values = () => (isNorm(model.get('rule')) ? NORM_STRIP : STRIP);
  tiles.forEach(({ node }, i) =>
    node.addEventListener('click', () => change(model, { w: values()[i] })),
  );
  const set = (images) =>
    images.forEach((image, i) => {
      const text = `w = ${values()[i]}`;
      tiles[i].picture.set(image, text);
      tiles[i].caption.textContent = text;
    });
  return { root, values, set };
}

// ---------------------------------------------------------------------------- the explorer

// Draws what the model asks for. A new request ends a picture that is no longer wanted; while
// requests come fast, each picture takes only a few steps.
function makePainter(engine, model, { picture, strip, status, root }) {
  let [requested, finished, working, last] = [0, 0, false, -Infinity];

  async function paint(s, steps, cancelled) {
    const begin = performance.now();
    const found = await engine.sample({ ...s, steps }, [weights(s, steps)], { cancelled });
    if (!found) return false;
    const [image] = await engine.decode(found.latents);
    const seconds = ((performance.now() - begin) / 1000).toFixed(2);
    const draft = steps < s.steps ? 'draft: ' : '';
    picture.set(image, `${s.prompt}, w = ${s.w}`);
    status.textContent = `${draft}${steps} steps, ${found.evaluations} evaluations, ${seconds} s`;
    root.dataset.seconds = seconds;
    return true;
  }

  async function paintStrip(s, cancelled) {
    const lists = strip.values().map((w) => weights(s, s.steps, w));
    const found = await engine.sample(s, lists, { cancelled });
    if (found) strip.set(await engine.decode(found.latents));
    return Boolean(found);
  }

  const pause = () => new Promise((resolve) => setTimeout(resolve, PAUSE));

  async function paintAll(mine, hurried) {
    const s = settingsOf(model);
    const cancelled = () => requested !== mine;
    if (hurried && s.steps > DRAFT) {
      await paint(s, DRAFT, () => false);
      if (!cancelled()) await pause();
      if (cancelled()) return;
    }
    if (!(await paint(s, s.steps, cancelled))) return;
    if (await paintStrip(s, cancelled)) finished = mine;
  }

  async function work() {
    if (working) return;
    working = true;
    root.dataset.busy = 'true';
    try {
      while (finished !== requested) await paintAll(requested, performance.now() - last < PAUSE);
    } catch (error) {
      finished = requested;
      status.textContent = `The picture could not be drawn: ${error.message}`;
    }
    root.dataset.busy = 'false';
    working = false;
  }

  return () => {
    requested += 1;
    last = performance.now();
    work();
  };
}

function showModel(frame, model, engine) {
  const made = makeControls(frame, model);
  const picture = pictureOf('');
  const strip = stripOf(model);
  const status = element('p', { class: 'note', role: 'status' });
  const unknown = element('p', { class: 'note', role: 'status' });
  const code = element('pre');
  const update = makePainter(engine, model, { picture, strip, status, root: frame.root });
  const react = () => {
    const words = engine.unknownWords(model.get('negative'));
    unknown.textContent = words.length ? `Not known to this model: ${words.join(', ')}` : '';
    code.textContent = pythonCode(settingsOf(model));
    update();
  };
  onChange(frame, model, Object.keys(DEFAULTS), oncePerFrame(react));

  const another = () => change(model, { seed: Math.floor(Math.random() * 1000) });
  const stacked = 'display: grid; gap: 0.7rem; align-content: start; min-width: 0';
  const stack = (...parts) => element('div', { style: stacked }, ...parts);
  const small = 'grid-template-columns: repeat(auto-fill, minmax(min(100%, 8.5rem), 1fr))';
  const group = (...parts) =>
    element('div', { class: 'controls', style: small }, ...parts.map((o) => o.root));
  const left = stack(made.w.root, picture.node, status, strip.root);
  const right = stack(
    group(made.garment, made.colour, made.background),
    group(made.rule, made.schedule),
    weightPlot(frame, model).root,
    group(made.low, made.decay),
    intervalControls(frame, model).root,
    made.negative.root,
    unknown,
    group(made.steps, made.seed),
    element('div', { class: 'row' }, button({ label: 'Another seed', onClick: another })),
  );
  const python = element(
    'details',
    {},
    element('summary', {}, 'The same in Python'),
    stack(code, copyButton(() => code.textContent)),
  );
  frame.root.replaceChildren(element('div', { class: 'columns' }, left, right), python);
  react();
}

function showStart(frame, model, fallback) {
  const status = element('p', { class: 'note', role: 'status' });
  const start = button({ label: 'Run the model in your browser', primary: true });
  start.addEventListener('click', async () => {
    start.disabled = true;
    status.textContent = 'Loading ...';
    try {
      const engine = await loadEngine(baseOf(model), (done, all) => {
        const share = Math.round((100 * done) / all);
        status.textContent = `Loading: ${share} % of ${Math.round(all / 1e6)} MB`;
      });
      showModel(frame, model, engine);
      frame.root.dataset.live = 'true';
    } catch (error) {
      status.textContent = `The model could not be loaded: ${error.message}`;
      start.disabled = false;
    }
  });
  const note = `It loads ${DOWNLOAD}. Nothing is sent anywhere.`;
  const row = element('div', { class: 'row' }, start, element('span', { class: 'note' }, note));
  frame.root.append(...fallback, row, status);
}

function render({ model, el }) {
  const fallback = [...el.childNodes];
  withDefaults(model, DEFAULTS);
  const frame = mount(el, 'A Stable Diffusion in miniature, live');
  showStart(frame, model, fallback);
  return frame.cleanup;
}

export default { render };

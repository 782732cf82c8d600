// The embedded Stable Diffusion, drawing in the reader's browser.

import { bind, button, change, checkbox, copyButton, element, mount } from './common.js';
import { numberField, onChange, onWidth, oncePerFrame, pathThrough } from './common.js';
import { roundHandle, scale, select, shortest, slider, svgElement } from './common.js';
import { withDefaults } from './common.js';
import { RULES, loadEngine, scheduleSettings, weights } from './live_engine.js';
import { familyControls, familySelect } from './schedule_controls.js';
import { DEFAULTS, FAMILIES, NUMBERS, designed, familyCall } from './schedule_design.js';

// Numbers of the families beside w and max_val, and those of them that are weights.
const UNUSED = ['w', 'max_val'];
const WEIGHTS = ['min_val', 'warmup_init_val', 'base'];
const OWN = Object.values(FAMILIES).flatMap(({ numbers }) => numbers);
const SHAPE = [...new Set(OWN)].filter((name) => !UNUSED.includes(name));

const START = {
  garment: 'sneaker',
  colour: 'red',
  background: 'blue',
  negative: '',
  seed: 3,
  steps: 20,
  w: 3,
  rule: 'cfg',
  family: 'constant',
  ...Object.fromEntries(SHAPE.map((name) => [name, NUMBERS[name].value])),
  curve: [0, 0.25, 0.5, 0.75, 1].map((tau) => [tau, 1]),
  kind: 'linear',
  interval: null,
};
const GARMENTS = [
  ...['t-shirt', 'trouser', 'pullover', 'dress', 'coat'],
  ...['sandal', 'shirt', 'sneaker', 'bag', 'boot'],
];
const COLOURS = ['red', 'green', 'blue', 'yellow', 'purple', 'orange', 'white', 'black'];
const STRIP = [0, 0.5, 1, 1.5, 2, 3, 5, 7.5, 10, 15];
const NORM_STRIP = [0.01, 0.03, 0.06, 0.09, 0.12, 0.15, 0.18, 0.22, 0.26, 0.3];
const DRAFT = 8; // steps of a picture that is drawn while a control moves
const PAUSE = 200; // milliseconds without a change, after which all steps are taken
const INTERVAL = [0.3, 5];
const HANDLES = 12; // a curve with more points is bent by five handles
const DOWNLOAD = '10 MB, and once 14 MB for ONNX Runtime (with a GPU 31 MB)';

const isNorm = (rule) => Boolean(RULES[rule].norm);
const NORM_SCALE = 1 / 15; // from a weight of CFG to one of T-Norm
const article = (word) => (/^[aeiou]/.test(word) ? 'an' : 'a');

function settingsOf(model) {
  const s = Object.fromEntries(Object.keys(START).map((name) => [name, model.get(name)]));
  const what = `${article(s.colour)} ${s.colour} ${s.garment}`;
  return { ...s, prompt: `${what} on ${article(s.background)} ${s.background} background` };
}

// The folder with the model: beside this file on a site, elsewhere where the model says.
function baseOf(model) {
  const own = import.meta.url;
  return new URL('.', own.startsWith('http') ? own : model.get('files'));
}

// ---------------------------------------------------------------------------- Python

const number = (v) => (Number.isInteger(v) ? `${v}.0` : shortest(Number(v.toPrecision(4))));

function weightCode(s) {
  if (s.family === 'constant') return number(s.w);
  const settings = scheduleSettings(s);
  const points = settings.points.map((p) => p.map((v) => Number(v.toPrecision(6))));
  return familyCall({ ...settings, points });
}

export function pythonCode(s) {
  const rule = { cfg: '', rescale: ', post=rescale' }[s.rule] ?? `, rule=${s.rule}`;
  const interval = s.interval ? `, interval=(${s.interval.map(number).join(', ')})` : '';
  const negative = s.negative.trim() ? `, negative_prompt=${JSON.stringify(s.negative)}` : '';
  const rules = s.rule === 'cfg' ? [] : [`from cf_guidance.transforms import ${s.rule}`];
  const families = s.family === 'constant' ? [] : [s.family];
  return [
    'from diffusers import StableDiffusionPipeline',
    'from cf_guidance.noise import randn',
    'from cf_guidance.pipelines import embedded_path, guided',
    ...families.map((name) => `from cf_guidance.schedules import ${name}`),
    ...rules,
    '',
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

// The points of the curve that can be dragged, as (progress, share of w).
function handlePoints(s) {
  if (s.family === 'points_sched' && s.curve.length <= HANDLES) return s.curve;
  const ws = weights(s, 101);
  return START.curve.map(([tau]) => [tau, ws[Math.round(100 * tau)] / (s.w || 1)]);
}

// The weight at each step, with handles that bend the curve.
class WeightPlot {
  constructor(frame, model) {
    this.model = model;
    this.nodes = [];
    const name = { role: 'group', 'aria-label': 'weight per step' };
    this.svg = svgElement('svg', { height: 130, ...name });
    this.drawing = svgElement('g');
    this.svg.append(this.drawing);
    const title = element('span', { class: 'name' }, 'Weight at each step: drag the curve');
    this.root = element('div', { class: 'control' }, title, this.svg);
    onWidth(frame, this.root, (width) => {
      this.svg.setAttribute('width', width);
      this.draw();
    });
    const names = ['steps', 'w', 'family', 'curve', 'kind', ...SHAPE];
    onChange(
      frame,
      model,
      names,
      oncePerFrame(() => this.draw()),
    );
  }

  bend(k, next) {
    const s = settingsOf(this.model);
    const curve = handlePoints(s).map((p) => [...p]);
    const share = next(curve[k][1]);
    curve[k][1] = Number(Math.min(this.most, Math.max(0, share)).toFixed(3));
    change(this.model, { curve, family: 'points_sched' });
  }

  addHandle(k) {
    const node = roundHandle({
      label: `weight, point ${k + 1}`,
      onMove: (x, y) => this.bend(k, () => this.y.invert(y) / (this.model.get('w') || 1)),
      onKey: (dx, dy) => this.bend(k, (share) => share + 0.02 * (dy + dx)),
    });
    this.nodes.push(node);
    this.svg.append(node);
  }

  draw() {
    const width = Number(this.svg.getAttribute('width'));
    if (!width) return;
    const s = settingsOf(this.model);
    const ws = weights(s, s.steps);
    const [low, top] = [Math.min(0, ...ws), Math.max(s.w, ...ws) || 1];
    this.x = scale([0, 1], [44, width - 16]);
    this.y = scale([low, top], [106, 16]);
    this.most = top / (s.w || 1);
    this.drawLines(ws, [low, Number(top.toPrecision(3))]);
    this.drawHandles(s);
  }

  drawLines(ws, levels) {
    const { x, y } = this;
    const lines = levels.flatMap((w) => {
      const place = { x1: x(0), x2: x(1), y1: y(w), y2: y(w) };
      const label = { x: 28, y: y(w) + 4, 'text-anchor': 'end' };
      return [
        svgElement('line', { class: 'grid', ...place }),
        svgElement('text', label, shortest(w)),
      ];
    });
    const at = (i) => x(ws.length > 1 ? i / (ws.length - 1) : 0.5);
    const d = pathThrough(ws.map((w, i) => [at(i), y(w)]));
    const style = 'fill: none; stroke: var(--accent); stroke-width: 2';
    const names = [
      svgElement('text', { x: x(0), y: 126, 'text-anchor': 'start' }, 'noise'),
      svgElement('text', { x: x(1), y: 126, 'text-anchor': 'end' }, 'picture'),
    ];
    this.drawing.replaceChildren(...lines, svgElement('path', { d, style }), ...names);
  }

  drawHandles(s) {
    const points = handlePoints(s);
    while (this.nodes.length > points.length) this.nodes.pop().remove();
    while (this.nodes.length < points.length) this.addHandle(this.nodes.length);
    points.forEach(([tau, share], k) => {
      const w = share * (s.w || 1);
      const place = `translate(${this.x(tau)} ${this.y(w)})`;
      const value = { min: 0, max: shortest(s.w), now: shortest(w) };
      this.nodes[k].setAttribute('transform', place);
      for (const [name, v] of Object.entries(value)) {
        this.nodes[k].setAttribute(`aria-value${name}`, v);
      }
      this.nodes[k].setAttribute('aria-valuetext', `w ${shortest(w)} at progress ${shortest(tau)}`);
    });
  }
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

// What w is in a family.
function meaningOfW(family) {
  if (family === 'constant') return '';
  if (family === 'points_sched') return 'The points are shares of w.';
  if (family === 'pcs_sched') return 'w is the last weight.';
  const isMean = FAMILIES[family].numbers.includes('w');
  return isMean
    ? 'w is the mean over the steps, if base is 0.'
    : 'w is max_val, the largest weight.';
}

// The family of the schedule and its numbers.
function scheduleControls(frame, model) {
  const family = familySelect(frame, model, 'Weight over the steps');
  const note = element('p', { class: 'note' });
  const { root, sliders } = familyControls(frame, model, { without: UNUSED });
  const show = () => (note.textContent = meaningOfW(model.get('family')));
  onChange(frame, model, ['family'], show);
  show();
  return { family, note, root, sliders };
}

// A rule measures its weights in lengths or not: another kind of rule needs other weights.
function useRule(model, rule) {
  const [before, after] = [isNorm(model.get('rule')), isNorm(rule)];
  const factor = NORM_SCALE ** (after - before);
  const names = before === after ? [] : ['w', ...WEIGHTS];
  const most = after ? 0.5 : 15;
  const fit = (v) => Math.min(most, Number((v * factor).toPrecision(3)));
  change(model, { rule, ...Object.fromEntries(names.map((o) => [o, fit(model.get(o))])) });
}

function makeControls(frame, model) {
  const weight = slider({ label: 'Guidance weight w (1 is unguided)', min: 0, max: 15, step: 0.1 });
  const rules = Object.entries(RULES).map(([name, { title }]) => [name, title]);
  const made = {
    w: weight,
    garment: select({ label: 'Garment', options: GARMENTS }),
    colour: select({ label: 'Colour', options: COLOURS }),
    background: select({ label: 'Background', options: COLOURS }),
    negative: textField({ label: 'Negative prompt', hint: 'empty, or such as: a green boot' }),
    seed: numberField({ label: 'Seed', min: 0, max: 2 ** 32 - 1, step: 1 }),
    steps: slider({ label: 'Steps', min: 4, max: 50, most: 500, step: 1 }),
    rule: select({ label: 'Rule', options: rules }),
  };
  for (const [name, control] of Object.entries(made)) bind(frame, model, name, control);
  made.rule.onInput = (rule) => useRule(model, rule);
  const schedule = scheduleControls(frame, model);
  const fitWeights = () => {
    const range = isNorm(model.get('rule')) ? { max: 0.5, step: 0.01 } : { max: 15, step: 0.1 };
    weight.limit(range);
    weight.set(model.get('w'));
    for (const name of WEIGHTS) {
      schedule.sliders[name].limit(range);
      schedule.sliders[name].set(model.get(name));
    }
  };
  fitWeights();
  onChange(frame, model, ['rule'], fitWeights);
  return { ...made, schedule };
}

// What the live model takes over from the settings of the schedule designer. The designer's cycles,
// warm-up and clamps become the points of a curve.
export function fromDesigner(settings) {
  const s = { ...DEFAULTS, ...settings };
  const interval = s.use_interval ? [s.lo, s.hi] : null;
  const isPlain = s.cycles === 1 && s.warmup === 0 && !s.use_low && !s.use_high;
  const { numbers } = FAMILIES[s.family];
  if (isPlain && s.family !== 'points_sched') {
    const shape = numbers.filter((name) => !UNUSED.includes(name)).map((name) => [name, s[name]]);
    const w = numbers.includes('w') ? s.w : s.max_val;
    return { family: s.family, w, steps: s.num_steps, interval, ...Object.fromEntries(shape) };
  }
  const { ws } = designed({ ...s, use_interval: false });
  const points = isPlain ? s.points : ws.map((w, i) => [i / Math.max(1, ws.length - 1), w]);
  const w = Math.max(...points.map(([, v]) => Math.abs(v))) || 1;
  const curve = points.map(([tau, v]) => [tau, v / w]);
  const kind = isPlain ? s.kind : 'linear';
  return { family: 'points_sched', kind, w, curve, steps: ws.length, interval };
}

// Take over the designer's schedule when its button is pressed.
function listenToDesigner(frame, model) {
  const use = ({ detail }) => {
    const found = fromDesigner(detail);
    const rule = found.w > 1 && isNorm(model.get('rule')) ? { rule: 'cfg' } : {};
    change(model, { ...rule, ...found });
    frame.root.scrollIntoView({ block: 'start' });
  };
  document.addEventListener('explorer-schedule', use);
  frame.onCleanup(() => document.removeEventListener('explorer-schedule', use));
  document.dispatchEvent(new CustomEvent('explorer-live'));
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
    const where = engine.isOnGpu ? ' on the GPU' : '';
    const cost = `${steps} steps, ${found.evaluations} evaluations, ${seconds} s${where}`;
    status.textContent = draft + cost;
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
  onChange(frame, model, Object.keys(START), oncePerFrame(react));

  const another = () => change(model, { seed: Math.floor(Math.random() * 1000) });
  const stacked = 'display: grid; gap: 0.7rem; align-content: start; min-width: 0';
  const stack = (...parts) => element('div', { style: stacked }, ...parts);
  const small = 'grid-template-columns: repeat(auto-fill, minmax(min(100%, 8.5rem), 1fr))';
  const group = (...parts) =>
    element('div', { class: 'controls', style: small }, ...parts.map((o) => o.root));
  const left = stack(made.w.root, picture.node, status, strip.root);
  const right = stack(
    group(made.garment, made.colour, made.background),
    made.rule.root,
    made.schedule.family.root,
    new WeightPlot(frame, model).root,
    made.schedule.note,
    made.schedule.root,
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
    stack(
      code,
      copyButton(() => code.textContent),
    ),
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
      listenToDesigner(frame, model);
      engine.useGpu(); // pictures are drawn meanwhile
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
  const fallback = [...el.children]; // a picture, but not the sentence for readers without scripts
  withDefaults(model, START);
  const frame = mount(el, 'A Stable Diffusion in miniature, live');
  showStart(frame, model, fallback);
  return frame.cleanup;
}

export default { render };

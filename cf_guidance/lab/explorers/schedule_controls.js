// Controls of a schedule's family, for the designer and for the live model.
import { bind, element, onChange, select, slider } from './common.js';
import { FAMILIES, NUMBERS } from './schedule_design.js';

const KINDS = [
  ['pchip', 'a smooth curve (pchip)'],
  ['linear', 'straight lines (linear)'],
];

// A slider for the model's number `name`.
export function numberSlider(frame, model, name) {
  const { value, ...range } = NUMBERS[name];
  const made = slider({ least: range.min, ...range, label: name, value });
  made.root.dataset.number = name;
  return bind(frame, model, name, made);
}

export function familySelect(frame, model, label) {
  const options = Object.entries(FAMILIES).map(([name, { title }]) => [name, `${title} (${name})`]);
  return bind(frame, model, 'family', select({ label, options }));
}

// The sliders of the chosen family: `common` ones first, then its own without those in `without`.
export function familyControls(frame, model, { common = [], without = [] }) {
  const root = element('div', { class: 'controls' });
  const own = Object.values(FAMILIES).flatMap(({ numbers }) => numbers);
  const names = [...common, ...new Set(own)].filter((name) => !without.includes(name));
  const sliders = Object.fromEntries(names.map((name) => [name, numberSlider(frame, model, name)]));
  const kind = bind(frame, model, 'kind', select({ label: 'through the points', options: KINDS }));
  const update = () => {
    const family = model.get('family');
    const shown = [...common, ...FAMILIES[family].numbers].filter((name) => sliders[name]);
    const rows = shown.map((name) => sliders[name].root);
    root.replaceChildren(...rows, ...(family === 'points_sched' ? [kind.root] : []));
  };
  onChange(frame, model, ['family'], update);
  update();
  return { root, sliders };
}

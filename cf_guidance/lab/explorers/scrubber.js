// Pictures of a sweep that flip while one setting is dragged, and curves over that setting.
import { mount, bind, element, slider } from './common.js';

function render({ model, el }) {
  const frame = mount(el, `Pictures for each ${model.get('name')}`);
  const values = model.get('values');
  const control = slider({ label: model.get('name'), min: 0, max: values.length - 1, step: 1 });
  bind(frame, model, 'index', control);
  el.append(element('div', {}, control.root));
  return frame.cleanup;
}

export default { render };

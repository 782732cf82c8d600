// On a page without a kernel: finds <div class="explorer" data-explorer="NAME" data-props="{...}">,
// loads NAME.js from the folder of this file, and renders it.

// What anywidget's model does, over a plain object.
export function localModel(values = {}) {
  const listeners = new Map();
  const emit = (event) => [...(listeners.get(event) ?? [])].forEach((f) => f());
  return {
    get: (name) => values[name],
    set(name, value) {
      const same = JSON.stringify(values[name]) === JSON.stringify(value);
      values[name] = value;
      if (!same) emit(`change:${name}`);
    },
    save_changes: () => emit('saved'),
    on(event, f) {
      listeners.set(event, [...(listeners.get(event) ?? []), f]);
    },
    off(event, f) {
      listeners.set(
        event,
        (listeners.get(event) ?? []).filter((g) => g !== f),
      );
    },
  };
}

async function start(el) {
  if (el.dataset.state) return;
  el.dataset.state = 'loading';
  const name = el.dataset.explorer;
  const fallback = [...el.childNodes];
  try {
    const { default: explorer } = await import(new URL(`./${name}.js`, import.meta.url));
    const model = localModel(JSON.parse(el.dataset.props || '{}'));
    await explorer.render({ model, el });
    el.model = model;
    el.dataset.state = 'ready';
  } catch (error) {
    el.replaceChildren(...fallback);
    el.dataset.state = 'failed';
    el.dataset.error = String(error);
  }
}

export function startAll(page = document) {
  return Promise.all([...page.querySelectorAll('[data-explorer]')].map(start));
}

if (document.readyState === 'loading') addEventListener('DOMContentLoaded', () => startAll());
else startAll();

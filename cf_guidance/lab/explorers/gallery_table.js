// What a gallery shows and where: filter its pictures, order them, put them into a grid.
// `data` has `axes` [{ name, values, numbers, of }], where `of[i]` is the value of picture i, and
// `measurements` [{ name, of }]. An arrangement is { columns, rows, at }: heads, and the picture
// in row r and column c as at[r * columns.length + c], or -1.

export function axisNamed(data, name) {
  return data.axes.find((axis) => axis.name === name);
}

export function valueOf(axis, i) {
  return axis.values[axis.of[i]];
}

// 'w 7.5'; a prompt speaks for itself.
export function named(axis, value) {
  return axis.name === 'prompt' ? axis.values[value] : `${axis.name} ${axis.values[value]}`;
}

// ---------------------------------------------------------------------------- filters

const MANY = 24; // values of an axis that are not listed one by one

export function isListed(axis) {
  return axis.values.length <= MANY;
}

// '1, 3, 10-20' as a test of numbers; null if it is not such a list.
function numberTest(text) {
  const number = String.raw`-?[\d.]+(?:e[-+]?\d+)?`;
  const range = new RegExp(`^(${number})(?:\\s*[-–]\\s*(${number}))?$`, 'i');
  const found = text.split(',').map((part) => part.trim().match(range));
  if (!found.every(Boolean)) return null;
  const ranges = found.map(([, low, high = low]) => [Number(low), Number(high)]);
  return (x) => ranges.some(([low, high]) => x >= low && x <= high);
}

// The values of an axis that a typed filter keeps: numbers and ranges, or words they contain.
export function matching(axis, text) {
  const all = axis.values.map((_, v) => v);
  const test = axis.numbers && numberTest(text);
  if (test) {
    const known = all.filter((v) => axis.numbers[v] !== null);
    return new Set(known.filter((v) => test(axis.numbers[v])));
  }
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  const has = (value) => words.every((word) => value.toLowerCase().includes(word));
  return new Set(all.filter((v) => has(axis.values[v])));
}

// The values that a filter keeps: a typed text, or a list of their texts.
function keptBy(axis, filter) {
  if (typeof filter === 'string') return matching(axis, filter);
  return new Set(axis.values.map((_, v) => v).filter((v) => filter.includes(axis.values[v])));
}

// The pictures that all filters keep; `filters` is a map of names of axes to filters.
export function filtered(data, filters) {
  const tests = [...filters].map(([name, filter]) => {
    const axis = axisNamed(data, name);
    return [axis.of, keptBy(axis, filter)];
  });
  const all = Array.from({ length: data.count }, (_, i) => i);
  return all.filter((i) => tests.every(([of, values]) => values.has(of[i])));
}

// ---------------------------------------------------------------------------- order

// Pictures by a measurement; those without one come last.
export function ordered(data, pictures, { name, falling }) {
  const { of } = data.measurements.find((o) => o.name === name);
  const sign = falling ? -1 : 1;
  const known = pictures.filter((i) => of[i] !== null);
  const unknown = pictures.filter((i) => of[i] === null);
  return [...known.sort((i, j) => sign * (of[i] - of[j])), ...unknown];
}

// ---------------------------------------------------------------------------- places

function compareKeys(a, b) {
  for (let k = 0; k < a.length; k++) if (a[k] !== b[k]) return a[k] - b[k];
  return 0;
}

// The distinct keys in order, and a map from each to its place.
function places(keys) {
  const distinct = [...new Map(keys.map((key) => [key.join(), key])).values()].sort(compareKeys);
  return { distinct, place: new Map(distinct.map((key, k) => [key.join(), k])) };
}

// The last number of a row's key tells copies apart: pictures with the same values of all axes.
function headText(axes, key) {
  const words = axes.map((axis, k) => named(axis, key[k]));
  if (key.length > axes.length && key.at(-1) > 0) words.push(`copy ${key.at(-1) + 1}`);
  return words.join(', ');
}

function keysOf(axes, pictures) {
  return pictures.map((i) => axes.map((axis) => axis.of[i]));
}

// Add to each row key the number of pictures before it in the same place.
function withCopies(rowKeys, columnKeys) {
  const seen = new Map();
  return rowKeys.map((key, k) => {
    const place = `${key}|${columnKeys[k]}`;
    const copies = seen.get(place) ?? 0;
    seen.set(place, copies + 1);
    return [...key, copies];
  });
}

function inGrid(rowAxes, columnAxes, pictures) {
  const columnKeys = keysOf(columnAxes, pictures);
  const rowKeys = withCopies(keysOf(rowAxes, pictures), columnKeys);
  const [rows, columns] = [places(rowKeys), places(columnKeys)];
  const width = columns.distinct.length;
  const at = new Int32Array(rows.distinct.length * width).fill(-1);
  pictures.forEach((i, k) => {
    const row = rows.place.get(rowKeys[k].join());
    at[row * width + columns.place.get(columnKeys[k].join())] = i;
  });
  return {
    rows: rows.distinct.map((key) => headText(rowAxes, key)),
    columns: columns.distinct.map((key) => headText(columnAxes, key)),
    at,
  };
}

// One column per value, its pictures from first to last.
function ranked(axis, pictures) {
  const lists = axis.values.map(() => []);
  for (const i of pictures) lists[axis.of[i]].push(i);
  const kept = axis.values.map((_, v) => v).filter((v) => lists[v].length);
  const height = Math.max(0, ...kept.map((v) => lists[v].length));
  const at = new Int32Array(height * kept.length).fill(-1);
  kept.forEach((v, c) => lists[v].forEach((i, r) => (at[r * kept.length + c] = i)));
  return {
    rows: Array.from({ length: height }, (_, r) => String(r + 1)),
    columns: kept.map((v) => headText([axis], [v])),
    at,
  };
}

// Lines of `across` pictures.
function wall(pictures, across) {
  const height = Math.ceil(pictures.length / across);
  const at = new Int32Array(height * across).fill(-1);
  at.set(pictures);
  return { rows: Array(height).fill(''), columns: Array(across).fill(''), at };
}

// `view`: { columns, rows, tabs, sort }, three names of axes or null, and { name, falling } or
// null; `across` is the number of pictures that fit beside one another. An axis that has no place
// of its own is nested into the rows, or into the columns if only the rows have an axis. A sorted
// gallery has no rows: each column goes from first to last.
export function arranged(data, pictures, view, across) {
  const [columns, rows] = [axisNamed(data, view.columns), axisNamed(data, view.rows)];
  if (view.sort) {
    const order = ordered(data, pictures, view.sort);
    return columns ? ranked(columns, order) : wall(order, across);
  }
  if (!columns && !rows) return wall(pictures, across);
  const placed = [view.columns, view.rows, view.tabs];
  const rest = data.axes.filter((axis) => axis.varies && !placed.includes(axis.name));
  if (columns) return inGrid(rows ? [rows, ...rest] : rest, [columns], pictures);
  return inGrid([rows], rest, pictures);
}

// ---------------------------------------------------------------------------- first view

// The view to open with: the last setting (it runs fastest) in columns, and prompts or seeds, if
// there are several, in rows.
export function firstView(data) {
  const names = data.axes.filter((axis) => axis.varies).map((axis) => axis.name);
  const sample = names.filter((name) => ['prompt', 'negative_prompt', 'seed'].includes(name));
  const settings = names.filter((name) => !sample.includes(name));
  const columns = settings.at(-1) ?? sample.at(-1) ?? null;
  const rest = [...settings, ...sample].filter((name) => name !== columns);
  const rows = rest.find((name) => sample.includes(name)) ?? rest.at(-1) ?? null;
  return { columns, rows, tabs: null, sort: null };
}

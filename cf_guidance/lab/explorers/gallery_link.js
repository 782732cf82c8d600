// The view of a gallery as the text behind '#' in the address of its page, and back. The text has
// only what differs from the first view. What the gallery does not know is left out.
import { axisNamed, firstView, isListed } from './gallery_table.js';

const PLACES = ['columns', 'rows', 'tabs'];

// `view`: as for `arranged`; `tab`: a value of the axis of tabs; `filters`: a map of names of axes
// to a typed text or a list of values; `below`: a measurement, `picture`: the open one, or null.
export function linkOf(data, { view, tab, filters, below, picture }) {
  const [link, first] = [new URLSearchParams(), firstView(data)];
  for (const place of PLACES) if (view[place] !== first[place]) link.set(place, view[place] ?? '');
  if (view.tabs && tab) link.set('tab', axisNamed(data, view.tabs).values[tab]);
  if (view.sort) link.set(view.sort.falling ? 'highest' : 'lowest', view.sort.name);
  if (below) link.set('below', below);
  for (const [name, filter] of filters) link.set(`only ${name}`, JSON.stringify(filter));
  if (picture !== null) link.set('picture', picture);
  return link.toString();
}

export function stateOf(data, text) {
  const link = new URLSearchParams(text);
  const view = placesOf(data, link);
  const tab = axisNamed(data, view.tabs)?.values.indexOf(link.get('tab')) ?? 0;
  const measured = (name) => data.measurements.some((o) => o.name === name);
  for (const way of ['highest', 'lowest']) {
    const name = link.get(way);
    if (measured(name)) view.sort = { name, falling: way === 'highest' };
  }
  const below = measured(link.get('below')) ? link.get('below') : null;
  const number = Number(link.get('picture') ?? -1);
  const picture = data.place[number] === undefined ? null : number;
  return { view, tab: Math.max(0, tab), filters: filtersOf(data, link), below, picture };
}

function placesOf(data, link) {
  const view = firstView(data);
  for (const place of PLACES) {
    if (!link.has(place)) continue;
    const axis = axisNamed(data, link.get(place));
    view[place] = axis?.varies ? axis.name : null;
  }
  return view;
}

function filtersOf(data, link) {
  const filters = new Map();
  for (const axis of data.axes) {
    const text = link.get(`only ${axis.name}`);
    if (text === null) continue;
    const filter = parsed(text);
    const fits = isListed(axis) ? Array.isArray(filter) : typeof filter === 'string';
    if (fits) filters.set(axis.name, filter);
  }
  return filters;
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

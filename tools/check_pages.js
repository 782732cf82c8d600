// Looks at the page in the browser and returns what is wrong, as {problems, facts}.
// `light` says whether the page is shown in its light colours.
const [wide, light] = arguments;
const problems = [], facts = {};
const all = (css, root = document) => [...root.querySelectorAll(css)];
const say = (kind, what) => problems.push([kind, String(what).replace(/\s+/g, ' ').trim().slice(0, 160)]);
const name = (e) => `<${e.tagName.toLowerCase()}${e.id ? ' #' + e.id : ''}${e.classList.length ? ' .' + [...e.classList].join('.') : ''}>`;
const scrolls = (e) => /auto|scroll|hidden/.test(getComputedStyle(e).overflowX);
const root = document.documentElement, width = root.clientWidth, main = document.querySelector('main') ?? document.body;

// ---- nothing is wider than the window, except inside boxes that scroll
if (root.scrollWidth > width) say('sideways', `the page is ${root.scrollWidth} px wide in a window of ${width} px`);
const scroller = (e) => { for (let p = e.parentElement; p && p !== document.body; p = p.parentElement) if (scrolls(p)) return p; };
for (const e of all('main *, header *, footer *')) {
  const r = e.getBoundingClientRect();
  if (!r.width || !r.height || e.closest('.katex-mathml, .visually-hidden, #quarto-sidebar, .dropdown-menu')) continue;
  if ((r.right > width + 1 || r.left < -1) && !scroller(e)) say('overflow', `${name(e)} reaches from ${Math.round(r.left)} to ${Math.round(r.right)} px`);
}
const boxes = all('main pre, main .cell-output, main table').filter((e) => e.offsetWidth && !e.closest('.explorer'));
facts.boxes = boxes.length;
facts.scrolling = 0;
for (const e of all('main pre, main .cell-output-display, main .sd-table, main .math.display')) {
  if (!e.offsetWidth || e.scrollWidth <= e.clientWidth + 1) continue;
  facts.scrolling++;
  if (wide && (e.tagName === 'PRE' || e.matches('.math'))) say('long line', `${name(e)} is ${e.scrollWidth} px wide in a box of ${e.clientWidth} px: ${e.innerText.split('\n').sort((a, b) => b.length - a.length)[0]}`);
}
const code = all('main pre.cell-code > code').find((e) => e.offsetWidth);
if (wide && code) {
  const probe = document.createElement('span'), pre = code.parentElement, style = getComputedStyle(pre);
  probe.textContent = '0'.repeat(100);
  code.append(probe);
  const room = pre.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
  if (probe.getBoundingClientRect().width > room + 1) say('narrow code', `100 characters need ${probe.getBoundingClientRect().width} px, the box has ${room} px`);
  probe.remove();
}
facts.height = root.scrollHeight;
if (wide && facts.height > 30000) say('tall', `the page is ${facts.height} px high`);

// ---- header
const search = document.querySelector('#quarto-search input, #quarto-search');
if (wide && document.querySelector('.navbar')) {
  const r = search?.getBoundingClientRect();
  if (!r || r.width < 120 || r.right > width || r.left < 0) say('search box', r ? `it reaches from ${r.left} to ${r.right} px` : 'there is none');
  const entries = all('.navbar .navbar-nav .menu-text');
  if (entries.length > 5) say('navbar', `${entries.length} entries`);
}

// ---- pictures, and what else is drawn
for (const e of all('img')) {
  if (!e.complete || !e.naturalWidth) say('broken picture', e.getAttribute('src'));
  if (!e.alt.trim()) say('no alt text', e.getAttribute('src').slice(0, 60));
}
for (const e of all('main canvas, main svg:not(.katex svg)')) {
  const label = e.closest('[aria-label], [aria-labelledby], [aria-hidden=true]') || e.querySelector('title') || e.getAttribute('alt');
  if (!label) say('no alt text', name(e));
}

// ---- formulas and Markdown
for (const e of all('.katex-error')) say('formula', e.title || e.textContent);
for (const e of all('span.math')) if (!e.querySelector('.katex')) say('formula', `not rendered: ${e.textContent}`);
const walk = document.createTreeWalker(main, NodeFilter.SHOW_TEXT);
const raw = /\$[^\s$][^$\n]*\$|\\[([]|\\[a-z]{3,}|\$\$/, markdown = /\]\s?\([^)\s]+\)|\*\*|`/;
for (let t = walk.nextNode(); t; t = walk.nextNode()) {
  const e = t.parentElement;
  if (e.closest('script, style, .katex, .math, textarea')) continue;
  if (/\]\s?\(https?:/.test(t.data) && e.closest('.cell-output-markdown')) say('raw Markdown', t.data);
  if (e.closest('pre, code, .cell-output-stdout')) continue;
  if (raw.test(t.data)) say('raw TeX', t.data);
  else if (markdown.test(t.data)) say('raw Markdown', t.data);
}

// ---- headings
const seen = new Set();
for (const h of all('main :is(h1, h2, h3, h4)')) {
  const text = h.innerText.trim();
  if (seen.has(text) && !h.closest('.explorer')) say('heading twice', text);
  seen.add(text);
  if (/(^|\.)_[a-z]/i.test(text)) say('private name', text);
}

// ---- what every page has
for (const css of ['meta[name=description]', 'meta[name=author]', 'meta[property="og:image"]', 'link[rel=icon]', '.reading-time', 'main .date, main [class*=date]'])
  if (!document.querySelector(css)) say('missing', css);
facts.badge = all('main img').some((e) => e.alt === 'Open in Colab');
if (!facts.badge) say('no badge', document.title);

// ---- contrast of text and its background, at least 3 to 1
const rgb = (s) => {
  const [r, g, b, a = 1] = (s.match(/[\d.]+/g) ?? [0, 0, 0, 0]).map(Number);
  const scale = s.startsWith('color(') ? 255 : 1;
  return [r * scale, g * scale, b * scale, a];
};
const lum = (c) => [0, 1, 2].map((i) => c[i] / 255).map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4).reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
const over = (a, b) => { const t = a[3] ?? 1; return [0, 1, 2].map((i) => a[i] * t + b[i] * (1 - t)); };
const ground = (e) => { const c = e ? rgb(getComputedStyle(e).backgroundColor) : [255, 255, 255]; return !e || (c[3] ?? 1) === 1 ? c : over(c, ground(e.parentElement)); };
const pairs = new Map();
for (const e of all('main *, nav *, footer *')) {
  if (!e.offsetWidth || e.closest('svg, .katex-mathml, .explorer') || ![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
  if (e.checkVisibility && !e.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
  const back = ground(e), front = over(rgb(getComputedStyle(e).color), back), [a, b] = [lum(front), lum(back)].sort((x, y) => y - x);
  if ((a + .05) / (b + .05) < 3) pairs.set(`${front.map(Math.round)} on ${back.map(Math.round)}`, e);
}
for (const [pair, e] of pairs) say('contrast', `${pair}: ${name(e)} ${e.textContent.slice(0, 40)}`);
const bright = lum(ground(document.body)) > .5;
if (bright !== light) say('colours', `the page is ${bright ? 'bright' : 'dark'} in ${light ? 'light' : 'dark'} mode`);

// ---- interactive figures have been drawn
for (const e of all('[data-explorer]')) if (e.dataset.state !== 'ready') say('explorer', `${e.dataset.explorer}: ${e.dataset.state ?? 'not loaded'}`);

facts.ids = [...all('[id]').map((e) => e.id), ...all('a[name]').map((e) => e.name)];
facts.links = [...new Set(all('a[href], link[href]').map((e) => e.href))];
return { problems, facts };

// what all parts of the page share; names from the data reach the page as text alone, never as HTML
const data = JSON.parse(document.getElementById('data').textContent);
const album = data.album;
const heldout = new Set(album.heldout);
const byId = (id) => document.getElementById(id);

// an element with attributes and children; strings become text
function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? '' : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

function fill(element, ...children) {
  element.replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined));
}

function options(select, entries, chosen) {
  fill(select, entries.map(([value, text]) => make('option', {value, selected: String(value) === String(chosen)}, text)));
}

const className = (image) => album.classes[album.labels[image]];
const fileName = (image) => album.names[image].slice(album.names[image].indexOf('/') + 1);

// a picture of the album, which is decoded when it comes near the screen
function pictureBox(number, what) {
  if (number < 0 || number === undefined) return make('span', {class: 'picture none'}, 'not kept');
  const source = `data:image/webp;base64,${album.pictures[number]}`;
  return make('span', {class: 'picture'}, make('img', {src: source, alt: what, loading: 'lazy', decoding: 'async'}));
}

const imageBox = (image) => pictureBox(album.picture[image], album.names[image]);

function bytes(text) {
  const raw = atob(text);
  return Uint8Array.from({length: raw.length}, (_, i) => raw.charCodeAt(i));
}

function number(value, digits = 3) {
  return value === null || value === undefined ? '–' : value.toFixed(digits).replace('-', '\u2212');
}

const count = (value) => value.toLocaleString('en');

// the 95 % interval of the share k of n by Wilson, in words
function interval(k, n) {
  if (!n) return '';
  const z = 1.959963984540054, share = k / n;
  const middle = share + z * z / (2 * n), half = z * Math.sqrt(share * (1 - share) / n + z * z / (4 * n * n));
  const ends = [k ? (middle - half) / (1 + z * z / n) : 0, k < n ? (middle + half) / (1 + z * z / n) : 1];
  return `${ends.map((end) => (100 * end).toFixed(1)).join(' to ')} %`;
}

// pages of a long list: buttons in a <nav>, and a function that draws one page
function pages(nav, size, draw) {
  let total = 0, page = 0;
  const before = make('button', {type: 'button', onclick: () => go(page - 1)}, '\u2190 back');
  const after = make('button', {type: 'button', onclick: () => go(page + 1)}, 'next \u2192');
  const where = make('span', {});
  function go(wanted) {
    page = Math.max(0, Math.min(wanted, Math.ceil(total / size) - 1));
    const start = page * size, stop = Math.min(total, start + size);
    before.disabled = page === 0;
    after.disabled = stop >= total;
    where.textContent = total ? `${count(start + 1)} to ${count(stop)} of ${count(total)}` : 'none';
    fill(nav, total > size ? [before, where, after] : []);
    draw(start, stop);
  }
  return {show(length, first = 0) { total = length; go(Math.floor(first / size)); }};
}

// charts: plotly reads some signs of a text as HTML, so names are written without them
const forPlotly = (text) => text.replace(/&/g, '&amp;').replace(/</g, '&lt;').replace(/>/g, '&gt;');
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const narrow = () => window.innerWidth < 736;
const charts = [];

function layoutOf(more) {
  const axis = {gridcolor: colour('line'), zerolinecolor: colour('line'), linecolor: colour('line'), automargin: true};
  const text = (given) => ({...axis, ...given, title: {text: given.title || '', font: {size: 13}}});
  return {
    paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)', hovermode: 'closest',
    font: {color: colour('ink'), family: getComputedStyle(document.body).fontFamily, size: 12.5},
    hoverlabel: {bgcolor: colour('card'), bordercolor: colour('line'), font: {color: colour('ink')}},
    margin: {l: 56, r: 18, t: 18, b: 58}, legend: {orientation: 'h', y: 1.02, yanchor: 'bottom', x: 0},
    ...more, xaxis: text(more.xaxis || {}), yaxis: text(more.yaxis || {}),
  };
}

// draw a chart now, and again when the colours of the page or its width change
function chart(element, build) {
  const draw = () => {
    const {traces, layout} = build();
    return Plotly.react(element, traces, layoutOf(layout), {responsive: true, displaylogo: false, displayModeBar: false});
  };
  charts.push(draw);
  draw();
  return draw;
}

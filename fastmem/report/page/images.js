// which images own units, and the risk of single images as a table that sorts
function startImages() {
  const risk = data.risk, rows = risk.image.length;
  if (!rows) {
    fill(byId('images-content'), make('p', {class: 'missing'}, 'No image owns a top unit, and none was attacked yet.'));
    return;
  }
  const bars = risk.bars;
  if (bars.image.length) {
    chart(byId('owned-chart'), () => ({
      traces: [{type: 'bar', x: bars.image.map((_, i) => i + 1), y: bars.owned, marker: {color: colour('train')}, text: bars.image.map((i) => forPlotly(album.names[i])),
        textposition: 'none', hovertemplate: '%{text}<br>owns %{y} top units<extra></extra>'}],
      layout: {xaxis: {title: `the ${bars.image.length} images that own most, of ${count(risk.owning)} that own any and ${count(risk.images)} in all`, showgrid: false, dtick: bars.image.length > 12 ? 5 : 1},
        yaxis: {title: 'top units owned'}, bargap: 0.2},
    }));
    byId('owned-chart').on('plotly_click', (event) => { find.value = album.names[bars.image[event.points[0].pointIndex]]; show(); });
  } else byId('owned-chart').remove();

  const verdict = (i) => (risk.similarity[i] === null || risk.threshold === null ? 'not attacked' : risk.similarity[i] > risk.threshold ? 'extracted' : 'not extracted');
  const columns = [
    ['image', (i) => album.names[risk.image[i]], 1], ['class', (i) => className(risk.image[i]), 1], ['owned units', (i) => risk.owned[i], -1],
    ['hits', (i) => risk.hits[i], -1], ['loss', (i) => risk.loss[i], 1], ['similarity', (i) => risk.similarity[i], -1], ['verdict', verdict, 1],
  ];
  const find = byId('risk-find'), table = byId('risk-table'), body = table.tBodies[0];
  const state = {column: risk.prefix === null ? 2 : 5, direction: -1};
  let shown = [];

  const buttons = columns.map(([name, , first], c) => make('button', {type: 'button', onclick: () => {
    state.direction = state.column === c ? -state.direction : first;
    state.column = c;
    show();
  }}, name));
  const heads = buttons.map((button) => make('th', {scope: 'col'}, button));
  fill(table.tHead, make('tr', {}, data.withPictures ? make('th', {scope: 'col'}, make('span', {class: 'quiet'}, '')) : null, heads));

  const pager = pages(byId('images-pager'), 25, (start, stop) => fill(body, shown.slice(start, stop).map((i) => {
    const image = risk.image[i], told = verdict(i);
    return make('tr', {}, data.withPictures ? make('td', {class: 'tiny'}, imageBox(image)) : null, make('th', {scope: 'row'}, fileName(image)), make('td', {}, className(image)),
      [count(risk.owned[i]), number(risk.hits[i]), number(risk.loss[i]), number(risk.similarity[i])].map((text) => make('td', {class: 'number'}, text)),
      make('td', {}, make('span', {class: told === 'extracted' ? 'tag yes' : 'tag'}, told)));
  })));

  function show() {
    const wanted = find.value.trim().toLowerCase(), [, value] = columns[state.column];
    shown = Array.from({length: rows}, (_, i) => i).filter((i) => !wanted || album.names[risk.image[i]].toLowerCase().includes(wanted));
    // what was not measured stays at the end in both directions
    shown.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === null || y === null) return (x === null) - (y === null) || a - b;
      return (x < y ? -1 : x > y ? 1 : 0) * state.direction || a - b;
    });
    heads.forEach((head, c) => {
      if (c === state.column) head.setAttribute('aria-sort', state.direction > 0 ? 'ascending' : 'descending');
      else head.removeAttribute('aria-sort');
      buttons[c].textContent = columns[c][0] + (c === state.column ? (state.direction > 0 ? ' \u25b2' : ' \u25bc') : '');
    });
    byId('risk-count').textContent = `${count(shown.length)} of ${count(rows)} images` + (risk.left_out ? `; ${count(risk.left_out)} more are in the tables of the run` : '')
      + (risk.prefix === null ? '' : `; similarity from ${risk.prefix} tokens, extracted above ${risk.threshold}`);
    pager.show(shown.length);
  }
  find.addEventListener('input', show);
  show();
}

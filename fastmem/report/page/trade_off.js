// what edits stop against what they cost
const SYMBOLS = ['circle', 'square', 'diamond', 'triangle-up', 'triangle-down', 'pentagon', 'hexagon'];
const TINTS = ['#2a78b0', '#d1495b', '#e0a030', '#3d9b6a', '#9a70c0', '#a0764c', '#c977a8'];

function startEdits() {
  const edits = data.edits, box = byId('edits-chart');
  if (!edits || !box) return;
  const rows = edits.rows.filter((row) => row.extracted);
  const placed = rows.filter((row) => row.cost !== null);
  const known = placed.length > 1;
  if (rows.length < 2) { box.remove(); return; }
  chart(box, () => ({
    traces: (known ? placed : rows).map((row, i) => ({
      type: 'scatter', mode: 'markers', name: forPlotly(row.edit === null ? 'no edit' : row.control ? `${row.edit} (control)` : row.edit),
      x: [known ? row.cost : i], y: [row.extracted.k],
      error_y: {type: 'data', symmetric: false, array: [row.extracted.n * row.extracted.high - row.extracted.k], arrayminus: [row.extracted.k - row.extracted.n * row.extracted.low], thickness: 1.2, width: 5},
      ...(known && row.cost_ends ? {error_x: {type: 'data', symmetric: false, array: [row.cost_ends[1] - row.cost], arrayminus: [row.cost - row.cost_ends[0]], thickness: 1.2, width: 5}} : {}),
      marker: {size: row.edit === null ? 15 : 12, symbol: row.edit === null ? 'star' : row.control ? 'x' : SYMBOLS[i % SYMBOLS.length], color: row.edit === null ? colour('ink') : row.control ? colour('soft') : TINTS[i % TINTS.length]},
      hovertemplate: `%{fullData.name}<br>%{y} of ${row.extracted.n} extracted<br>${known ? `${forPlotly(edits.cost)} %{x:+.4f}` : ''}<extra></extra>`,
    })),
    layout: {showlegend: true, yaxis: {title: 'extracted candidates', rangemode: 'tozero'},
      xaxis: known ? {title: `loss of quality: rise of ${forPlotly(edits.cost)} over no edit`} : {title: 'quality was not measured for all: fastmem evaluate', showticklabels: false}},
  }));
}

function startSweep() {
  const sweep = data.sweep, box = byId('sweep-chart');
  if (!sweep || !box) return;
  const names = [...new Set(sweep.lines.filter((l) => l.kind === 'line' || l.kind === 'control').map((l) => l.by))];
  const told = (line, point) => `${forPlotly(point.title)}<br>extracted ${point.extracted[0].toFixed(1)}${point.seeds > 1 ? ` (${point.extracted[1]} to ${point.extracted[2]} over ${point.seeds} seeds)` : ''}<br>${forPlotly(sweep.cost)} ${point.cost[0] < 0 ? '\u2212' : '+'}${Math.abs(point.cost[0]).toFixed(4)}`
    + (point.front ? '<br>no other edit beats it in both' : '') + (point.chosen ? `<br>kept as ${forPlotly(point.chosen)}` : '');
  chart(box, () => {
    const traces = [];
    for (const line of sweep.lines.filter((l) => l.kind === 'band')) {
      const tint = line.by === 'random' ? '127,127,127' : '70,160,200', x = line.points.map((p) => p.cost[0]);
      const [low, high] = [1, 2].map((k) => line.points.map((p) => p.extracted[k]));
      const name = `${line.by}, x${line.factor}: all seeds`;
      traces.push({type: 'scatter', mode: 'lines', x: [...x, ...x.slice().reverse()], y: [...high, ...low.slice().reverse()], fill: 'toself', fillcolor: `rgba(${tint},.28)`, line: {width: 0}, hoverinfo: 'skip', name, legendgroup: name});
      traces.push({type: 'scatter', mode: 'lines+markers', x, y: line.points.map((p) => p.extracted[0]), text: line.points.map((p) => told(line, p)), hovertemplate: '%{text}<extra></extra>', line: {color: `rgb(${tint})`, width: 1.2}, marker: {size: 5}, name, legendgroup: name, showlegend: false});
    }
    for (const line of sweep.lines.filter((l) => l.kind !== 'band')) {
      const i = names.indexOf(line.by), none = line.kind === 'none';
      traces.push({type: 'scatter', mode: 'lines+markers', name: none ? 'no edit' : `${line.by}, x${line.factor}`, x: line.points.map((p) => p.cost[0]), y: line.points.map((p) => p.extracted[0]),
        text: line.points.map((p) => told(line, p)), hovertemplate: '%{text}<extra></extra>', line: {width: 1.6, dash: line.kind === 'control' ? 'dot' : 'solid', color: none ? colour('ink') : TINTS[i % TINTS.length]},
        marker: {size: none ? 14 : 8, symbol: none ? 'star' : SYMBOLS[i % SYMBOLS.length]}});
    }
    const mark = (choice, name, marker) => {
      const points = sweep.lines.flatMap((l) => l.points.filter(choice));
      if (points.length) traces.push({type: 'scatter', mode: 'markers', name, x: points.map((p) => p.cost[0]), y: points.map((p) => p.extracted[0]), hoverinfo: 'skip', marker});
    };
    mark((p) => p.front, 'not beaten in both', {size: 17, symbol: 'circle-open', color: colour('good'), line: {width: 2}});
    mark((p) => p.chosen, 'kept in this run', {size: 15, symbol: 'star', color: colour('gold'), line: {width: 1, color: colour('card')}});
    return {traces, layout: {showlegend: true, xaxis: {title: `loss of quality: rise of ${forPlotly(sweep.cost)}`}, yaxis: {title: `extracted, of ${sweep.targets} targets`, rangemode: 'tozero'}}};
  });
  const table = byId('sweep-table');
  fill(table.tHead, make('tr', {}, ['edit', 'seeds', 'extracted', `rise of ${sweep.cost}`, ''].map((name) => make('th', {scope: 'col'}, name))));
  fill(table.tBodies[0], sweep.lines.flatMap((line) => line.points.map((p) => make('tr', {}, make('th', {scope: 'row'}, p.title), make('td', {class: 'number'}, String(p.seeds)),
    make('td', {class: 'number'}, p.seeds > 1 ? `${p.extracted[0].toFixed(1)} (${p.extracted[1]} to ${p.extracted[2]})` : String(p.extracted[0])),
    make('td', {class: 'number'}, number(p.cost[0], 4)), make('td', {}, p.front ? make('span', {class: 'tag'}, 'not beaten') : null, p.chosen ? make('span', {class: 'tag yes'}, `kept as ${p.chosen}`) : null)))));
}

// the map of units, the list of those that can be opened, and what is known of one
function startUnits() {
  const map = data.units;
  if (!map) {
    fill(byId('units-content'), make('p', {class: 'missing'}, 'These images have no UnitMem: score more of them.'));
    return;
  }
  const opened = map.opened, total = opened.unit.length;
  const place = new Map(opened.unit.map((unit, i) => [opened.layer[i] * map.units + unit, i]));
  const cells = new Map();
  const orders = new Map();
  const state = {colour: 0, segment: 0, order: 'score', cursor: [0, 0], chosen: -1};
  const inputs = {colour: byId('unit-colour'), segment: byId('unit-segment'), order: byId('unit-order')};
  const rings = byId('unit-rings'), kind = byId('unit-kind'), element = byId('unit-map'), status = byId('unit-status');
  options(inputs.colour, map.colours.map((c, i) => [i, c.name]), 0);
  options(inputs.segment, [[0, 'highest of all'], ...map.segments.map((name, i) => [i + 1, name])], 0);
  const kinds = {top: 'highest by UnitMem', gap: 'highest by gap', random: 'random, to compare'};
  const present = Object.keys(kinds).filter((name) => opened.kind.includes(name));
  options(kind, present.map((name) => [name, `${kinds[name]} (${opened.kind.filter((k) => k === name).length})`]), 'top');

  function values(colourIndex, segment) {
    const key = `${colourIndex} ${segment}`;
    if (!cells.has(key)) {
      const {low, high, cells: packed} = map.colours[colourIndex];
      cells.set(key, Float32Array.from(bytes(packed[segment]), (byte) => low + byte / 255 * (high - low)));
    }
    return cells.get(key);
  }

  // few units are far below the others, and would take the colours
  const floor = (all) => all.slice().sort()[Math.floor(all.length / 100)];

  // the unit at each place of each block
  function order() {
    const key = state.order === 'number' ? 'number' : `${state.colour} ${state.segment}`;
    if (!orders.has(key)) {
      const all = values(state.colour, state.segment);
      orders.set(key, Array.from({length: map.layers}, (_, layer) => {
        const own = Array.from({length: map.units}, (_, unit) => unit);
        const at = layer * map.units;
        return key === 'number' ? own : own.sort((a, b) => all[at + b] - all[at + a] || a - b);
      }));
    }
    return orders.get(key);
  }

  function build() {
    const all = values(state.colour, state.segment), placed = order(), {name, low, high} = map.colours[state.colour];
    const z = placed.map((own, layer) => own.map((unit) => all[layer * map.units + unit]));
    const where = placed.map((own) => { const back = new Int32Array(map.units); own.forEach((unit, x) => { back[unit] = x; }); return back; });
    const shown = rings.checked ? Array.from({length: total}, (_, i) => i) : [];
    const told = (i) => `block ${opened.layer[i]}, unit ${opened.unit[i]}<br>UnitMem ${number(opened.scores.UnitMem[i])} over ${forPlotly(map.segments[opened.segment[i]])}`
      + (opened.images[i].length ? `<br>most by ${forPlotly(album.names[opened.images[i][0]])}` : '') + '<br>click to open';
    const dot = (i) => (opened.kind[i] === 'random' ? 'rgba(127,127,127,.85)' : opened.kind[i] === 'gap' ? '#f2b134' : '#ff5a6e');
    const [layer, x] = state.cursor;
    return {
      traces: [
        {
          type: 'heatmap', z, customdata: placed, zmin: low < 0 ? low : floor(all), zmax: high, zsmooth: false,
          colorscale: low < 0 ? 'RdBu' : 'Viridis', reversescale: low < 0,
          hovertemplate: `block %{y}, unit %{customdata}<br>${name} %{z:.2f}<extra></extra>`,
          colorbar: {title: {text: narrow() ? '' : name, side: 'right'}, thickness: 12, outlinewidth: 0, ...(narrow() ? {orientation: 'h', y: -0.12, yanchor: 'top', len: 1, thickness: 9} : {})},
        },
        {
          type: 'scatter', mode: 'markers', x: shown.map((i) => where[opened.layer[i]][opened.unit[i]]), y: shown.map((i) => opened.layer[i]),
          customdata: shown, text: shown.map(told), hovertemplate: '%{text}<extra></extra>', showlegend: false,
          marker: {symbol: 'circle-open', size: 5.5, line: {width: 1.2}, color: shown.map(dot)},
        },
        {
          type: 'scatter', mode: 'markers', x: [x], y: [layer], hoverinfo: 'skip', showlegend: false,
          marker: {symbol: 'square-open', size: 15, color: '#ffffff', line: {width: 3, color: '#ffffff'}},
        },
      ],
      layout: {
        xaxis: {title: narrow() ? '' : state.order === 'score' ? `units, by ${name} in this block` : 'unit', showgrid: false, zeroline: false, range: [-0.5, map.units - 0.5]},
        yaxis: {title: 'block', showgrid: false, zeroline: false, range: [map.layers - 0.5, -0.5], dtick: map.layers > 16 ? undefined : 1},
        margin: {l: 50, r: 10, t: 10, b: narrow() ? 66 : 56},
      },
    };
  }
  const draw = chart(element, build);

  function say(layer, unit) {
    const parts = map.colours.map((c, i) => `${c.name} ${number(values(i, state.segment)[layer * map.units + unit], 2)}`);
    status.textContent = `block ${layer}, unit ${unit}: ${parts.join(', ')}`
      + (place.has(layer * map.units + unit) ? '' : '; this unit cannot be opened, only those with a ring carry their images');
  }

  function choose(layer, unit) {
    state.cursor = [layer, order()[layer].indexOf(unit)];
    const i = place.get(layer * map.units + unit);
    say(layer, unit);
    if (i !== undefined) { state.chosen = i; panel(i); list.show(listed().length, Math.max(0, listed().indexOf(i))); }
    draw();
  }

  element.on('plotly_click', (event) => {
    const point = event.points[0];
    if (point.data.type === 'heatmap') choose(point.y, order()[point.y][point.x]);
    else choose(opened.layer[point.customdata], opened.unit[point.customdata]);
  });
  element.addEventListener('keydown', (event) => {
    const step = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], PageUp: [0, -50], PageDown: [0, 50]}[event.key];
    const [layer, x] = state.cursor;
    if (step) {
      state.cursor = [Math.max(0, Math.min(map.layers - 1, layer + step[0])), Math.max(0, Math.min(map.units - 1, x + step[1]))];
      say(state.cursor[0], order()[state.cursor[0]][state.cursor[1]]);
      Plotly.restyle(element, {x: [[state.cursor[1]]], y: [[state.cursor[0]]]}, [2]);
    } else if (event.key === 'Enter' || event.key === ' ') choose(layer, order()[layer][x]);
    else return;
    event.preventDefault();
  });

  function listed() {
    return opened.kind.flatMap((own, i) => (own === kind.value ? [i] : []));
  }
  const list = pages(byId('units-pager'), 12, (start, stop) => fill(byId('unit-list'), listed().slice(start, stop).map((i) => make('li', {},
    make('button', {type: 'button', 'aria-pressed': String(i === state.chosen), 'data-unit': i, onclick: () => choose(opened.layer[i], opened.unit[i])},
      make('span', {}, `block ${opened.layer[i]}, unit ${opened.unit[i]}`), make('span', {class: 'quiet'}, number(opened.scores.UnitMem[i])))))));

  function panel(i) {
    const box = byId('unit-panel'), kindName = {top: 'among the highest', gap: 'among the highest by gap', random: 'drawn at random'}[opened.kind[i]];
    const chartBox = make('div', {class: 'chart low', role: 'img', 'aria-label': 'Mean response of the unit to every class'});
    fill(box,
      make('h3', {}, `Block ${opened.layer[i]}, unit ${opened.unit[i]}`, make('span', {class: 'tag'}, kindName),
        opened.weakened[i].map((name) => make('span', {class: 'tag yes'}, `weakened by ${name}`))),
      make('dl', {class: 'scores'}, make('div', {}, make('dt', {}, 'positions'), make('dd', {}, map.segments[opened.segment[i]])),
        Object.entries(opened.scores).map(([name, column]) => make('div', {}, make('dt', {}, name), make('dd', {}, number(column[i], 4))))),
      make('h4', {}, 'Images with the largest responses'),
      make('ol', {class: 'strip'}, opened.images[i].map((image, k) => make('li', {}, data.withPictures ? imageBox(image) : null,
        make('strong', {}, String(opened.responses[i][k])), album.names[image]))),
      make('h4', {}, 'Mean response by class'), opened.classes.train ? chartBox
        : make('p', {class: 'missing'}, 'Responses by class were not kept: score with --class-rows keep.'));
    if (opened.classes.train) drawClasses(chartBox, i);
  }

  const unpacked = {};
  function classMeans(split, i) {
    const own = opened.classes[split];
    unpacked[split] = unpacked[split] || bytes(own.means);
    const size = own.labels.length;
    return own.labels.map((label, c) => [label, unpacked[split][i * size + c] / 255 * own.largest[i], own.images[c]]);
  }

  function drawClasses(box, i) {
    const train = classMeans('train', i).sort((a, b) => b[1] - a[1]);
    const rank = new Map(train.map(([label], x) => [label, x]));
    const trace = (rows, name, more) => ({x: rows.map(([label]) => rank.get(label)), y: rows.map((row) => row[1]), name,
      text: rows.map(([label, , images]) => `${forPlotly(album.classes[label])}, ${images} images`), textposition: 'none', hovertemplate: '%{text}: %{y:.4g}<extra></extra>', ...more});
    const traces = [trace(train, 'training', {type: 'bar', marker: {color: colour('train')}})];
    if (opened.classes.heldout) {
      const others = classMeans('heldout', i).filter(([label]) => rank.has(label));
      traces.push(trace(others, 'held-out', {type: 'scatter', mode: 'markers', marker: {color: colour('heldout'), size: 7, symbol: 'diamond'}}));
    }
    const few = train.length <= 24 && !narrow();
    const short = (label) => { const name = album.classes[label]; return forPlotly(name.length > 14 ? `${name.slice(0, 13)}\u2026` : name); };
    Plotly.newPlot(box, traces, layoutOf({showlegend: true, bargap: 0.25,
      xaxis: few ? {tickvals: train.map((_, x) => x), ticktext: train.map(([label]) => short(label)), tickangle: -45, showgrid: false} : {title: `${train.length} classes, strongest first`, showticklabels: false, showgrid: false},
      yaxis: {title: 'mean response', rangemode: 'tozero'}}), {responsive: true, displaylogo: false, displayModeBar: false});
  }
  charts.push(() => { if (state.chosen >= 0) panel(state.chosen); });

  for (const [name, input] of Object.entries(inputs)) {
    input.addEventListener('change', () => { state[name] = name === 'order' ? input.value : Number(input.value); state.cursor = [0, 0]; draw(); });
  }
  rings.addEventListener('change', draw);
  kind.addEventListener('change', () => list.show(listed().length));
  choose(opened.layer[0], opened.unit[0]);
}

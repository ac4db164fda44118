// what came back: counts that follow the threshold, and a card for every target
function startGallery() {
  if (!data.extractions.length) return;
  const input = (name) => byId(`gallery-${name}`);
  const [which, prefix, set, byClass, verdict, order, slider] = ['extraction', 'prefix', 'set', 'class', 'verdict', 'order', 'threshold'].map(input);
  const label = (e, i) => `${e.edit === null ? 'no edit' : `edit ${e.edit}`}${data.extractions.filter((o) => o.edit === e.edit).length > 1 ? ` (${i + 1})` : ''}`;
  options(which, data.extractions.map((e, i) => [i, label(e, i)]), 0);
  const state = {};
  let shown = [];

  const isHeldout = (i) => i >= state.own.heldout;
  const similarity = (i) => state.own.similarity[state.prefix][i];
  const above = (i) => similarity(i) > state.threshold;

  function choose() {
    state.own = data.extractions[Number(which.value)];
    const own = state.own, first = data.extractions[0];
    // an edit is compared with the same target of the unedited model
    state.before = own !== first && first.edit === null && own.embedder === first.embedder ? new Map(first.image.map((image, i) => [image, i])) : null;
    options(prefix, own.prefixes.map((tokens, p) => [p, `${tokens} tokens`]), own.longest);
    const sets = [['train', 'training']].concat(own.heldout < own.image.length ? [['heldout', 'held-out, the control'], ['all', 'both']] : []);
    options(set, sets, 'train');
    const labels = [...new Set(own.image.map((image) => album.labels[image]))].sort((a, b) => a - b);
    options(byClass, [['', 'all classes'], ...labels.map((value) => [value, album.classes[value]])], '');
    options(verdict, [['', 'all'], ['yes', 'extracted'], ['no', 'not extracted'], ...(state.before ? [['stopped', 'stopped by the edit'], ['new', 'new with the edit']] : [])], '');
    slider.min = Math.floor(20 * own.similarity.flat().reduce((least, value) => Math.min(least, value ?? 0), 0)) / 20;
    input('reset').textContent = `back to ${own.threshold}`;
    state.threshold = own.threshold;
    slider.value = own.threshold;
    show();
  }

  function counts() {
    const own = state.own;
    const of = (held) => {
      const all = own.image.flatMap((_, i) => (own.candidate[i] && isHeldout(i) === held ? [i] : []));
      const k = all.filter(above).length;
      return all.length ? [`${count(k)} of ${count(all.length)}`, ` (95 %: ${interval(k, all.length)})`] : null;
    };
    const [train, other] = [of(false), of(true)];
    fill(input('counts'), 'Extracted: ', make('strong', {id: 'gallery-train-count'}, train ? train[0] : '0'), train ? train[1] : '', ' training candidates',
      other ? ['; ', make('strong', {id: 'gallery-heldout-count'}, other[0]), other[1], ' held-out ones'] : '; no held-out images', `, judged by ${own.embedder}.`);
    input('threshold-value').textContent = state.threshold.toFixed(3);
  }

  function passes(i) {
    const own = state.own;
    if (!own.candidate[i] && !isHeldout(i)) return false;
    if (set.value !== 'all' && (set.value === 'heldout') !== isHeldout(i)) return false;
    if (byClass.value !== '' && album.labels[own.image[i]] !== Number(byClass.value)) return false;
    if (verdict.value === 'yes') return above(i);
    if (verdict.value === 'no') return !above(i);
    if (verdict.value) {
      const j = state.before.get(own.image[i]), p = data.extractions[0].prefixes.indexOf(own.prefixes[state.prefix]);
      if (j === undefined || p < 0) return false;
      const earlier = data.extractions[0].similarity[p][j] > state.threshold;
      return earlier !== above(i) && earlier === (verdict.value === 'stopped');
    }
    return true;
  }

  const pager = pages(byId('cards-pager'), 24, (start, stop) => fill(input('cards'), shown.slice(start, stop).map(card)));

  function card(i) {
    const own = state.own, image = own.image[i], p = state.prefix, yes = above(i), longest = p === own.longest;
    const near = own.nearest[p][i];
    const figure = (box, caption, value) => make('figure', {}, box, make('figcaption', {}, make('span', {}, caption), value === undefined ? null : make('span', {class: 'value'}, value)));
    const itself = near === image;
    const numbers = [`similarity ${number(similarity(i))}`, `tokens right ${number(100 * own.match[p][i], 0)} %`];
    if (own.original[p][i] !== null) numbers.push(`to the image itself ${number(own.original[p][i])}`);
    if (near >= 0) numbers.push(itself ? 'nearest image: the target' : `nearest image: ${album.names[near]}`);
    return make('article', {class: yes ? 'yes' : '', 'data-similarity': similarity(i)},
      make('h3', {}, make('span', {}, album.names[image]), make('span', {class: yes ? 'tag yes' : 'tag'}, `${isHeldout(i) ? 'held out, ' : ''}${yes ? 'extracted' : 'not extracted'}`)),
      data.withPictures ? make('div', {class: 'row'},
        figure(imageBox(image), 'target'),
        figure(pictureBox(own.rebuilt[i], `reconstruction of ${album.names[image]}`), 'reconstruction', own.ceiling[i] === null ? undefined : number(own.ceiling[i], 2)),
        figure(longest ? pictureBox(own.made[i], `what the model made of ${album.names[image]}`) : make('span', {class: 'picture none'}, `kept of ${own.prefixes[own.longest]} tokens`), 'generated', number(similarity(i), 2)),
        figure(near >= 0 ? imageBox(near) : make('span', {class: 'picture none'}, 'no index'), near < 0 ? 'nearest' : itself ? 'nearest: target' : 'nearest other', near < 0 ? undefined : number(own.nearest_similarity[p][i], 2))) : null,
      make('p', {class: 'numbers'}, numbers.join(' \u00b7 ')));
  }

  let drawHistogram = null;
  function histogram() {
    const own = state.own;
    const trace = (held, name, tint) => {
      const values = own.image.flatMap((_, i) => (own.candidate[i] && isHeldout(i) === held && similarity(i) !== null ? [similarity(i)] : []));
      return {type: 'histogram', x: values, name, marker: {color: tint}, opacity: 0.65, histnorm: 'percent', xbins: {start: Number(slider.min), end: 1.0001, size: 0.025}, autobinx: false,
        hovertemplate: `%{x}: %{y:.1f} % of ${name}<extra></extra>`};
    };
    const traces = [trace(false, 'training', colour('train')), ...(own.heldout < own.image.length ? [trace(true, 'held-out', colour('heldout'))] : [])];
    return {traces, layout: {barmode: 'overlay', bargap: 0.03, showlegend: true, xaxis: {title: 'similarity with the target', range: [Number(slider.min), 1.01]}, yaxis: {title: '% of candidates'},
      shapes: [{type: 'line', x0: state.threshold, x1: state.threshold, yref: 'paper', y0: 0, y1: 1, line: {color: colour('ink'), width: 2, dash: 'dash'}}]}};
  }

  // filters change what is shown, the threshold changes what is counted, too
  function show() {
    const own = state.own;
    state.prefix = Number(prefix.value);
    counts();
    if (drawHistogram) drawHistogram(); else drawHistogram = chart(byId('similarity-chart'), histogram);
    shown = own.image.flatMap((_, i) => (passes(i) ? [i] : []));
    const keys = {high: (a, b) => similarity(b) - similarity(a), low: (a, b) => similarity(a) - similarity(b), class: (a, b) => album.labels[own.image[a]] - album.labels[own.image[b]] || similarity(b) - similarity(a)};
    shown.sort((a, b) => keys[order.value](a, b) || a - b);
    input('shown').textContent = `${count(shown.length)} shown` + (own.decoded || !data.withPictures ? '' : '; this extraction kept no completions to draw, extract again to see them');
    pager.show(shown.length);
  }

  let waiting = 0;
  slider.addEventListener('input', () => {
    state.threshold = Number(slider.value);
    counts();
    // cards follow when the slider rests for a moment
    clearTimeout(waiting);
    waiting = setTimeout(show, 80);
  });
  input('reset').addEventListener('click', () => { state.threshold = state.own.threshold; slider.value = state.threshold; show(); });
  which.addEventListener('change', choose);
  for (const select of [prefix, set, byClass, verdict, order]) select.addEventListener('change', show);
  choose();
}

// The index of a state as a tree of items, one for each block, and its runs. See prefixes.js, which draws them.

/** index, gone: block -> the one that it follows, or -1. Items: {key, block, gone, parent, children}; key: "7", or "x7" if it is gone. */
function itemsOf(index, gone) {
  const items = new Map();
  for (const block of Object.keys(index)) items.set(block, { key: block, block: Number(block), gone: false, parent: null, children: [] });
  for (const block of gone.keys()) items.set(`x${block}`, { key: `x${block}`, block, gone: true, parent: null, children: [] });
  for (const item of items.values()) {
    const parent = item.gone ? gone.get(item.block) : index[item.block];
    item.parent = (item.gone && items.get(`x${parent}`)) || items.get(String(parent)) || null;
    item.parent?.children.push(item);
  }
  return [...items.values()];
}

/** Runs: {items, level, above: the run that it branches off from}, each after the one above it.
 *  A chain goes on with the first of several children; a node of a tree ends there. */
function runsOf(items, chains) {
  const runs = [], goesOn = ({ children, gone }) => (chains || children.length === 1) && children[0]?.gone === gone ? children[0] : null;
  const stack = items.filter((item) => !item.parent).reverse().map((first) => ({ first, level: 0, above: null }));
  while (stack.length) {
    const { first, level, above } = stack.pop(), run = { items: [], level, above }, branches = [];
    for (let item = first; item; item = goesOn(item)) {
      run.items.push(item);
      branches.push(...item.children.filter((child) => child !== goesOn(item)));
    }
    runs.push(run);
    for (const branch of branches.reverse()) stack.push({ first: branch, level: level + 1, above: run });
  }
  return runs;
}

/** Which blocks the step found, and for whom. */
function findersOf(moment) {
  const finders = new Map();
  for (const [request, , blocks] of foundIn(moment)) {
    for (const block of blocks) finders.set(block, finders.has(block) ? `${finders.get(block)} ${request}` : request);
  }
  return finders;
}

/** For each block, when it came to follow another one, or was forgotten: [{place, parent}], null for forgotten. */
function indexPastOf(trace) {
  const past = new Map();
  trace.lines.forEach(({ patch }, place) => {
    for (const [block, parent] of Object.entries(patch.index ?? {})) {
      if (!past.has(Number(block))) past.set(Number(block), []);
      past.get(Number(block)).push({ place, parent });
    }
  });
  return past;
}

/** The beginning and the end of a text in pieces, of about so many characters, in one line. */
function shortened(pieces, most) {
  const letters = [...readable(pieces.join("").slice(0, 4000)).replace(/\s+/g, " ")];
  const tail = Math.floor(most / 3);
  return letters.length <= most ? letters.join("") : `${letters.slice(0, most - tail).join("")} … ${letters.slice(-tail).join("")}`;
}

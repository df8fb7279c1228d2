// A row of prefixes.js: a run of blocks, the text in them, and who holds them.

const MOST_IN_RUN = 32; // blocks that are shown, besides those that are looked at, found, or new
const RUN_MARKS = { found: "✓", fresh: "+", gone: "×" };

class RunRow {
  constructor(idOf) {
    Object.assign(this, { idOf, key: "", cells: new Map() });
    this.links = make("span", "links");
    this.says = make("bdi", "says small");
    this.who = make("span", "who small");
    this.element = make("div", "run-row", "", this.links, this.says, this.who);
  }

  /** run: see prefix_index.js. textOf: of an item, or undefined. Touches only what looks other than before. */
  update(run, hashes, textOf) {
    const { items, level } = run, after = hashes && level ? `after ${items[0].parent.block}` : "";
    const pieces = textOf ? runPiecesOf(items, textOf) : [];
    const looks = items.map(lookOf);
    const key = [level, after, ...looks, ...pieces].join("\n");
    if (key === this.key) return this.element;
    this.key = key;
    this.element.style.setProperty("--level", Math.min(level, 12));
    this.element.classList.toggle("under", level > 0);
    setText(this.says, shortened(pieces, 84));
    arrange(this.links, [...(after ? [make("span", "after small", after)] : []), ...this.cellsOf(run, looks)]);
    this.who.replaceChildren(...holdersOf(items));
    return this.element;
  }

  /** Of a long run the ends, and in the middle only blocks with which something is. */
  cellsOf({ items, level }, looks) {
    const cells = [], ends = MOST_IN_RUN / 2, before = this.cells;
    let left = 0;
    this.cells = new Map();
    items.forEach((item, i) => {
      const shown = items.length <= MOST_IN_RUN || i < ends || i >= items.length - ends || item.here || item.found || item.fresh;
      if (!shown) left++;
      if (left && shown) cells.push(make("span", "more small", `… ${left} …`));
      if (!shown) return;
      left = 0;
      const look = `${level}|${looks[i]}`, old = before.get(item.key);
      this.cells.set(item.key, old?.look === look ? old : { look, element: this.cell(item, level) });
      cells.push(this.cells.get(item.key).element);
    });
    return cells;
  }

  cell(item, level) {
    const { block, key, names } = item, mark = Object.keys(RUN_MARKS).find((name) => item[name]);
    const several = names.some((name) => requestOf(name) !== requestOf(names[0]));
    const classes = { ...item, held: names.length, shared: names.length > 1, several };
    const has = ["held", "several", "shared", "idle", "gone", "found", "fresh", "here", "picked"].filter((name) => classes[name]);
    const element = make("span", ["link", ...has].join(" "), "", ...(mark ? [make("b", "", RUN_MARKS[mark])] : []), String(block));
    Object.assign(element.dataset, { block, key });
    const told = { id: this.idOf(key), role: "treeitem", "aria-level": level + 1, "aria-selected": item.here };
    element.setAttribute("aria-label", itemInWords(item));
    for (const [name, value] of Object.entries(told)) element.setAttribute(name, value);
    if (names.length) paint(element, names[0]);
    return element;
  }
}

/** Two items that look alike have the same. */
function lookOf({ key, names, found, fresh, here, picked, parent }) {
  return `${key}|${names}|${found}|${fresh}|${here}|${picked}|${parent?.key}`;
}

function itemInWords({ block, gone, names, found, fresh, parent }) {
  const where = parent ? `follows block ${parent.block}` : "at a beginning";
  const who = gone ? "evicted in this step" : names.length ? `held by ${names.join(", ")}` : "idle: nobody holds it";
  return `Block ${block}, ${where}, ${who}${found ? `, found in this step by ${found}` : ""}${fresh ? ", new" : ""}`;
}

/** Whoever holds a block holds the path to it: so who holds the first one are all. */
function holdersOf(items) {
  const [{ names, gone }] = items, idle = items.filter((item) => item.idle).length;
  if (gone) return ["evicted"];
  if (!names.length) return ["idle"];
  const words = [names.length > 6 && `and ${names.length - 6} more`, idle && `${idle} idle`].filter(Boolean).join(", ");
  return [...names.slice(0, 6).map(chip), words];
}

/** The texts of the first and the last blocks. */
function runPiecesOf(items, textOf) {
  return items.length > 8 ? [...items.slice(0, 4).map(textOf), " … ", ...items.slice(-4).map(textOf)] : items.map(textOf);
}

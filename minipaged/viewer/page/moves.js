// Lines from page tables to blocks, and what moved in a step, drawn over a run: they are seen; what happened is said in Events.

const MOST_LINES = 80; // more are only drawn for what was picked or pointed at
const MOST_ARROWS = 16; // of a kind
const MOVING = ["copies", "swap_out", "swap_in", "evicted", "found"];
const SHORT = { duration: 350, easing: "ease-out" };
const ANIMATED = 150; // milliseconds: if steps follow each other faster, nothing is animated

class Moves {
  constructor(view, layer) {
    Object.assign(this, { view, layer, picture: drawn("svg"), asked: 0 });
    layer.append(this.picture);
    const redraw = () => this.ask(false);
    new ResizeObserver(redraw).observe(view.root);
    view.root.addEventListener("scroll", redraw, { capture: true, passive: true });
  }

  update(moment) {
    this.ask(moment !== this.moment);
    this.moment = moment;
  }

  /** Once for a frame: what others drew is measured then, and that takes a layout. */
  ask(isNew) {
    this.isNew ||= isNew;
    this.asked ||= requestAnimationFrame(() => {
      this.asked = 0;
      if (this.moment) this.draw();
      this.isNew = false;
    });
  }

  draw() {
    this.measure();
    Object.assign(this, { shapes: [], labels: [], animations: [] });
    const did = this.moment.did ?? {};
    const most = Math.max(...MOVING.map((kind) => Object.keys(did[kind] ?? {}).length));
    this.picture.classList.toggle("busy", this.view.picked !== "" || most > 0); // lines are fainter
    this.picture.classList.toggle("thin", most > 6); // and so are arrows
    this.lines();
    this.found();
    this.arrows("copies", "copied on write", false, false);
    this.arrows("swap_out", "swapped out", false, true);
    this.arrows("swap_in", "swapped in", true, false);
    this.evicted();
    this.guessed();
    this.picture.replaceChildren(...this.shapes, ...this.labels);
    const now = performance.now(), calm = now - (this.drawnAt ?? 0) > ANIMATED && !matchMedia("(prefers-reduced-motion: reduce)").matches;
    if (this.isNew) this.drawnAt = now;
    if (this.isNew && calm) for (const animate of this.animations) animate();
  }

  // --- where things are ---------------------------------------------------------------------------------------------------

  measure() {
    const { left, top } = this.layer.getBoundingClientRect();
    this.origin = { left, top };
    this.pools = {};
    for (const part of this.view.parts) {
      if (part instanceof Pool && part.list.offsetParent) this.pools[part.swapped] = { part, seen: this.box(part.list) };
    }
    const tables = this.view.find(".tables");
    this.tables = tables?.offsetParent ? this.box(tables) : null;
  }

  box(element) {
    const { left, top, width, height } = element.getBoundingClientRect(), x = left - this.origin.left, y = top - this.origin.top;
    return { x, y, width, height, right: x + width, bottom: y + height, middle: y + height / 2, centre: x + width / 2 };
  }

  /** The cell of a block. null: it is scrolled out of sight, or there is none. */
  cellOf(block, swapped = false) {
    const pool = this.pools[Boolean(swapped)], cell = pool?.part.cells[Math.floor(block / pool.part.each)];
    return cell ? inSight(this.box(cell.element), pool.seen) : null;
  }

  // --- lines ----------------------------------------------------------------------------------------------------------------

  /** From entries to blocks, where the tables stand beside the pool. Below it, on small screens or with two runs, lines would
   *  cross all that is written between: there the entry and the block that are looked at have a frame, and that must do. */
  lines() {
    const pool = this.pools.false?.seen;
    if (!pool || !this.tables || this.tables.x < pool.right) return;
    const tables = this.moment.state.tables, { picked, here } = this.view;
    const all = Object.values(tables).reduce((sum, table) => sum + table.blocks.length, 0) <= MOST_LINES;
    if (!all && !picked && !here) return;
    for (const element of this.view.find(".tables").querySelectorAll(".entry")) {
      const name = element.closest(".table").dataset.sequence, table = tables[name], block = Number(element.dataset.block);
      const isHere = this.view.isHere(block, Boolean(table?.swapped)), isPicked = this.view.isPicked(name);
      const strong = isHere || isPicked;
      if (!table || !(strong || (all && !element.matches(".reserved"))) || (isHere && picked && !isPicked)) continue;
      const entry = inSight(this.box(element), this.tables), cell = entry && this.cellOf(block, table.swapped);
      if (cell) this.line(name, entry, cell, strong);
    }
  }

  /** The strong ones come from the entry itself, along below its row; the others from the row. */
  line(name, entry, cell, strong) {
    const x = cell.right - 2, y = cell.middle, left = this.tables.x, bend = Math.max(24, (left - x) * 0.5);
    const under = entry.bottom + 3, from = strong ? `M${entry.centre} ${entry.bottom} V${under} H${left}` : `M${left} ${entry.middle}`;
    const more = strong ? " strong" : "", row = strong ? under : entry.middle;
    const path = drawn("path", { class: `move line${more}`, d: `${from} C${left - bend} ${row} ${x + bend} ${y} ${x} ${y}` });
    const end = drawn("circle", { class: `move end${more}`, cx: x, cy: y, r: strong ? 4 : 2.5 });
    for (const shape of [path, end]) paint(shape, name);
    this.shapes.push(path, end);
  }

  // --- what moved in the step ------------------------------------------------------------------------------------------------

  arrows(kind, words, from, to) {
    const pairs = this.moment.did?.[kind] ?? [], drawable = [];
    for (const [old, now] of pairs.slice(0, MOST_ARROWS)) {
      const one = this.cellOf(old, from), other = this.cellOf(now, to);
      if (one && other) drawable.push([one, other]);
    }
    for (const [one, other] of drawable) this.arrow(one, other, kind);
    if (drawable.length) this.label(curve(...drawable[0]).top, pairs.length > 1 ? `${pairs.length} ${words}` : words);
  }

  arrow(one, other, kind) {
    const { d, head } = curve(one, other);
    const under = drawn("path", { class: "move under", d });
    const path = drawn("path", { class: `move arrow ${kind}`, d, pathLength: 1 });
    const tip = drawn("path", { class: `move arrow ${kind}`, d: head });
    this.shapes.push(under, path, tip);
    this.animations.push(() => {
      path.animate([{ strokeDasharray: "1", strokeDashoffset: 1 }, { strokeDasharray: "1", strokeDashoffset: 0 }], SHORT);
      tip.animate([{ opacity: 0 }, { opacity: 0, offset: 0.8 }, { opacity: 1 }], 400);
    });
  }

  label({ x, y }, words, more = "") {
    const half = 3.6 * words.length, { x: left, right } = this.pools.false?.seen ?? this.pools.true.seen;
    const middle = Math.max(left + half, Math.min(right - half, x));
    const text = drawn("text", { class: `move label ${more}`, x: middle, y, "text-anchor": "middle" });
    text.textContent = words;
    this.labels.push(text);
  }

  ring(cell, more = "") {
    const place = { x: cell.x - 1, y: cell.y - 1, width: cell.width + 2, height: cell.height + 2 };
    const shape = drawn("rect", { class: `move ring ${more}`, ...place, rx: 6 });
    this.shapes.push(shape);
    this.animations.push(() => shape.animate([{ opacity: 0, transform: "scale(1.6)" }, { opacity: 1, transform: "scale(1)" }], SHORT));
    shape.style.setProperty("transform-box", "fill-box");
    shape.style.setProperty("transform-origin", "center");
  }

  /** Blocks that a prompt found there, and need not be computed. */
  found() {
    for (const [request, tokens, blocks] of foundIn(this.moment)) {
      const cells = blocks.map((block) => this.cellOf(block)).filter(Boolean);
      for (const cell of cells) this.ring(cell);
      if (cells.length) this.label({ x: cells[0].centre, y: cells[0].y - 5 }, `${request} found ${count(tokens, "token")}`);
    }
  }

  /** What they held is gone. */
  evicted() {
    const blocks = this.moment.did?.evicted ?? [], cells = blocks.slice(0, MOST_ARROWS).map((block) => this.cellOf(block)).filter(Boolean);
    const few = cells.length <= 4;
    for (const cell of cells) {
      this.ring(cell, "evicted");
      if (few) this.arrow(point(cell.centre + 4, cell.middle), point(cell.right + 10, cell.y - 12), "evicted");
    }
    const words = blocks.length > 1 ? `${blocks.length} evicted` : "evicted";
    if (cells.length) this.label({ x: cells[0].centre, y: cells[0].y - (few ? 18 : 5) }, words);
  }

  /** At the newest token of each sequence that had guesses: how many were right, and how many slots were taken back. */
  guessed() {
    const { did, state } = this.moment, size = state.usage.block_size;
    for (const [name, [, right, back]] of Object.entries(did?.guessed ?? {}).slice(0, MOST_ARROWS)) {
      const table = state.tables[name], cell = table && !table.swapped && this.cellOf(table.blocks[Math.floor((table.tokens - 1) / size)]);
      if (cell) this.label({ x: cell.centre, y: cell.y - 4 }, `+${right}` + (back ? ` \u2212${back}` : ""));
    }
  }
}

const point = (x, y) => ({ x, y, width: 0, height: 0, right: x, bottom: y, centre: x, middle: y });

function inSight(box, seen) {
  return box.middle >= seen.y && box.middle <= seen.bottom && box.centre >= seen.x && box.centre <= seen.right ? box : null;
}

/** A bow from the middle of one box to the edge of another: {d, head, top: where a label goes}. */
function curve(one, other) {
  const dx = other.centre - one.centre, dy = other.middle - one.middle, far = Math.hypot(dx, dy) || 1, bow = Math.min(60, 12 + far * 0.18);
  const aside = (dx < 0 ? 1 : -1) * bow / far, middle = { x: (one.centre + other.centre) / 2, y: (one.middle + other.middle) / 2 };
  const control = { x: middle.x - dy * aside, y: middle.y + dx * aside };
  const angle = Math.atan2(other.middle - control.y, other.centre - control.x), short = Math.min(other.width, other.height) / 2;
  const end = { x: other.centre - Math.cos(angle) * short, y: other.middle - Math.sin(angle) * short };
  const side = (turn) => `${end.x - 9 * Math.cos(angle + turn)} ${end.y - 9 * Math.sin(angle + turn)}`;
  return {
    d: `M${one.centre} ${one.middle} Q${control.x} ${control.y} ${end.x} ${end.y}`,
    head: `M${side(0.5)} L${end.x} ${end.y} L${side(-0.5)}`,
    top: { x: (one.centre + 2 * control.x + end.x) / 4, y: (one.middle + 2 * control.y + end.y) / 4 - 6 },
  };
}

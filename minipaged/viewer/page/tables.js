// The page tables: a row for each sequence, an entry for each of its blocks, in order. One tab stop; arrow keys move.

const MOST_ENTRIES = 64, FIRST_ENTRIES = 40, LAST_ENTRIES = 16; // of longer tables only the ends are shown

class Tables {
  constructor(view, list) {
    Object.assign(this, { view, list, rows: new Map(), stop: null });
    list.setAttribute("role", "grid");
    list.setAttribute("aria-label", "Page tables: a row for each sequence; arrow keys move");
    pointing(view, list, inSwapped);
    list.addEventListener("keydown", (event) => this.move(event));
    list.addEventListener("focusin", ({ target }) => this.stopAt(target));
    list.addEventListener("click", ({ target }) => {
      const name = target.closest(".chip")?.textContent;
      if (name) view.pick(requestOf(name));
    });
  }

  update(moment) {
    const { state } = moment, names = Object.keys(state.tables).sort(inOrder);
    for (const name of this.rows.keys()) if (!state.tables[name]) this.rows.delete(name);
    names.forEach((name) => this.updateRow(name, state.tables[name], moment));
    const rows = names.map((name) => this.rows.get(name).element);
    if (!rows.length) rows.push(this.nobody ??= make("div", "small", "No sequence has blocks."));
    arrange(this.list, rows);
    if (!this.stop?.isConnected) this.stopAt(this.list.querySelector(".chip"));
  }

  updateRow(name, table, moment) {
    if (!this.rows.has(name)) this.rows.set(name, this.newRow(name));
    const row = this.rows.get(name), swapped = Boolean(table.swapped), held = heldIn(moment, swapped);
    setText(row.count, count(table.tokens, "token") + (swapped ? ", on the CPU" : ""));
    if (row.element.dataset.count !== String(table.blocks.length)) row.element.dataset.count = table.blocks.length;
    row.element.classList.toggle("swapped", swapped);
    row.element.classList.toggle("picked", this.view.isPicked(name));
    const places = placesOf(table.blocks.length), size = moment.state.usage.block_size;
    row.entries.length = Math.min(row.entries.length, places.length);
    places.forEach((place, i) => {
      row.entries[i] ??= { element: make("span"), key: "" };
      if (place < 0) return this.drawGap(row.entries[i], table.blocks.length - FIRST_ENTRIES - LAST_ENTRIES);
      const block = table.blocks[place], filled = Math.max(0, Math.min(size, table.tokens - place * size));
      const holders = held.get(block).names.length, here = this.view.isHere(block, swapped);
      this.drawEntry(row.entries[i], { block, place, filled, size, holders, here });
    });
    this.drawFill(row, table, size);
    arrange(row.blocks, [...row.entries.map((entry) => entry.element), row.fill]);
  }

  drawEntry(entry, { block, place, filled, size, holders, here }) {
    const key = `${block}|${place}|${filled}|${holders}|${here}`;
    if (entry.key === key) return;
    const { element } = entry;
    Object.assign(entry, { key, block });
    const className = `entry${holders > 1 ? " shared" : ""}${filled ? "" : " reserved"}${here ? " here" : ""}`;
    if (element.className !== className) element.className = className;
    setText(element, String(block));
    element.dataset.block = block;
    element.setAttribute("role", "gridcell");
    const shared = holders > 1 ? `, shared by ${holders}` : "";
    element.setAttribute("aria-label", `logical block ${place}: block ${block}${shared}, ${filled} of ${size} slots`);
    if (!element.hasAttribute("tabindex")) element.tabIndex = -1;
    element.style.setProperty("--full", `${100 * filled / size}%`);
  }

  drawGap(entry, number) {
    entry.key = "";
    entry.element = entry.element.className === "gap" ? entry.element : make("span", "gap");
    entry.element.textContent = `\u2026 ${number.toLocaleString("en")} more \u2026`;
  }

  /** How many slots of the last block are filled; or how many blocks are only reserved. */
  drawFill(row, { tokens, blocks }, size) {
    const empty = blocks.length - Math.ceil(tokens / size), rest = tokens % size;
    setText(row.fill, empty > 0 ? `${count(empty, "block")} reserved` : rest ? `${rest}/${size}` : "");
  }

  newRow(name) {
    const element = make("div", "table"), head = chip(name), tokens = make("span", "small"), blocks = make("span", "entries");
    element.dataset.sequence = name;
    paint(element, name);
    element.setAttribute("role", "row");
    head.setAttribute("role", "rowheader");
    head.title = `Request ${requestOf(name)} stands out`;
    head.tabIndex = -1;
    tokens.setAttribute("role", "gridcell");
    blocks.setAttribute("role", "presentation");
    element.append(head, tokens, blocks);
    return { element, count: tokens, blocks, entries: [], fill: make("span", "fill") };
  }

  /** The one place that Tab comes to. */
  stopAt(element) {
    if (!element?.matches(".chip, .entry")) return;
    if (this.stop) this.stop.tabIndex = -1;
    this.stop = element;
    element.tabIndex = 0;
    if (element.matches(":focus-visible") && element.dataset.block) this.view.keep(Number(element.dataset.block), inSwapped(element));
  }

  move(event) {
    if (isForBrowser(event)) return;
    const cellsOf = (row) => [...(row?.querySelectorAll(".chip, .entry") ?? [])];
    const row = event.target.closest(".table"), cells = cellsOf(row), at = cells.indexOf(event.target);
    if (at < 0) return;
    if (event.key === "Enter" || event.key === " ") event.target.click();
    const other = { ArrowUp: row.previousElementSibling, ArrowDown: row.nextElementSibling }[event.key];
    const there = other ? cellsOf(other)[Math.min(at, cellsOf(other).length - 1)]
      : { ArrowLeft: cells[at - 1], ArrowRight: cells[at + 1], Home: cells[0], End: cells.at(-1) }[event.key];
    if (!["ArrowUp", "ArrowDown", "ArrowLeft", "ArrowRight", "Home", "End", "Enter", " "].includes(event.key)) return;
    event.preventDefault();
    event.stopPropagation();
    there?.focus();
  }
}

const inSwapped = (entry) => entry.closest(".table").classList.contains("swapped");

/** Which entries of a table are shown; -1: a gap. */
function placesOf(length) {
  const all = Array.from({ length: Math.min(length, MOST_ENTRIES) }, (_, i) => i);
  if (length <= MOST_ENTRIES) return all;
  return [...all.slice(0, FIRST_ENTRIES), -1, ...Array.from({ length: LAST_ENTRIES }, (_, i) => length - LAST_ENTRIES + i)];
}

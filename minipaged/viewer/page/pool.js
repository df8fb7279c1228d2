// The pool: a cell for each block, in it a slot for each token. The same class draws the pool of the CPU.

const MOST_CELLS = 2048; // of larger pools a cell stands for several blocks
const MOST_UNUSED = 512; // larger pools are only drawn as far as they are ever used
const SIZES = { few: 0, some: 64, many: 300, most: 1200 }; // how large cells are: for more blocks than this

class Pool {
  /** list: the element of the cells. swapped: it is the CPU's. reach: blocks from this one on are known to stay free. */
  constructor(view, list, swapped = false, reach = Infinity) {
    Object.assign(this, { view, list, swapped, reach, cells: [], all: -1, each: 1 });
    this.note = make("p", "small");
    list.after(this.note);
    list.setAttribute("role", "listbox");
    list.tabIndex = 0;
    pointing(view, list, () => swapped);
    list.addEventListener("keydown", (event) => this.move(event));
    new ResizeObserver(() => this.setColumns()).observe(list);
  }

  update(moment) {
    const { usage } = moment.state, all = this.swapped ? usage.cpu_total : usage.num_blocks;
    if (this.all !== all || this.size !== usage.block_size) this.make(all, usage.block_size);
    const facts = this.factsOf(moment), { here } = this.view;
    const at = here && here.swapped === this.swapped ? Math.floor(here.block / this.each) : -1;
    this.list.classList.toggle("picking", this.view.picked !== "");
    this.cells.forEach((cell, i) => {
      const now = this.each === 1 ? this.blockNow(i, facts) : this.blocksNow(i * this.each, facts);
      const key = `${now.key}|${now.names.some((name) => this.view.isPicked(name))}|${i === at}`;
      if (key !== cell.key) this.draw(cell, { ...now, key, here: i === at });
    });
    if (at >= 0) this.list.setAttribute("aria-activedescendant", this.cells[at]?.element.id ?? "");
    else this.list.removeAttribute("aria-activedescendant");
  }

  /** What cells are drawn from: who holds what, and what the step did to which block. */
  factsOf(moment) {
    const { state, did } = moment, loading = this.swapped ? [] : Object.values(did?.loading ?? {}).flat();
    return {
      held: heldIn(moment, this.swapped), written: writtenIn(moment, this.swapped), loading: new Set(loading),
      freed: new Set(this.swapped ? [] : did?.freed), cached: this.swapped ? {} : state.cached ?? {},
    };
  }

  blockNow(block, { held, written, loading, freed, cached }) {
    const { names, places, filled } = held.get(block) ?? NOBODY, kept = names.length === 0 && block in cached;
    const slots = written.get(block), wasFreed = freed.has(block), comes = loading.has(block);
    const mine = names.some(this.view.isMine);
    const key = `${names}|${places}|${filled}|${slots?.from}|${slots?.to}|${kept}|${wasFreed}|${comes}|${mine}`;
    return { block, key, names, places, filled, written: slots, cached: kept, freed: wasFreed, loading: comes, mine };
  }

  /** Several blocks as if they were one: filled as much as all of them are. */
  blocksNow(first, { held, freed, cached }) {
    const blocks = Array.from({ length: Math.min(this.each, this.number - first) }, (_, i) => first + i);
    const inUse = blocks.map((block) => held.get(block)).filter(Boolean);
    const names = [...new Set(inUse.flatMap((one) => one.names))], mostHeld = Math.max(0, ...inUse.map((one) => one.names.length));
    const filled = inUse.reduce((sum, one) => sum + one.filled, 0) / blocks.length;
    const kept = !inUse.length && blocks.some((block) => block in cached), wasFreed = blocks.some((block) => freed.has(block));
    const key = `${names}|${inUse.length}|${mostHeld}|${filled}|${kept}|${wasFreed}`;
    const mine = names.some(this.view.isMine);
    return { block: first, blocks, key, names, places: [], filled, used: inUse.length, mostHeld, cached: kept, freed: wasFreed, mine };
  }

  make(all, size) {
    const number = drawnOf(all, this.reach);
    Object.assign(this, { all, number, size, each: Math.max(1, Math.ceil(number / MOST_CELLS)) });
    const cells = Math.ceil(number / this.each), kind = Object.keys(SIZES).findLast((name) => cells > SIZES[name]) ?? "few";
    this.cells = Array.from({ length: cells }, (_, i) => this.newCell(i * this.each));
    this.list.replaceChildren(...this.cells.map((cell) => cell.element));
    for (const name of Object.keys(SIZES)) this.list.classList.toggle(name, name === kind);
    const rows = this.swapped || kind === "many" || kind === "most" ? 1 : rowsOf(size);
    for (const other of [1, 2, 4]) this.list.classList.toggle(`rows-${other}`, other === rows);
    this.list.classList.toggle("ticked", size / rows <= (kind === "few" ? 16 : 8) && kind !== "most");
    this.list.style.setProperty("--in-row", size / rows);
    this.list.style.setProperty("--rows", rows);
    const notes = this.each > 1 ? [`Each cell stands for ${this.each} blocks: A of request A, a some of them shared, + of several.`] : [];
    if (number < all) notes.push(`Blocks ${grouped(number)} to ${grouped(all - 1)} are free in the whole run, and not drawn.`);
    this.note.textContent = notes.join(" ");
    this.setColumns();
  }

  newCell(block) {
    const element = make("div", "cell"), label = make("b"), holders = make("i"), slots = make("u");
    element.id = `${this.list.id}-${block}`;
    element.dataset.block = block;
    element.setAttribute("role", "option");
    element.append(label, make("em", "", String(block)), holders, slots);
    return { element, label, holders, slots, key: null };
  }

  /** As many as fit in a row; a multiple of four, so that they are easily counted. */
  setColumns() {
    const style = getComputedStyle(this.list), least = parseFloat(style.getPropertyValue("--size")) + parseFloat(style.columnGap);
    const fit = Math.max(4, Math.floor((this.list.clientWidth - 8) / least));
    this.columns = fit - fit % 4;
    this.list.style.setProperty("--columns", this.columns);
  }

  draw(cell, now) {
    Object.assign(cell, now);
    const { element, names, filled, written } = cell, requests = [...new Set(names.map(requestOf))];
    const most = cell.mostHeld ?? names.length, back = written && written.to > filled;
    const classes = {
      held: names.length, half: names.length && filled < this.size, shared: most > 1, several: requests.length > 1,
      reserved: names.length && filled === 0 && !back && !cell.loading, written, back, picked: requests.includes(this.view.picked),
      cached: cell.cached, freed: cell.freed, loading: cell.loading, mine: cell.mine, here: cell.here,
    };
    const hue = names.length === 1 ? names[0] : requests[0] ?? "";
    if (names.length && cell.hue !== hue) paint(element, cell.hue = hue);
    const className = ["cell", ...Object.keys(classes).filter((name) => classes[name])].join(" ");
    if (element.className !== className) element.className = className;
    setText(cell.label, this.labelOf(cell, requests));
    setText(cell.holders, most > 1 ? String(most) : "");
    cell.slots.style.setProperty("--strip", names.length ? strip(this.size, filled, written) : "none");
    element.setAttribute("aria-label", this.inWords(cell));
    element.setAttribute("aria-selected", String(Boolean(cell.here)));
  }

  labelOf({ names, cached, freed, loading, blocks, mostHeld }, requests) {
    if (!names.length) return cached ? ":" : freed ? "\u00d7" : "";
    if (blocks) return requests.length > 1 ? "+" : mostHeld > 1 ? requests[0].toLowerCase() : requests[0];
    const label = names.length === 1 ? names[0] : requests.length > 2 ? "*" : requests.join("");
    return loading ? `\u2193${label}` : label;
  }

  inWords(cell) {
    const { block, names, filled, cached, freed, loading, written, blocks } = cell;
    if (blocks) return this.severalInWords(cell);
    const what = this.swapped ? "CPU block" : "Block";
    const since = cached ? ", but what it holds can still be found" : freed ? ", emptied in this step" : "";
    if (!names.length) return `${what} ${block}: free${since}`;
    const who = names.length === 1 ? `held by ${names[0]}` : `shared by ${names.length}: ${names.join(", ")}`;
    const words = [`${what} ${block}: ${who}${cell.mine ? " (yours)" : ""}`, `${filled} of ${this.size} slots filled`];
    if (loading) words.push("on its way from another engine");
    const { from, to } = written ?? { from: 0, to: 0 }, kept = Math.min(to, filled) - from, back = to - Math.max(filled, from);
    if (kept > 0) words.push(`${kept} of them in this step`);
    if (back > 0) words.push(`${count(back, "slot")} with wrong guesses taken back`);
    return words.join("; ");
  }

  severalInWords({ block, blocks, names, used, filled, cached }) {
    const requests = [...new Set(names.map(requestOf))].sort(inOrder);
    const more = requests.length > 8 ? `, and ${requests.length - 8} more` : "";
    const slots = `${Math.round(filled * blocks.length)} of ${blocks.length * this.size} slots filled`;
    const held = used ? `${used} held by ${requests.slice(0, 8).join(", ")}${more}; ${slots}`
      : `free${cached ? ", but what some hold can still be found" : ""}`;
    return `${this.swapped ? "CPU blocks" : "Blocks"} ${block} to ${blocks.at(-1)}: ${held}`;
  }

  move(event) {
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns, Home: -Infinity, End: Infinity };
    if (!(event.key in moves) || isForBrowser(event)) return;
    event.preventDefault();
    event.stopPropagation();
    const { here } = this.view, from = here?.swapped === this.swapped ? Math.floor(here.block / this.each) + moves[event.key] : 0;
    const cell = this.cells[Math.max(0, Math.min(this.cells.length - 1, from))];
    this.view.keep(cell.block, this.swapped);
    cell.element.scrollIntoView({ block: "nearest" });
  }
}

/** How many of all blocks are drawn: of a large pool that is hardly used, those that are ever used, and some free ones. */
function drawnOf(all, reach) {
  const some = Math.max(24, 8 * Math.ceil(reach / 6));
  return all > MOST_UNUSED && some < all / 2 ? some : all;
}

const NOBODY = { names: [], places: [], filled: 0 };

/** Slots stand in rows, of 16 in two of 8: so they can be counted at a glance. */
function rowsOf(size) {
  return size > 16 && size % 4 === 0 ? 4 : size > 8 && size % 2 === 0 ? 2 : 1;
}

/** All slots in one row, as a gradient: filled, of them those of this step, taken back (one sees what lies under), empty. */
function strip(size, filled, slots) {
  const at = (slot) => `${100 * slot / size}%`, from = slots ? Math.min(slots.from, filled) : filled;
  const to = slots ? Math.min(slots.to, filled) : filled, back = Math.max(filled, slots?.to ?? 0);
  const full = `var(--of) ${at(from)}, var(--fresh) 0 ${at(to)}, var(--of) 0 ${at(filled)}`;
  return `linear-gradient(90deg, ${full}, transparent 0 ${at(back)}, var(--hole) 0)`;
}

/** Who points at a block is told about it; a click keeps it, until the next one. */
function pointing(view, list, isSwapped) {
  const look = (event, keep) => {
    const element = event.target.closest("[data-block]");
    if (!element || (view.kept && !keep)) return;
    const block = Number(element.dataset.block), swapped = isSwapped(element);
    const same = view.isHere(block, swapped);
    if (keep) view.kept = !(view.kept && same);
    if (!same) view.look(block, swapped);
  };
  list.addEventListener("pointerover", (event) => look(event, false));
  list.addEventListener("click", (event) => look(event, true));
  list.addEventListener("pointerleave", () => { if (!view.kept && view.here) view.look(null); });
  list.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !view.here) return;
    view.kept = false;
    view.look(null);
  });
}

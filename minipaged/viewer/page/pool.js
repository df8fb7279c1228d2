// The pool: a cell for each block. The same class draws the pool of the CPU.

const MOST_CELLS = 2048; // of larger pools a cell stands for several blocks

class Pool {
  /** list: the element of the cells. swapped: it is the CPU's. */
  constructor(view, list, swapped = false) {
    Object.assign(this, { view, list, swapped, cells: [] });
    list.setAttribute("role", "listbox");
    list.tabIndex = 0;
    for (const kind of ["pointerover", "click"]) {
      list.addEventListener(kind, (event) => {
        const block = this.blockAt(event);
        if (block >= 0) view.look(block, swapped);
      });
    }
    list.addEventListener("keydown", (event) => this.move(event));
    new ResizeObserver(() => this.setColumns()).observe(list);
  }

  update({ state, did }) {
    const number = this.swapped ? state.usage.cpu_total : state.usage.num_blocks;
    if (this.cells.length !== number) this.make(number);
    const held = holders(state, this.swapped), freed = new Set(this.swapped ? [] : did?.freed);
    this.list.classList.toggle("picking", this.view.picked !== "");
    this.size = state.usage.block_size;
    this.cells.forEach((cell, block) => {
      const { names, places, filled } = held.get(block) ?? { names: [], places: [], filled: 0 };
      const cached = !this.swapped && names.length === 0 && block in (state.cached ?? {});
      const here = this.view.here?.block === block && this.view.here.swapped === this.swapped;
      const key = `${names}|${places}|${filled}|${cached}|${freed.has(block)}|${names.some(this.view.isMine)}|${this.view.picked}|${here}`;
      if (key === cell.key) return;
      Object.assign(cell, { key, names, places, filled, cached, here, freed: freed.has(block) });
      this.drawCell(cell, block);
    });
  }

  make(number) {
    this.cells = Array.from({ length: number }, (_, block) => {
      const element = make("div", "cell");
      element.id = `${this.list.id}-${block}`;
      element.dataset.block = block;
      element.setAttribute("role", "option");
      return { element, key: "" };
    });
    this.list.replaceChildren(...this.cells.map((cell) => cell.element));
    this.list.classList.toggle("many", number > 300);
    this.list.classList.toggle("most", number > 1200);
    this.setColumns();
  }

  /** As many as fit in a row; a multiple of four, so that they are easily counted. */
  setColumns() {
    const style = getComputedStyle(this.list), least = parseFloat(style.getPropertyValue("--size")) + parseFloat(style.columnGap);
    const fit = Math.max(4, Math.floor((this.list.clientWidth - 8) / least));
    this.columns = fit - fit % 4;
    this.list.style.setProperty("--columns", this.columns);
  }

  drawCell(cell, block) {
    const { element, names, filled, cached, here, freed } = cell;
    const requests = [...new Set(names.map(requestOf))];
    const classes = {
      held: names.length, half: filled < this.size, shared: names.length > 1, several: requests.length > 1, cached, freed,
      mine: names.some(this.view.isMine), picked: requests.includes(this.view.picked), here,
    };
    element.className = ["cell", ...Object.keys(classes).filter((name) => classes[name])].join(" ");
    const label = names.length === 1 ? names[0] : requests.length > 2 ? "*" : requests.join("");
    element.replaceChildren(make("b", "", cached ? ":" : label));
    if (names.length > 1) element.append(make("i", "", String(names.length)));
    if (names.length) paint(element, names.length === 1 ? names[0] : requests[0]);
    element.style.setProperty("--full", `${100 * filled / this.size}%`);
    element.setAttribute("aria-label", this.inWords(block));
    if (here) this.list.setAttribute("aria-activedescendant", element.id);
  }

  inWords(block) {
    const { names, filled, cached, freed } = this.cells[block], what = this.swapped ? "CPU block" : "Block";
    if (!names.length) return `${what} ${block}: free${cached ? ", but what it holds can still be found" : freed ? ", since this step" : ""}`;
    const who = names.length === 1 ? `held by ${names[0]}` : `shared by ${names.length}: ${names.join(", ")}`;
    return `${what} ${block}: ${who}${names.some(this.view.isMine) ? " (yours)" : ""}; ${filled} of ${this.size} slots filled`;
  }

  blockAt(event) {
    return this.cells.findIndex((cell) => cell.element === event.target.closest(".cell"));
  }

  move(event) {
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns, Home: -Infinity, End: Infinity };
    if (!(event.key in moves) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    const from = this.view.here?.swapped === this.swapped ? this.view.here.block + moves[event.key] : 0;
    const block = Math.max(0, Math.min(this.cells.length - 1, from));
    this.view.look(block, this.swapped);
    this.cells[block].element.scrollIntoView({ block: "nearest" });
  }
}

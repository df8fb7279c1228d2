// The page tables: a row for each sequence, a cell for each of its blocks, in order.

class Tables {
  constructor(view, list) {
    Object.assign(this, { view, list, rows: new Map() });
  }

  update({ state }) {
    const shared = { false: holders(state), true: holders(state, true) }, size = state.usage.block_size;
    const names = Object.keys(state.tables).sort(inOrder);
    for (const name of this.rows.keys()) if (!state.tables[name]) this.rows.delete(name);
    names.forEach((name) => this.updateRow(name, state.tables[name], shared[Boolean(state.tables[name].swapped)], size));
    const rows = names.map((name) => this.rows.get(name).element);
    const before = [...this.list.children];
    if (before.length !== rows.length || before.some((row, i) => row !== rows[i])) this.list.replaceChildren(...rows);
  }

  updateRow(name, table, held, size) {
    if (!this.rows.has(name)) this.rows.set(name, this.newRow(name));
    const row = this.rows.get(name), marks = table.blocks.map((block) => held.get(block).names.length);
    const key = `${table.tokens}|${table.blocks}|${marks}|${table.swapped}|${this.view.picked}`;
    if (row.key === key) return;
    row.key = key;
    row.count.textContent = count(table.tokens, "token") + (table.swapped ? ", on the CPU" : "");
    row.element.classList.toggle("swapped", Boolean(table.swapped));
    row.element.classList.toggle("picked", this.view.picked === requestOf(name));
    row.blocks.replaceChildren(...table.blocks.map((block, place) => {
      const cell = make("span", marks[place] > 1 ? "entry shared" : "entry", String(block));
      cell.dataset.block = block;
      cell.style.setProperty("--full", `${100 * Math.max(0, Math.min(1, (table.tokens - place * size) / size))}%`);
      return cell;
    }));
  }

  newRow(name) {
    const element = make("li", "table"), tokens = make("span", "small"), blocks = make("span", "entries");
    element.dataset.sequence = name;
    element.append(chip(name), tokens, blocks);
    return { element, count: tokens, blocks, key: "" };
  }
}

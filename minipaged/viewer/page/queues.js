// Who runs, who waits, who is swapped out; and what the last step did, in words.

const MOST_ROWS = 30;

class Queues {
  /** lists: the elements of the lists, and of their counts, by the state of a request. */
  constructor(view, lists) {
    Object.assign(this, { view, lists, rows: new Map() });
  }

  update({ state }) {
    const names = { running: [], waiting: [], swapped: [] };
    for (const name of Object.keys(state.requests).sort(inOrder)) names[state.requests[name].state].push(name);
    for (const name of this.rows.keys()) if (!state.requests[name]) this.rows.delete(name);
    for (const [which, { list, number }] of Object.entries(this.lists)) {
      number.textContent = names[which].length;
      const shown = names[which].slice(0, MOST_ROWS).map((name) => this.rowOf(name, state));
      if (names[which].length > MOST_ROWS) shown.push(make("li", "small", `and ${names[which].length - MOST_ROWS} more`));
      if (!shown.length) shown.push(make("li", "small", "nobody"));
      const before = [...list.children];
      if (before.length !== shown.length || before.some((row, i) => row !== shown[i])) list.replaceChildren(...shown);
    }
  }

  rowOf(name, state) {
    if (!this.rows.has(name)) this.rows.set(name, this.newRow(name));
    const { element, words, button } = this.rows.get(name), request = state.requests[name];
    const tables = Object.entries(state.tables).filter(([sequence]) => requestOf(sequence) === name).map(([, table]) => table);
    const blocks = new Set(tables.flatMap((table) => table.blocks)).size;
    const several = request.sequences > 1 ? ` in ${request.sequences}` : "";
    words.textContent = `${request.prompt} + ${request.output} tokens${several}${blocks ? `, ${count(blocks, "block")}` : ""}`;
    button.setAttribute("aria-pressed", String(this.view.picked === name));
    return element;
  }

  newRow(name) {
    const words = make("span"), button = make("button", "", "", chip(name), words);
    button.type = "button";
    button.title = "Its blocks stand out";
    button.onclick = () => this.view.pick(name);
    const element = make("li", "", "", button);
    element.dataset.request = name;
    return { element, words, button };
  }
}

class Events {
  constructor(view, list) {
    Object.assign(this, { view, list });
  }

  update({ line }) {
    const lines = (line.events ?? []).map((event) => event.replaceAll("->", "\u2192"));
    this.list.replaceChildren(...(lines.length ? lines : ["nothing but tokens computed"]).map((text) => make("li", "", text)));
  }
}

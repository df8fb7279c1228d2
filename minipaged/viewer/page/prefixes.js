// What can be found again: the radix tree, or the chains of hashes, from the index of a state (see prefix_index.js).
// A row is a run of blocks. In a tree it ends where sequences part; a chain goes on there, and the others begin at its block.

const MOST_RUNS = 80; // that are shown

class Prefixes {
  static number = 0; // of them on the page

  constructor(view, element) {
    Object.assign(this, { view, element, rows: new Map(), runs: [], at: "" });
    this.kind = make("span");
    this.told = make("span");
    this.list = make("div", "index");
    this.list.id = `index-${Prefixes.number++}`;
    this.list.tabIndex = 0;
    this.list.setAttribute("role", "tree");
    this.list.setAttribute("aria-label", "Blocks that can be found; arrow keys move");
    this.rest = make("p", "small");
    element.append(make("p", "small", "", this.kind, this.told), this.list, this.rest);
    pointing(view, this.list, () => false);
    this.list.addEventListener("keydown", (event) => this.move(event));
  }

  update(moment) {
    const index = moment.state.index ?? {};
    if (moment !== this.moment && !moment.trace) Object.assign(this, { before: this.now ?? index, now: { ...index } });
    this.moment = moment;
    const gone = this.goneAt(moment), found = findersOf(moment);
    const fresh = this.freshAt(moment, index), held = heldIn(moment);
    this.hashes = moment.header?.settings?.prefix_cache === "hash";
    this.runs = runsOf(itemsOf(index, gone), this.hashes);
    for (const { items } of this.runs) for (const item of items) this.markItem(item, { found, fresh, held });
    this.tell(moment, gone, found, fresh);
    const shown = this.choose();
    this.list.classList.toggle("hashes", this.hashes);
    this.list.classList.toggle("picking", this.view.picked !== "" && shown.some((run) => run.items.some((item) => item.picked)));
    this.list.hidden = !shown.length;
    const before = (block) => moment.trace.textOf(block, moment.place - 1);
    this.draw(shown, moment.textOf && (({ block, gone }) => (gone ? before(block) : moment.textOf(block)) ?? ""));
  }

  /** What the step evicted: block -> what it followed. What came and went between two steps of a thinned trace isn't there. */
  goneAt({ did, trace, place }) {
    if (trace) this.past ??= indexPastOf(trace);
    const followed = (block) => (trace ? lastOf(this.past.get(block), place - 1)?.parent : this.before[block]) ?? null;
    return new Map((did?.evicted ?? []).map((block) => [block, followed(block)]).filter(([, parent]) => parent !== null));
  }

  freshAt({ line }, index) {
    const fresh = Object.entries(line ? line.patch?.index ?? {} : index).filter(([block, parent]) => line || this.before[block] !== parent);
    return new Set(fresh.filter(([, parent]) => parent !== null).map(([block]) => Number(block)));
  }

  markItem(item, { found, fresh, held }) {
    const { block, gone } = item, { view } = this, names = gone ? [] : held.get(block)?.names ?? [];
    Object.assign(item, {
      names, found: gone ? "" : found.get(block) ?? "", fresh: !gone && fresh.has(block), idle: !gone && !names.length,
      here: view.isHere(block), picked: names.some((name) => view.isPicked(name)),
    });
  }

  /** The line above: what it is, how much of it there is, and what the step did to it. */
  tell({ state, header, did }, gone, found, fresh) {
    const kind = header?.settings?.prefix_cache, items = this.runs.flatMap((run) => run.items).filter((item) => !item.gone);
    const why = items.length || gone.size ? "" : whyNothing(state, header);
    const title = why ? "" : { hash: "hash chain", radix: "radix tree" }[kind] ?? "prefix cache";
    if (title && !this.kind.matches(".word")) explain(this.kind, title);
    this.kind.hidden = !title;
    this.kind.textContent = title;
    const idle = items.filter((item) => item.idle).length, finders = [...new Set(found.values())].join(" ");
    const runs = this.runs.filter((run) => !run.items[0].gone).length;
    const idleOnes = idle ? `, ${idle} of them idle (dotted)` : "";
    const parts = [
      `: ${count(items.length, "block")} in ${count(runs, kind === "hash" ? "chain" : "run")}${idleOnes}`,
      found.size && `${RUN_MARKS.found} ${found.size} found by ${finders}`, fresh.size && `${RUN_MARKS.fresh} ${fresh.size} new`,
      did?.evicted?.length && `${RUN_MARKS.gone} ${did.evicted.length} evicted`,
    ];
    setText(this.told, why || parts.filter(Boolean).join(" · "));
  }

  /** The runs that are shown: of too many, first those in which something happens, then those that somebody holds. */
  choose() {
    if (this.runs.length <= MOST_RUNS) return this.leave([]);
    const some = (run, holds) => run.items.some(holds), order = new Map();
    for (const run of [...this.runs].reverse()) { // those that branch off come before the one that they branch off from
      const happens = some(run, (item) => item.here || item.found || item.fresh || item.gone);
      const own = happens ? 0 : some(run, (item) => item.picked) ? 1 : run.items[0].idle ? 3 : 2;
      order.set(run, Math.min(own, order.get(run) ?? 3));
      if (run.above) order.set(run.above, Math.min(order.get(run), order.get(run.above) ?? 3));
    }
    return this.leave([...this.runs].sort((a, b) => order.get(a) - order.get(b)).slice(MOST_RUNS));
  }

  leave(out) {
    const without = new Set(out), blocks = out.reduce((sum, run) => sum + run.items.length, 0);
    const idle = out.every((run) => run.items.every((item) => item.idle)) ? ", all idle" : "";
    this.rest.hidden = !out.length;
    setText(this.rest, out.length ? `and ${count(out.length, "more run")} with ${count(blocks, "block")}${idle}` : "");
    return this.runs.filter((run) => !without.has(run));
  }

  draw(shown, textOf) {
    const rows = shown.map((run) => this.rowOf(run, textOf)), keys = new Set(shown.map((run) => run.items[0].key));
    for (const key of this.rows.keys()) if (!keys.has(key)) this.rows.delete(key);
    arrange(this.list, rows);
    const here = this.current(shown);
    if (here) this.list.setAttribute("aria-activedescendant", this.idOf(here.key));
    else this.list.removeAttribute("aria-activedescendant");
  }

  rowOf(run, textOf) {
    const { key } = run.items[0];
    if (!this.rows.has(key)) this.rows.set(key, new RunRow((item) => this.idOf(item)));
    return this.rows.get(key).update(run, this.hashes, textOf);
  }

  idOf(key) {
    return `${this.list.id}-${key}`;
  }

  /** Where the reader is: of a block that was evicted and holds something else by now, the item that the keys came to. */
  current(shown) {
    const here = shown.flatMap((run) => run.items).filter((item) => item.here);
    return here.find((item) => item.key === this.at) ?? here[0];
  }

  /** Left and right along a path, to what a block follows and what follows it; up and down from row to row. */
  move(event) {
    const shown = this.runs.filter((run) => this.rows.has(run.items[0].key)), item = this.current(shown);
    if (!shown.length || isForBrowser(event)) return;
    const row = shown.findIndex((run) => run.items.includes(item)), { items } = shown[Math.max(0, row)];
    const to = (number) => shown[Math.max(0, Math.min(shown.length - 1, number))].items[0];
    const moves = {
      ArrowLeft: () => item.parent, ArrowRight: () => items[items.indexOf(item) + 1] ?? item.children[0],
      ArrowUp: () => to(row - 1), ArrowDown: () => to(row + 1), Home: () => to(0), End: () => to(Infinity),
    };
    if (!(event.key in moves)) return;
    event.preventDefault();
    event.stopPropagation();
    const there = item ? moves[event.key]() ?? item : items[0];
    this.at = there.key;
    this.view.keep(there.block);
    document.getElementById(this.idOf(there.key))?.scrollIntoView({ block: "nearest" });
  }
}

function whyNothing({ usage }, header) {
  if (header?.settings?.prefix_cache === "none") return "Prefix caching is off (--prefix-cache none): nothing is found again.";
  if (header?.version === 1) return "A trace of version 1 doesn't say what can be found again.";
  if (usage.num_blocks > 4096) return "Of pools of more than 4,096 blocks it isn't recorded what can be found again.";
  return "Nothing can be found yet: a block is known when all its tokens are computed.";
}

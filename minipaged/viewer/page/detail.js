// What is known of the block that the reader points at: who holds it, its tokens, and how one gets from a token to it.

const MOST_HOLDERS = 8; // that are named

class Detail {
  constructor(view, element) {
    Object.assign(this, { view, element });
  }

  update(moment) {
    const there = this.view.here ?? this.newest(moment), key = `${there?.block} ${there?.swapped} ${this.view.picked}`;
    if (this.moment === moment && this.key === key) return;
    Object.assign(this, { moment, key });
    const lines = there ? this.lines(moment, there) : [], other = there ? "another" : "a";
    if (!this.view.here) lines.push(make("p", "small", `Point at ${other} block, or move with the arrow keys. A click keeps it here.`));
    this.element.replaceChildren(...lines);
  }

  /** Where nobody points: the block that was written last, by the request that was picked, or by the first. */
  newest({ state, did }) {
    const isThere = (name) => state.tables[name]?.tokens && !state.tables[name].swapped;
    const names = Object.keys(did?.computed ?? state.tables).filter(isThere).sort(inOrder);
    const table = state.tables[names.find((name) => this.view.isPicked(name)) ?? names[0]];
    return table ? { block: table.blocks[Math.floor((table.tokens - 1) / state.usage.block_size)], swapped: false } : null;
  }

  lines(moment, { block, swapped }) {
    const held = heldIn(moment, swapped).get(block), lines = [this.headline(moment, block, swapped)];
    if (held) {
      lines.push(this.slots(moment, held, writtenIn(moment, swapped).get(block)), this.way(moment, block, swapped, held));
    } else if (moment.textOf?.(block) && !swapped && block in (moment.state.cached ?? {})) {
      lines.push(make("p", "quoted", readable(moment.textOf(block))));
    }
    const index = swapped ? undefined : moment.state.index?.[block];
    const as = index < 0 ? "the beginning of a prompt" : `what follows block ${index}`;
    if (index !== undefined) lines.push(make("p", "small", `In the prefix cache, as ${as}.`));
    return lines;
  }

  /** As the pool says it; and what that means, where a word isn't enough. */
  headline(moment, block, swapped) {
    const pool = this.view.parts.find((part) => part instanceof Pool && part.swapped === swapped);
    const now = pool.blockNow(block, pool.factsOf(moment)), words = pool.inWords(now), end = words.indexOf(":") + 1;
    const line = make("p", "", "", make("b", "", words.slice(0, end)), words.slice(end));
    if (!now.names.length && now.freed) line.append("; where the engine runs with --debug, it is poisoned");
    if (now.names.length && !now.filled) line.append("; reserved");
    return line;
  }

  /** A box for each slot; in it the token, if the texts are known. Who holds it together has the same tokens in it. */
  slots(moment, { names, places, filled }, written) {
    const size = moment.state.usage.block_size, words = moment.wordsOf?.(names[0])?.slice(places[0] * size) ?? [];
    const list = make("ol", "slots-told");
    paint(list, names[0]);
    for (let slot = 0; slot < Math.min(size, 64); slot++) {
      const isNew = written && slot >= written.from && slot < written.to, wrong = isNew && slot >= filled;
      const [kind, means] = wrong ? ["wrong", "a wrong guess, taken back"] : slot >= filled ? ["empty", "empty"]
        : isNew ? ["filled fresh", "computed in this step"] : ["filled", "filled"];
      const box = make("li", kind, slot < filled ? visible(words[slot]) : "");
      box.title = `slot ${slot}: ${means}`;
      list.append(box);
    }
    return list;
  }

  /** Whose block it is, as which of theirs; and of its newest token, for one of them, the split of an address. */
  way({ state }, block, swapped, { names, places, filled }) {
    const size = state.usage.block_size, i = Math.max(0, names.findIndex((name) => this.view.isPicked(name)));
    const shown = names.slice(0, MOST_HOLDERS).map((name, at) => make("span", "holder", "", chip(name), `'s block ${places[at]}`));
    if (names.length > MOST_HOLDERS) shown.push(`and ${names.length - MOST_HOLDERS} more`);
    const line = make("p", "way small", "", ...shown);
    if (!filled) return line;
    const offset = filled - 1, steps = [
      `position ${places[i] * size + offset}`, `logical block ${places[i]}, offset ${offset}`,
      `${swapped ? "CPU" : "physical"} block ${block}`, `slot ${block * size + offset}`,
    ];
    line.append(...steps.flatMap((step, at) => [at ? " \u2192 " : "", make("span", "nowrap", step)]));
    line.title = `logical block = position / ${size}, offset = position % ${size}; slot = physical block * ${size} + offset`;
    return line;
  }
}

/** A token in a box. */
function visible(word) {
  return word === undefined ? "" : readable(word).replace(/^ /, "\u00b7") || "\u2205";
}

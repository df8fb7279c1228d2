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
    this.element.replaceChildren(...(there ? this.lines(moment, there) : []), ...(this.view.here ? [] : [make("p", "small", HINT)]));
  }

  /** Where nobody points: the block that was written last, by the request that was picked, or by the first. */
  newest({ state, did }) {
    const names = Object.keys(did?.computed ?? state.tables).filter((name) => state.tables[name]?.tokens && !state.tables[name].swapped).sort(inOrder);
    const table = state.tables[names.find((name) => requestOf(name) === this.view.picked) ?? names[0]];
    return table ? { block: table.blocks[Math.floor((table.tokens - 1) / state.usage.block_size)], swapped: false } : null;
  }

  lines(moment, { block, swapped }) {
    const held = heldIn(moment, swapped).get(block), lines = [this.headline(moment, block, swapped, held)];
    if (held) {
      lines.push(this.slots(moment, held, writtenIn(moment, swapped).get(block)), this.way(moment, block, swapped, held));
    } else if (moment.textOf?.(block) && !swapped && block in (moment.state.cached ?? {})) {
      lines.push(make("p", "quoted", moment.textOf(block)));
    }
    const index = swapped ? undefined : moment.state.index?.[block];
    if (index !== undefined) lines.push(make("p", "small", index < 0 ? "In the prefix cache, as the beginning of a prompt." : `In the prefix cache, as what follows block ${index}.`));
    return lines;
  }

  headline({ state, did }, block, swapped, held) {
    const line = make("p", "row-of", "", make("b", "", `${swapped ? "CPU block" : "Block"} ${block}`)), size = state.usage.block_size;
    if (!held) {
      const cached = !swapped && block in (state.cached ?? {}), freed = !swapped && did?.freed?.includes(block);
      line.append(cached ? "free; what it holds can still be found" : freed ? "free; emptied since the last step (poisoned, where the engine runs with --debug)" : "free");
      return line;
    }
    held.names.slice(0, MOST_HOLDERS).forEach((name, i) => line.append(make("span", "holder", "", chip(name), `'s block ${held.places[i]}`)));
    if (held.names.length > MOST_HOLDERS) line.append(`and ${held.names.length - MOST_HOLDERS} more`);
    line.append(make("span", "", held.filled ? `${held.filled} of ${size} slots filled` : `reserved: none of its ${size} slots is filled`));
    return line;
  }

  /** A box for each slot; in it the token, if the texts are known. Who holds it together has the same tokens in it. */
  slots(moment, { names, places, filled }, written) {
    const size = moment.state.usage.block_size, words = moment.wordsOf?.(names[0])?.slice(places[0] * size) ?? [];
    const list = make("ol", "slots-told");
    paint(list, names[0]);
    for (let slot = 0; slot < Math.min(size, 64); slot++) {
      const isNew = written && slot >= written.from && slot < written.to, wrong = isNew && slot >= filled;
      const box = make("li", wrong ? "wrong" : slot >= filled ? "empty" : isNew ? "filled fresh" : "filled", slot < filled ? visible(words[slot]) : "");
      box.title = `slot ${slot}: ${wrong ? "a wrong guess, taken back" : slot >= filled ? "empty" : isNew ? "computed in this step" : "filled"}`;
      list.append(box);
    }
    return list;
  }

  /** Of the newest token in it, for the sequence that was picked, or the first: the split of an address. */
  way({ state }, block, swapped, { names, places, filled }) {
    const size = state.usage.block_size, i = Math.max(0, names.findIndex((name) => requestOf(name) === this.view.picked));
    const line = make("p", "way small");
    if (!filled) return line;
    const position = places[i] * size + filled - 1, offset = filled - 1;
    const steps = [`position ${position}`, `logical block ${places[i]}, offset ${offset}`, `${swapped ? "CPU" : "physical"} block ${block}`, `slot ${block * size + offset}`];
    line.append(chip(names[i]), ...steps.flatMap((step, place) => [place ? " \u2192 " : " ", make("span", "nowrap", step)]));
    line.title = `logical block = position / ${size}, offset = position % ${size}; the page table has the physical block; slot = block * ${size} + offset`;
    return line;
  }
}

const HINT = "Point at another block, or move with the arrow keys. A click keeps it here.";

function visible(word) {
  return word === undefined ? "" : word.replaceAll("\n", "\u21b5").replace(/^ /, "\u00b7") || "\u2205";
}

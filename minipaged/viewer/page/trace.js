// A trace: its steps, the state after each, and the texts of its sequences at any of them.

const KEYFRAME = 50; // steps between two states that are kept whole

class Trace {
  /** run: {title, header, every, lines}, as page.py made it. */
  constructor(run) {
    Object.assign(this, run);
    this.length = this.lines.length;
    this.keyframes = [];
    this.at = -1;
    this.state = copied({});
    this.requests = new Map(); // by name: {id, place: where it came}
    this.reach = { false: 0, true: 0 }; // of the pool, and (true) of the CPU's: all blocks that are ever used are below this
    this.readWords();
    for (let place = 0; place < this.length; place++) {
      this.state = merge(this.state, this.lines[place].patch);
      this.reachOut(this.lines[place]);
      for (const name of Object.keys({ ...this.lines[place].patch.requests, ...this.lines[place].arrived })) {
        if (!this.requests.has(name)) this.requests.set(name, { id: this.state.requests[name]?.id ?? "", place });
      }
      if (place % KEYFRAME === 0) this.keyframes.push(copied(this.state));
    }
    this.at = this.length - 1;
  }

  /** What a line says of blocks, to know how far the pools are ever used. */
  reachOut({ patch, did = {} }) {
    const reachTo = (blocks, swapped = false) => {
      for (const block of blocks) if (block >= this.reach[swapped]) this.reach[swapped] = Number(block) + 1;
    };
    for (const name of Object.keys(patch.tables ?? {})) {
      const table = this.state.tables[name];
      if (table) reachTo(table.blocks, Boolean(table.swapped));
    }
    reachTo(Object.keys(patch.cached ?? {}));
    for (const kind of ["copies", "freed", "evicted"]) reachTo((did[kind] ?? []).flat());
    const out = did.swap_out ?? [], back = did.swap_in ?? [];
    reachTo([...out.map(([old]) => old), ...back.map(([, now]) => now)]);
    reachTo([...out.map(([, now]) => now), ...back.map(([old]) => old)], true);
    reachTo(Object.values(did.loading ?? {}).flat());
  }

  /** The moment after the step at this place (0 is the first): {line, state, place, ...}. The state isn't to be changed. */
  moment(place) {
    if (place < this.at || place > this.at + KEYFRAME) {
      const keyframe = Math.floor(place / KEYFRAME);
      this.state = copied(this.keyframes[keyframe]);
      this.at = keyframe * KEYFRAME;
    }
    while (this.at < place) this.state = merge(this.state, this.lines[++this.at].patch);
    const line = this.lines[place];
    return { trace: this, place, line, step: line.step, time: this.timeOf(place), state: this.state, did: line.did ?? {},
      header: this.header, wordsOf: (name) => this.wordsOf(name, place), textOf: (block) => this.textOf(block, place) };
  }

  /** Seconds from the beginning to the end of a step; without times, a step is a second. */
  timeOf(place) {
    return place < 0 ? 0 : this.lines[place].time ?? this.lines[place].step;
  }

  /** The place of a step, or of the last one before it. */
  placeOf(step) {
    return this.lastBefore((place) => this.lines[place].step <= step);
  }

  placeAtTime(seconds) {
    return this.lastBefore((place) => this.timeOf(place) <= seconds);
  }

  lastBefore(holds) {
    let low = 0, high = this.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (holds(middle)) low = middle;
      else high = middle - 1;
    }
    return low;
  }

  /** A version of a text is: so many tokens of the version before, and some more. */
  readWords() {
    this.texts = new Map(); // of blocks: [{place, text}], by block
    this.words = new Map(); // of sequences: [{place, version}], by name
    const now = new Map();
    this.lines.forEach((line, place) => {
      const versionOf = ([name, { from, keep, add }]) => [name, { before: now.get(from ?? name), keep, add }];
      for (const [name, version] of Object.entries(line.words ?? {}).map(versionOf)) {
        now.set(name, version);
        if (!this.words.has(name)) this.words.set(name, []);
        this.words.get(name).push({ place, version });
      }
      for (const [block, text] of Object.entries(line.texts ?? {})) {
        if (!this.texts.has(block)) this.texts.set(block, []);
        this.texts.get(block).push({ place, text });
      }
    });
  }

  /** The tokens of a sequence at a step, as texts; of one that has ended, its last. null: not known. */
  wordsOf(name, place) {
    let version = lastOf(this.words.get(name), place)?.version;
    if (!version) return null;
    const parts = [];
    let keep = Infinity;
    for (; version && keep > 0; version = version.before) {
      if (keep > version.keep) parts.push(version.add.slice(0, keep - version.keep));
      keep = Math.min(keep, version.keep);
    }
    return parts.reverse().flat();
  }

  /** What stands in a block that can be found. null: not known. */
  textOf(block, place) {
    return lastOf(this.texts.get(String(block)), place)?.text ?? null;
  }
}

function lastOf(entries, place) {
  return entries?.findLast((entry) => entry.place <= place);
}

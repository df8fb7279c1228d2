// What a whole run was, gathered once: when its steps were, numbers of each, and what each request did when.

/** A trace's past; of the same trace always the same. */
const pastOf = (trace) => (trace.past ??= new Past(trace));

const NUMBERS = { // name -> its value in a state; of the pool, in blocks, where nothing else is said
  used: ({ usage }) => usage.used,
  shared: ({ usage }) => usage.shared,
  cached: ({ usage }) => usage.cached ?? 0,
  swapped: ({ usage }) => usage.cpu_used, // blocks of the CPU's pool
  waste: ({ usage }) => wasteOf(usage), // percent
  tokens: ({ step }) => step.tokens, // computed in the step
  drawn: (state) => state.num_drawn, // tokens, since the beginning
  found: ({ prefixes }) => prefixes?.found, // tokens, since the beginning
  asked: ({ prefixes }) => prefixes?.queried,
};
const STATES = ["running", "waiting", "swapped"]; // of requests: so many are in each, as series "in running", ...

class Past {
  /** series: by name, a number for each step (NaN: not known). lanes: of requests, by name, in the order of their arrival. */
  constructor(trace) {
    this.trace = trace;
    this.length = trace.length;
    this.hasTimes = trace.lines[0].time !== undefined;
    this.knowsTokens = trace.lines.some((line) => line.did?.computed);
    this.setTimes(trace);
    this.lanes = new Map();
    this.live = new Map(); // of the lanes, those of requests that have not ended
    const names = [...Object.keys(NUMBERS), ...STATES.map((which) => `in ${which}`)];
    this.series = Object.fromEntries(names.map((name) => [name, new Float64Array(this.length).fill(NaN)]));
    const state = {};
    trace.lines.forEach((line, place) => {
      for (const part of ["step", "usage", "prefixes", "num_drawn"]) if (part in line.patch) merge(state, { [part]: line.patch[part] });
      for (const name in NUMBERS) this.series[name][place] = NUMBERS[name](state) ?? NaN;
      this.follow(line, place);
    });
    this.lanes = new Map([...this.lanes].sort(([a], [b]) => inOrder(a, b)));
    const last = (name) => this.series[name][this.length - 1];
    this.hasSwapped = this.series.swapped.some((number) => number > 0);
    this.hasFound = last("asked") > 0 && trace.header.settings?.prefix_cache !== "none";
  }

  /** begin, end: of each step, in seconds. gaps: the places before which the engine rested for as long as can be seen. */
  setTimes(trace) {
    this.begin = new Float64Array(this.length);
    this.end = new Float64Array(this.length);
    for (let place = 0, before = 0; place < this.length; before = this.end[place++]) {
      this.end[place] = Math.max(before, trace.timeOf(place));
      this.begin[place] = Math.max(before, this.end[place] - (trace.lines[place].seconds ?? Infinity));
    }
    const least = this.end[this.length - 1] / 200;
    this.gaps = this.hasTimes ? [...this.begin.keys()].filter((place) => place && this.begin[place] - this.end[place - 1] > least) : [];
  }

  follow(line, place) {
    const did = line.did ?? {}, changed = line.patch.requests ?? {}, computed = this.computedBy(did);
    for (const name of [...Object.keys({ ...line.arrived, ...changed }), ...computed.keys()]) this.laneOf(name, place, line);
    this.change(changed, did, place);
    for (const name in did.found) this.mark(name, place, "found", `prefix hit: ${count(did.found[name], "token")} found`);
    for (const name in did.errors) this.mark(requestOf(name), place, "error", `${name}: ${did.errors[name]}`);
    for (const name in did.guessed) this.draft(this.lanes.get(requestOf(name)), place, did.guessed[name]);
    const numbers = { running: 0, waiting: 0, swapped: 0 };
    for (const [name, lane] of this.live) {
      this.grow(lane, place, computed.get(name));
      if (lane.state) numbers[lane.state]++;
      else this.finish(lane, place, did.finished?.[name]);
    }
    for (const which of STATES) this.series[`in ${which}`][place] = numbers[which];
  }

  /** The first and the last of the lanes whose requests are there at a step. -1: none. */
  liveAt(place) {
    const there = [...this.lanes.values()].map((lane) => lane.place <= place && place < lane.spans.at(-1).to);
    return { first: there.indexOf(true), last: there.lastIndexOf(true) };
  }

  /** What the sequences of each request computed together, accepted drafts too: from which position to which, how many. */
  computedBy(did) {
    const all = new Map();
    for (const [sequence, [start, own]] of Object.entries(did.computed ?? {})) {
      const name = requestOf(sequence), one = all.get(name), tokens = own + (did.guessed?.[sequence]?.[1] ?? 0), end = start + tokens;
      if (name === "?") continue; // of no request that is known
      if (!one) all.set(name, { start, end, tokens });
      else Object.assign(one, { start: Math.min(one.start, start), end: Math.max(one.end, end), tokens: one.tokens + tokens });
    }
    return all;
  }

  laneOf(name, place, line) {
    if (this.lanes.has(name)) return;
    const since = Math.max(0, line.arrived?.[name] ?? this.begin[place]); // who was there before the trace began waits from 0 on
    const lane = { name, id: "", prompt: 0, output: 0, state: null, place, spans: [{ kind: "W", from: place, to: place, since, tokens: 0 }],
      marks: [], accepted: [], guessed: 0, right: 0, high: 0, redo: 0, reason: null };
    this.lanes.set(name, lane);
    this.live.set(name, lane);
  }

  /** States of requests change; null: it is gone. */
  change(changed, did, place) {
    const preempted = { ...did.preempted }, resumed = new Set(did.resumed);
    for (const name in changed) {
      const lane = this.lanes.get(name), news = changed[name], before = lane.state, now = news === null ? null : news.state ?? before;
      lane.state = now;
      for (const part of ["id", "prompt", "output"]) lane[part] = news?.[part] ?? lane[part];
      if (before === "running" && now === "waiting") lane.redo = lane.high; // also after a step that failed
      if (this.knowsTokens || before === now) continue;
      if (before === "running" && now) preempted[name] = now === "swapped" ? "swap" : "recompute"; // version 1 doesn't say it
      if (before === "swapped" && now === "running") resumed.add(name);
    }
    for (const name in preempted) {
      const how = preempted[name] === "swap" ? "swap" : "recompute", lane = this.lanes.get(name);
      this.mark(name, place, how);
      if (lane && how === "recompute") lane.redo = lane.high;
    }
    for (const name of resumed) this.mark(name, place, "resumed");
  }

  mark(name, place, kind, words = "") {
    this.lanes.get(name)?.marks.push({ kind, place, words });
  }

  draft(lane, place, [guessed, right]) {
    if (!lane) return;
    lane.guessed += guessed;
    lane.right += right;
    if (right) lane.accepted.push({ place, guessed, right });
  }

  /** What a request did in a step. Chunks stay apart; all else is one span with what it was in the step before. */
  grow(lane, place, computed) {
    const last = lane.spans.at(-1);
    if (!computed && !lane.state && last.kind !== "X") return; // aborted before the step
    const kind = this.kindOf(lane, computed);
    if (computed) lane.high = Math.max(lane.high, computed.end);
    const tokens = computed?.tokens ?? 0, chunk = kind === "P" || kind === "R";
    if (last.kind === kind && !chunk) Object.assign(last, { to: place + 1, tokens: last.tokens + tokens });
    else lane.spans.push({ kind, from: place, to: place + 1, start: computed?.start, tokens });
  }

  /** Rule 1: a step gives a request some tokens, and the phases are in the eye of who looks. */
  kindOf(lane, computed) {
    if (computed) return computed.start < lane.redo ? "R" : computed.start < lane.prompt ? "P" : "D";
    if (lane.state === "running" || !lane.state) return this.knowsTokens ? "I" : "X";
    return lane.state === "swapped" ? "S" : "W";
  }

  finish(lane, place, reason) {
    lane.reason = reason ?? "";
    lane.told = reason !== undefined; // how it ended
    this.live.delete(lane.name);
    this.mark(lane.name, place, "end", lane.reason);
  }
}

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
    this.blocks = blocksOf(state);
    for (const [which, { list, number }] of Object.entries(this.lists)) {
      setText(number, String(names[which].length));
      const shown = names[which].slice(0, MOST_ROWS).map((name) => this.rowOf(name, state));
      if (names[which].length > MOST_ROWS) shown.push(make("li", "small", `and ${names[which].length - MOST_ROWS} more`));
      if (!shown.length) shown.push(make("li", "small", "nobody"));
      arrange(list, shown);
    }
  }

  rowOf(name, state) {
    if (!this.rows.has(name)) this.rows.set(name, this.newRow(name));
    const { element, words, button, far } = this.rows.get(name), request = state.requests[name];
    const several = request.sequences > 1 ? ` in ${request.sequences}` : "", blocks = this.blocks.get(name)?.size;
    const tokens = request.prompt ? [`${request.prompt} + ${request.output} tokens${several}`] : []; // version 1 doesn't know
    const text = [...tokens, ...(blocks ? [count(blocks, "block")] : [])].join(", ");
    setText(words, text);
    const full = request.most ? `${Math.min(100, 100 * request.output / request.most / Math.max(1, request.sequences)).toFixed(1)}%` : "0%";
    if (far.full !== full) far.style.setProperty("--full", far.full = full);
    const picked = String(this.view.picked === name);
    if (button.getAttribute("aria-pressed") !== picked) button.setAttribute("aria-pressed", picked);
    return element;
  }

  newRow(name) {
    const words = make("span"), far = make("span", "far"), button = make("button", "", "", chip(name), words, far);
    if (this.view.isMine(name)) {
      button.firstChild.classList.add("mine");
      far.before(make("span", "small", "you"));
    }
    button.type = "button";
    button.title = "Its blocks stand out";
    button.onclick = () => this.view.pick(name);
    const element = make("li", "", "", button);
    element.dataset.request = name;
    return { element, words, button, far };
  }
}

/** The blocks of each request, by name. Of a very large pool a server says only how many. */
function blocksOf(state) {
  const blocks = new Map();
  for (const [sequence, table] of Object.entries(state.tables)) {
    const name = requestOf(sequence);
    if (!blocks.has(name)) blocks.set(name, table.blocks ? new Set() : { size: 0 });
    if (!table.blocks) blocks.get(name).size += table.num_blocks;
    else for (const block of table.blocks) blocks.get(name).add(block);
  }
  return blocks;
}

const EVENT_KINDS = [ // words of an event -> its kind, in words of the glossary
  ["swapped out", "swapped out"], ["swapped in", "swapped in"], ["dropped", "recompute"], ["admitted", "admitted"],
  ["copied on write", "copied on write"], ["finished", "finished"], ["guessed", "drafts"],
];

/** The sentences of a trace, or of a server's state. */
const toldIn = ({ line, state }) => line?.events ?? state.events ?? [];

/** All that a step did, for a voice. */
function aloud(moment) {
  const moved = (text) => text.replace(/(\d+)->(\d+)( (?=\d))?/g, (_, from, to, more) => `${from} to ${to}${more ? ", " : ""}`);
  return [...toldIn(moment).map(moved), ...unsaid(moment.did ?? {}).map(([kind, text]) => `${kind}: ${text}`)];
}

/** The trace's sentences, with a kind before each; and what only `did` knows. */
class Events {
  constructor(view, list) {
    Object.assign(this, { view, list, badges: new Map() });
  }

  update(moment) {
    if (moment === this.moment) return;
    this.used = new Map();
    this.moment = moment;
    const lines = toldIn(moment).map((text) => this.line(EVENT_KINDS.find(([word]) => text.includes(word))?.[1] ?? "", text));
    lines.push(...unsaid(moment.did ?? {}).map(([kind, text]) => this.line(kind, text)));
    if (!lines.length) lines.push(this.line("", "nothing"));
    this.list.replaceChildren(...lines);
  }

  line(kind, text) {
    const element = make("li");
    element.append(kind ? this.badge(kind) : make("span"));
    const words = make("span");
    for (const part of text.replaceAll("->", "\u2192").split(/\b([A-Z]+\d*)\b/)) words.append(/^[A-Z]+\d*$/.test(part) ? chip(part) : part);
    element.append(words);
    return element;
  }

  /** The same elements again in the next step: somebody may be reading what the word means. */
  badge(kind) {
    const key = `${kind} ${this.used.get(kind) ?? 0}`;
    this.used.set(kind, (this.used.get(kind) ?? 0) + 1);
    if (!this.badges.has(key)) {
      this.badges.set(key, make("span", `kind ${kind.replaceAll(" ", "-")}`, kind));
      explain(this.badges.get(key), kind);
    }
    return this.badges.get(key);
  }
}

/** What a step did that its sentences do not say: [kind, text]. */
function unsaid({ evicted, loading, errors, freed, computed }) {
  const some = (blocks) => `${count(blocks.length, "block")}: ${blocks.slice(0, 20).join(" ")}${blocks.length > 20 ? " ..." : ""}`;
  return [
    ...(evicted ? [["evicted", `can't be found any more, ${some(evicted)}`]] : []),
    ...Object.entries(loading ?? {}).map(([name, blocks]) => ["loading", `${name} waits for ${some(blocks)}`]),
    ...Object.entries(errors ?? {}).map(([name, words]) => ["error", `${name}: ${words}`]),
    ...(freed ? [["freed", `emptied, ${some(freed)}`]] : []),
    ...(computed ? [["computed", tokensOf(computed)]] : []),
  ];
}

/** Who got how many tokens; those that got as many stand together. */
function tokensOf(computed) {
  const groups = new Map();
  for (const name of Object.keys(computed).sort(inOrder)) {
    const [start, own, guessed] = computed[name];
    const what = `${count(own, "token")}${guessed ? ` and ${guessed} guessed` : ""}${own > 1 ? `, from position ${start}` : ""}`;
    groups.set(what, [...(groups.get(what) ?? []), name]);
  }
  const some = (names) => names.slice(0, 24).join(" ") + (names.length > 24 ? ` and ${names.length - 24} more` : "");
  return [...groups].slice(0, 12).map(([what, names]) => `${some(names)} ${what}${names.length > 1 ? " each" : ""}`).join("; ");
}

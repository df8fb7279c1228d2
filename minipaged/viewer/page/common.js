// What all parts of the page use: elements, names and colours, patches, and who holds which block.
// What comes from a trace or a server is only ever set as text.

const $ = (id) => document.getElementById(id);

function make(tag, className = "", text = "", ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== "") element.textContent = text;
  element.append(...children);
  return element;
}

/** The text of an element, touched only if it is another one. */
function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Keys with these are the browser's, and not the page's. */
const isForBrowser = (event) => event.ctrlKey || event.altKey || event.metaKey;

/** An element of SVG. */
function drawn(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Children in this order; what is there already stays as it is. */
function arrange(element, children) {
  const before = element.childNodes, wanted = new Set(children);
  if (before.length === children.length && children.every((child, i) => child === before[i])) return;
  for (const child of [...before]) if (!wanted.has(child)) child.remove();
  children.forEach((child, i) => { if (before[i] !== child) element.insertBefore(child, before[i] ?? null); });
}

const grouped = (number) => (number < 1000 ? String(number) : number.toLocaleString("en"));
const count = (number, word) => `${grouped(number)} ${word}${number === 1 ? "" : "s"}`;

// --- names and colours: A, B, ... AA are requests, A1, A2 sequences of one -------------------------------------------

const NAMES = new Map(); // that were taken apart: all parts ask for them, many times in a step

/** {request: its name, arrival: 1, 2, ..., number: of the sequence, or 0}. */
function partsOf(name) {
  if (!NAMES.has(name)) {
    const request = name.replace(/\d+$/, ""), arrival = [...request].reduce((sum, letter) => 26 * sum + letter.charCodeAt(0) - 64, 0);
    NAMES.set(name, { request, arrival, number: Number(name.slice(request.length)) });
  }
  return NAMES.get(name);
}

const requestOf = (name) => partsOf(name).request;

function inOrder(one, other) {
  const a = partsOf(one), b = partsOf(other);
  return a.arrival - b.arrival || a.number - b.number;
}

/** Neighbours differ: the golden angle. Sequences of a request have its hue, and steps of lightness. */
function paint(element, name) {
  const { arrival, number } = partsOf(name);
  element.style.setProperty("--hue", Math.round(arrival * 137.5 + 60) % 360);
  element.style.setProperty("--step", Math.max(0, number - 1) % 4);
}

function chip(name) {
  const element = make("span", "chip", name);
  paint(element, name);
  return element;
}

// --- states -------------------------------------------------------------------------------------------------------------

/** RFC 7386: the target becomes what the patch says. Objects that it makes have nothing but what was put into them. */
function merge(target, patch) {
  for (const [name, value] of Object.entries(patch)) {
    if (value === null) delete target[name];
    else if (isObject(value)) target[name] = merge(isObject(target[name]) ? target[name] : Object.create(null), value);
    else target[name] = value;
  }
  return target;
}

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

/** A state that further patches don't change. */
const copied = (state) => merge(Object.create(null), state);

/** For each block in use, of the pool or (swapped) of the CPU's: who holds it, as which of its blocks, slots filled. */
function holders(state, swapped = false) {
  const held = new Map(), size = state.usage.block_size;
  for (const name of Object.keys(state.tables).sort(inOrder)) {
    const table = state.tables[name];
    if (Boolean(table.swapped) !== swapped) continue;
    table.blocks.forEach((block, place) => {
      if (!held.has(block)) held.set(block, { names: [], places: [], filled: Math.max(0, Math.min(size, table.tokens - place * size)) });
      held.get(block).names.push(name);
      held.get(block).places.push(place);
    });
  }
  return held;
}

/** The same of a moment, made once for all parts that ask. A moment's state must not change while it is shown. */
function heldIn(moment, swapped = false) {
  moment.held ??= {};
  return (moment.held[swapped] ??= holders(moment.state, swapped));
}

/** By block: the slots that the step computed, {from, to}. Those behind the filled ones were guessed, and taken back. */
function writtenIn(moment, swapped = false) {
  const { state, did } = moment, size = state.usage.block_size;
  moment.written ??= {};
  return (moment.written[swapped] ??= slots());

  function slots() {
    const written = new Map();
    for (const [name, [start, own, guessed]] of Object.entries(did?.computed ?? {})) {
      const table = state.tables[name];
      if (!table || Boolean(table.swapped) !== swapped) continue;
      const reached = did.reached?.[name] ?? start + own + guessed; // guesses of other branches lie elsewhere
      const end = guessed ? Math.max(table.tokens, reached) : start + own;
      for (let place = Math.floor(start / size); place * size < end && place < table.blocks.length; place++) {
        const from = Math.max(0, start - place * size), to = Math.min(size, end - place * size), block = table.blocks[place];
        const other = written.get(block);
        written.set(block, other ? { from: Math.min(from, other.from), to: Math.max(to, other.to) } : { from, to });
      }
    }
    return written;
  }
}

/** What the step found of requests that it admitted: [request, how many tokens, their blocks: the first ones of a page table]. */
function foundIn({ state, did }) {
  if (!did?.found) return [];
  const inPool = Object.keys(state.tables).filter((name) => !state.tables[name].swapped).sort(inOrder);
  return Object.entries(did.found).map(([request, tokens]) => {
    const table = state.tables[inPool.find((name) => requestOf(name) === request)];
    return [request, tokens, table?.blocks.slice(0, Math.floor(tokens / state.usage.block_size)) ?? []];
  });
}

/** Empty slots of the blocks in use, in percent. */
function wasteOf(usage) {
  const slots = usage.used * usage.block_size;
  return slots ? 100 * (slots - usage.tokens_stored) / slots : 0;
}

// --- texts --------------------------------------------------------------------------------------------------------------

const PICTURES = { "\n": "↵", "\t": "⇥", "\r": "␍", "\x7f": "␡" };
const UNSEEN = /[\x80-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]/g;

/** A text in which what can't be seen is seen, and what would turn other text around is only named. */
function readable(text) {
  return text.replace(/[\0-\x1f\x7f]/g, (sign) => PICTURES[sign] ?? String.fromCharCode(0x2400 + sign.charCodeAt(0)))
    .replace(UNSEEN, (sign) => `‹${sign.charCodeAt(0).toString(16)}›`);
}

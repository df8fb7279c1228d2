// --- the live state: one object, which patches keep up to date, and the parts that draw it ------------------------------

const LINGER = 700; // milliseconds that a movement is seen: steps follow each other faster than eyes
let state = {};
let said = null; // of events
let moved = []; // {at, did}
let rest = 0; // the timer after which nothing moves any more

const view = new View($("run"), (name) => state.requests?.[requestOf(name)]?.page.startsWith(TAB) ?? false);
const queue = (which) => ({ list: $(which), number: $(`num-${which}`) });
const queues = { running: queue("running"), waiting: queue("waiting"), swapped: queue("swapped") };
const everywhere = [new Counts(view, $("counts")), new Queues(view, queues)];
const ofBlocks = [new Pool(view, $("pool")), new Pool(view, $("cpu"), true), new Legend(view, $("legend")), new Detail(view, $("detail")),
  new Tables(view, $("tables")), new Prefixes(view, view.find(".prefixes")), new Moves(view, view.find(".moves"))];
const folded = { "page-tables": Tables, found: Prefixes }; // what isn't open isn't drawn
const numbers = new Numbers(), bar = new Bar(), events = new Events(view, $("events")); // these are told of each state once

/** As long as the page is seen. A hidden one would take a connection, of which a browser has six for a server. */
async function follow() {
  for (let wait = 1; ; wait = Math.min(2 * wait, 8)) {
    while (document.hidden) await new Promise((done) => document.addEventListener("visibilitychange", done, { once: true }));
    const looking = new AbortController();
    const leave = () => document.hidden && looking.abort();
    document.addEventListener("visibilitychange", leave);
    try {
      const response = await ask("/live", { signal: looking.signal });
      state = {};
      moved = [];
      clearTimeout(rest);
      numbers.forget();
      for await (const data of eventsOf(response)) {
        merge(state, JSON.parse(data));
        say("live", true);
        show();
        wait = 0.5;
      }
      say("the server has ended the live view", false);
    } catch (error) {
      say(error.name === "AbortError" ? "paused" : error.message, false);
    }
    document.removeEventListener("visibilitychange", leave);
    if (!document.hidden) await pause(wait);
    while (keyMissing && !sessionStorage.getItem("key")) await pause(0.5); // until somebody sends a message with one
  }
}

function say(words, on) {
  setText($("status"), words);
  $("status").classList.toggle("on", on);
}

function show() {
  $("model").textContent = state.model;
  document.title = `${state.model} - minipaged`;
  nameTurns();
  for (const id of ["pool", "legend", "detail", "page-tables", "found"]) $(id).hidden = !state.shows_blocks;
  $("bar").hidden = state.shows_blocks;
  $("cpu-pool").hidden = !state.shows_blocks || !state.usage.swapped_out_blocks;
  if (view.picked && !state.requests[view.picked]) view.picked = "";
  moved.push({ at: performance.now(), did: structuredClone(state.did) });
  showMoment(lately());
  const told = [...state.events].reverse();
  if (told.join("\n") !== said) events.update({ state: { events: told } });
  said = told.join("\n");
  numbers.update(state);
  if (!state.shows_blocks) bar.update(state);
  clearTimeout(rest);
  rest = setTimeout(() => showMoment({}), LINGER);
}

function showMoment(did) {
  const closed = Object.entries(folded).filter(([id]) => !$(id).open).map(([, kind]) => kind);
  view.parts = [...everywhere, ...(state.shows_blocks ? ofBlocks.filter((part) => !closed.includes(part.constructor)) : [])];
  view.show({ state, did, step: state.step.number, header: state });
}

/** What the steps did since the state before; and what moved a little earlier. */
function lately() {
  moved = moved.filter(({ at }) => performance.now() - at < LINGER);
  const did = { ...state.did }, found = Object.assign({}, ...moved.map((one) => one.did.found));
  if (Object.keys(found).length) did.found = found;
  for (const kind of ["copies", "swap_out", "swap_in", "evicted"]) {
    const all = moved.flatMap((one) => one.did[kind] ?? []);
    if (all.length) did[kind] = all;
  }
  return did;
}

/** Requests of this tab get the names that they have in the pool. */
function nameTurns() {
  for (const [name, request] of Object.entries(state.requests)) {
    const turn = request.page.startsWith(TAB) && turns.find((one) => one.tag === request.page);
    if (!turn) continue;
    if (!turn.name) turn.answers.forEach((answer, index) => nameAnswer(answer, name + (turn.n > 1 && !turn.beams ? index + 1 : "")));
    turn.name = name;
    if (!turn.over) tellFacts(turn);
  }
}

function nameAnswer({ chip }, name) {
  chip.textContent = name;
  chip.hidden = false;
  paint(chip, name);
}

for (const element of view.root.querySelectorAll("[data-word]")) explain(element, element.dataset.word);
$("page-tables").open = $("found").open = matchMedia("(min-width: 861px)").matches; // on a phone they are asked for
for (const id of Object.keys(folded)) $(id).ontoggle = () => { if (state.requests) showMoment({}); };
follow();

// The page of a run, or of two beside each other: makes a view for each, moves them, and keeps the link.

const runs = JSON.parse($("data").textContent).runs;
const traces = runs.map((run) => new Trace(run));
const reach = (swapped) => Math.max(...traces.map((trace) => trace.reach[swapped]));
const player = new Player(traces, show);
const views = traces.map(newView);
new Search(traces, ({ number, name, place }) => { pick(name); player.goTo(place, number); });

function newView(trace, number) {
  const root = $("run").content.cloneNode(true).firstElementChild, view = new View(root);
  for (const element of root.querySelectorAll("[data-id]")) element.id = `${element.dataset.id}-${number}`;
  $("runs").append(root);
  for (const element of root.querySelectorAll("[data-word]")) explain(element, element.dataset.word);
  const go = (place) => player.goTo(place, number), find = (selector) => view.find(selector);
  const queue = (which) => ({ list: find(`.queue.${which} ul`), number: find(`.queue.${which} .number`) });
  const queues = { running: queue("running"), waiting: queue("waiting"), swapped: queue("swapped") };
  tell(trace, find);
  find(".cpu-pool").hidden = !reach(true);
  view.parts = [
    new Counts(view, find(".counts")), new Pool(view, find(".pool.gpu"), false, reach(false)),
    new Pool(view, find(".pool.cpu"), true, reach(true)), new Legend(view, find(".legend")), new Detail(view, find(".detail")),
    new Tables(view, find(".tables")), new Queues(view, queues),
    new Events(view, find(".events")), new Timeline(view, find(".timeline"), trace, go), new Plots(view, find(".plots"), trace, go),
    new Prefixes(view, find(".prefixes")), new TextPart(view, find(".text")), new Moves(view, find(".moves")),
  ];
  view.onpick = pick;
  steady([...root.querySelectorAll(".memory, .page-tables, .events, .queues")]);
  return view;
}

/** Panels grow and don't shrink, until they get another width: so what stands below them can be pointed at. */
function steady(panels) {
  const grow = (panel, high) => panel.style.setProperty("min-height", `${panel.high = Math.ceil(high)}px`);
  const again = () => {
    for (const panel of panels) panel.style.removeProperty("min-height");
    const heights = panels.map((panel) => panel.getBoundingClientRect().height);
    panels.forEach((panel, i) => grow(panel, heights[i]));
  };
  let frame;
  const observer = new ResizeObserver((entries) => {
    for (const { target, borderBoxSize: [{ blockSize, inlineSize }] } of entries) {
      if (target.wide !== inlineSize) {
        cancelAnimationFrame(frame);
        frame = requestAnimationFrame(() => { frame = requestAnimationFrame(again); }); // rows come into sight a frame later
      } else if (blockSize > target.high) grow(target, blockSize);
      target.wide = inlineSize;
    }
  });
  for (const panel of panels) observer.observe(panel);
}

/** What is the same in all steps. */
function tell(trace, find) {
  const { title, header, every } = trace, notes = [];
  find(".title").textContent = title;
  find(".lesson").textContent = header.lesson ?? "";
  const unused = header.num_cpu_blocks && !reach(true) ? `; ${grouped(header.num_cpu_blocks)} of the CPU, never used` : "";
  find(".about").textContent = `${count(header.num_blocks, "block")} of ${header.block_size} tokens${unused}`;
  if (every > 1) notes.push(`A long run: of every ${every} steps one is shown, with what all of them did.`);
  if (header.version === 1) notes.push("A trace of version 1: it has no times, no texts, and not what can be found again.");
  const differs = ([name, value]) => traces.some((other) => other.header.settings?.[name] !== value);
  const settings = Object.entries(header.settings ?? {}).filter(differs);
  if (settings.length) notes.push(settings.map(([name, value]) => `${name}: ${value}`).join(", "));
  find(".notes").textContent = notes.join(" ");
}

/** A request stands out in all views, or ("") none does. */
function pick(name) {
  for (const view of views) view.picked = name;
  show();
}

// --- the moment, on the screen and in the link ---------------------------------------------------------------------------

const SOON = 200; // milliseconds without a move: browsers don't let a page write its link at every step
let keeping; // the timer

function show() {
  const places = player.places, moments = traces.map((trace, number) => trace.moment(places[number]));
  views.forEach((view, number) => view.show(moments[number]));
  $("step").max = player.last;
  $("step").step = player.inTime ? "any" : 1;
  $("step").value = player.now;
  const { line, time, trace } = moments[traces.indexOf(player.lead)], end = trace.lines.at(-1).step;
  const seconds = line.time === undefined ? "" : `, ${time.toFixed(2)} s`;
  $("where").textContent = player.inTime ? `${player.now.toFixed(2)} s` : `step ${line.step} of ${end}${seconds}`;
  $("step").setAttribute("aria-valuetext", $("where").textContent);
  $("play").textContent = player.playing ? "Pause" : "Play";
  $("back").disabled = $("first").disabled = player.now <= 0;
  $("next").disabled = $("last").disabled = player.now >= player.last;
  clearTimeout(keeping);
  if (!player.playing) keeping = setTimeout(() => keep(moments), SOON);
}

/** The link says where we are, and for who listens instead of looking, a line says what happened. */
function keep(moments) {
  const said = moments.map((moment) => [...(traces.length > 1 ? [moment.trace.title] : []), ...aloud(moment)].join(". "));
  $("told").textContent = [$("where").textContent, ...said].join(". ");
  const { step } = moments[traces.indexOf(player.lead)];
  const link = new URLSearchParams(player.inTime ? { time: Number(player.now.toFixed(6)) } : { step });
  if (views[0].picked) link.set("request", views[0].picked);
  if (location.hash.slice(1) !== String(link)) history.replaceState(null, "", `#${link}`);
}

function followLink() {
  const link = new URLSearchParams(location.hash.slice(1)), first = player.lead, name = link.get("request");
  for (const view of views) view.picked = traces.some((trace) => trace.requests.has(name)) ? name : "";
  const time = Number(link.get("time")), step = Number(link.get("step") ?? first.header.open_at ?? first.lines[0].step);
  player.inTime = traces.length > 1 && time > 0;
  $("mode").value = player.inTime ? "time" : "step";
  if (player.inTime) player.go(time);
  else player.goTo(first.placeOf(Number.isFinite(step) ? step : 0));
}

// --- controls ---------------------------------------------------------------------------------------------------------------

$("play").onclick = () => player.toggle();
$("first").onclick = () => player.go(0);
$("last").onclick = () => player.go(player.last);
$("back").onclick = () => player.move(-1);
$("next").onclick = () => player.move(1);
$("step").oninput = () => player.go($("step").valueAsNumber);
$("speed").onchange = () => { player.speed = Number($("speed").value); player.carried = 0; };
$("with-mode").hidden = traces.length < 2;
$("mode").onchange = () => player.together($("mode").value === "time");

const KEYS = {
  ArrowLeft: () => player.move(-1), ArrowRight: () => player.move(1), Home: () => player.go(0), End: () => player.go(player.last),
  PageUp: () => player.move(-10), PageDown: () => player.move(10), " ": () => player.toggle(), "+": () => faster(1), "-": () => faster(-1),
  "/": () => $("search").focus(), Escape: () => pick(""),
};

function faster(by) {
  const place = Math.max(0, Math.min($("speed").options.length - 1, $("speed").selectedIndex + by));
  $("speed").selectedIndex = place;
  $("speed").onchange();
}

const SLIDES = /^(Arrow|Page|Home|End)/; // keys that a slider has for itself

document.addEventListener("keydown", (event) => {
  const isField = event.target.closest("input, select, textarea") && !(event.target.type === "range" && !SLIDES.test(event.key));
  const busy = isField && event.key !== "Escape";
  const pressed = event.key === " " && event.target.closest("button, summary");
  if (event.defaultPrevented || busy || pressed || isForBrowser(event) || !(event.key in KEYS)) return;
  event.preventDefault();
  KEYS[event.key]();
});

addEventListener("hashchange", followLink);
$("about").textContent = traces.length > 1 ? "two runs, replayed beside each other" : `a run of ${traces[0].header.model}, replayed`;
document.title = `${traces.map((trace) => trace.title).join(" and ")} - minipaged`;
$("runs").classList.toggle("two", traces.length > 1);
followLink();

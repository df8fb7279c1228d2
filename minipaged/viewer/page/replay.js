// The page of a run, or of two beside each other: makes a view for each, and moves them.

const runs = JSON.parse($("data").textContent).runs;
const traces = runs.map((run) => new Trace(run));
const views = traces.map((trace, number) => newView(trace, number));
const player = new Player(traces, show);

function newView(trace, number) {
  const root = $("run").content.cloneNode(true).firstElementChild;
  const view = new View(root);
  for (const element of root.querySelectorAll("[data-id]")) element.id = `${element.dataset.id}-${number}`;
  $("runs").append(root);
  view.find(".title").textContent = trace.title;
  view.parts = [
    new Pool(view, view.find(".pool.gpu")), new Pool(view, view.find(".pool.cpu"), true), new Tables(view, view.find(".tables")),
    new Queues(view, Object.fromEntries(["running", "waiting", "swapped"].map((which) => [which, {
      list: view.find(`.queue.${which} ul`), number: view.find(`.queue.${which} .number`) }]))),
    new Events(view, view.find(".events")),
  ];
  return view;
}

function show(places) {
  views.forEach((view, number) => view.show(traces[number].moment(places[number])));
  $("step").max = player.last;
  $("step").value = player.place;
  $("where").textContent = `step ${player.longest.lines[player.place].step} of ${player.longest.lines[player.last].step}`;
  $("play").textContent = player.playing ? "Pause" : "Play";
}

$("play").onclick = () => player.toggle();
$("step").oninput = () => player.go($("step").valueAsNumber);
player.go(0);

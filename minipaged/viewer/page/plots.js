// The account over time, as small plots. Clicking and dragging goes there.

const HIGH = 56; // pixels of a plot
const WINDOW = 20; // tokens a second are those of a twentieth of the run

// A plot: its name, its lines, its limit (a line, too, if it isn't far above), and what is said of a step (at: a number there).
// rests: 0 while the engine rests. when: whether there is one; else wherever its first number is known.
const PLOTS = [
  { name: "blocks in use", lines: [["in use", "used"], ["shared", "shared"], ["in use or cached", "used+cached"]],
    limit: ({ num_blocks }) => num_blocks,
    say: (at, { num_blocks }) => `${at("used")} of ${num_blocks}, ${at("shared")} shared, ${at("cached")} cached` },
  { name: "waste", lines: [["waste", "waste"]], limit: () => 100, say: (at) => `${at("waste", 1)} % of the slots in use` },
  { name: "tokens in the step", lines: [["tokens", "tokens"]], rests: true, limit: ({ settings }) => settings?.max_num_batched_tokens,
    say: (at, { settings }) => at("tokens") + (settings?.max_num_batched_tokens ? ` of at most ${settings.max_num_batched_tokens}` : "") },
  { name: "output tokens", lines: [["output", "speed"]], rests: true,
    say: (at, header, past) => (past.hasTimes ? `${at("speed", 1)} a second` : `${at("speed")} in the step`) },
  { name: "requests", lines: [["running", "in running"], ["waiting", "in waiting"], ["swapped out", "in swapped"]],
    say: (at) => `${at("in running")} running, ${at("in waiting")} waiting, ${at("in swapped")} swapped out` },
  { name: "CPU pool", lines: [["in use", "swapped"]], limit: ({ num_cpu_blocks }) => num_cpu_blocks,
    say: (at, { num_cpu_blocks }) => `${at("swapped")} of ${num_cpu_blocks} blocks in use`, when: (past) => past.hasSwapped },
  { name: "tokens found", lines: [["found", "found"], ["asked for", "asked"]],
    say: (at) => `${at("found")} of ${at("asked")} asked for`, when: (past) => past.hasFound },
];

class Plots {
  constructor(view, element, trace, go) {
    const pasts = traces.map((one) => addSeries(pastOf(one)));
    Object.assign(this, { view, element, trace, go, past: pastOf(trace), at: -1 });
    const known = ({ lines }) => pasts.some(({ series }) => series[lines[0][1]].some((number) => number >= 0));
    this.plots = PLOTS.filter((plot) => known(plot) && (!plot.when || pasts.some(plot.when))).map((plot) => new Plot(plot, this));
    element.append(...this.plots.map((plot) => plot.element));
    walkWords(element);
    axis.parts.push(this);
    this.draw();
  }

  draw() {
    for (const plot of this.plots) plot.draw();
    const { at } = this;
    this.at = -1;
    if (at >= 0) this.update({ place: at });
  }

  update({ place }) {
    if (place === this.at) return;
    this.at = place;
    for (const plot of this.plots) plot.tell(place);
  }
}

class Plot {
  constructor(plot, { trace, past, go }) {
    Object.assign(this, plot, { trace, past });
    const name = make("b", "", this.title());
    explain(name, plot.name);
    this.value = make("span", "value");
    this.svg = drawn("svg", { viewBox: `0 0 1000 ${HIGH}`, preserveAspectRatio: "none", height: HIGH, "aria-hidden": "true" });
    this.cursor = make("div", "cursor");
    this.top = make("span", "top small");
    this.field = make("div", "field", "", this.svg, this.top, this.cursor);
    this.field.setAttribute("role", "img");
    this.element = make("figure", "plot", "", make("figcaption", "", "", name, this.value), this.field);
    if (plot.lines.length > 1) this.element.append(this.key());
    draggable(this.field, (event) => go(this.placeAt(event)));
    this.field.addEventListener("pointermove", (event) => this.write(this.placeAt(event), true));
    this.field.addEventListener("pointerleave", () => this.write(this.at));
    this.range = [smallest(past.series[plot.lines[0][1]]), largest([past], plot.lines.slice(0, 1))];
    this.setScale();
  }

  title() {
    const isRate = this.name === "output tokens" && this.past.hasTimes;
    return isRate ? `output tokens a second, over ${this.past.window.toFixed(2)} s` : this.name;
  }

  /** What the lines are, each as it is drawn. */
  key() {
    const line = (i) => drawn("path", { d: "M0 5h18", class: `line line-${i}` });
    const sample = (i) => drawn("svg", { width: 18, height: 10, "aria-hidden": "true" }, line(i));
    return make("div", "key small", "", ...this.lines.map(([word], i) => make("span", "", "", sample(i), word)));
  }

  /** From 0 to the most of any trace; the limit too, unless all would lie flat below it. */
  setScale() {
    const highest = largest(traces.map(pastOf), this.lines), limits = traces.map(({ header }) => this.limit?.(header) ?? 0);
    const limit = Math.max(...limits), own = limits[traces.indexOf(this.trace)];
    this.scale = Math.max(1, limit && limit <= 4 * highest ? limit : highest);
    this.bound = own <= this.scale ? own : 0;
    this.top.textContent = shortly(this.scale);
  }

  y(number) {
    return Math.round(10 * (HIGH - 2 - (HIGH - 6) * Math.min(1, number / this.scale))) / 10;
  }

  draw() {
    this.wide = 1000 / axis.end;
    const children = [];
    this.lines.forEach(([, name], i) => {
      const path = this.path(this.past.series[name]);
      if (i === 0) children.push(drawn("path", { d: `${path}V${HIGH - 2}H0z`, class: "area" }));
      children.push(drawn("path", { d: path, class: `line line-${i}` }));
    });
    if (this.bound) children.push(drawn("path", { d: `M0 ${this.y(this.bound)}H1000`, class: "line bound" }));
    this.svg.replaceChildren(...children, drawn("path", { d: `M0 ${HIGH - 2}H1000`, class: "ground" }));
  }

  /** A number holds until the next step begins; what is counted in a step is 0 while the engine rests. */
  path(numbers) {
    const { past, wide } = this, rests = new Set(this.rests && axis.mode === "time" ? past.gaps : []);
    const x = (at) => Math.round(100 * at * wide) / 100;
    let path = "", before = NaN;
    numbers.forEach((number, place) => {
      if (Number.isNaN(number)) return;
      const from = x(axis.from(past, place));
      if (rests.has(place)) path += `V${this.y(before = 0)}`;
      if (!path) path = `M${from} ${this.y(number)}`;
      else if (number !== before) path += `H${from}V${this.y(number)}`;
      before = number;
    });
    return path && `${path}H${x(axis.to(past, numbers.length - 1))}`;
  }

  placeAt(event) {
    const { left, width } = this.field.getBoundingClientRect();
    return axis.placeAt(this.past, (event.clientX - left) / width * axis.end);
  }

  /** The cursor goes to a step, and its value is written. */
  tell(place) {
    this.at = place;
    const from = axis.from(this.past, place), to = axis.to(this.past, place), wide = `${(to - from) * this.wide / 10}%`;
    this.cursor.style.setProperty("left", `${from * this.wide / 10}%`);
    if (wide !== this.cursorWide) this.cursor.style.setProperty("width", this.cursorWide = wide);
    this.write(place);
  }

  write(place, pointed = false) {
    const told = (number, digits) => (Number.isNaN(number) ? "-" : number.toFixed(digits));
    const at = (name, digits = 0) => told(this.past.series[name][place], digits);
    const text = this.say(at, this.trace.header, this.past);
    const value = pointed ? `step ${this.trace.lines[place].step}: ${text}` : text;
    if (value === this.value.textContent) return;
    this.value.textContent = value;
    this.field.setAttribute("aria-label", `${this.title()}, from ${this.range.map(shortly).join(" to ")}; now ${text}`);
  }
}

/** Numbers that are made of others. */
function addSeries(past) {
  const { series } = past;
  if (series.speed) return past;
  series["used+cached"] = series.used.map((used, place) => used + series.cached[place]);
  past.window = Math.max(...traces.map((trace) => trace.timeOf(trace.length - 1))) / WINDOW;
  let first = -1; // the last step that ended before the window
  series.speed = series.drawn.map((drawn, place) => {
    if (!past.hasTimes) return drawn - (series.drawn[place - 1] ?? 0);
    while (past.end[first + 1] < past.end[place] - past.window) first++;
    const since = first < 0 ? 0 : past.end[first];
    return (drawn - (series.drawn[first] ?? 0)) / Math.max(1e-9, past.end[place] - since);
  });
  return past;
}

const larger = (a, b) => (b > a ? b : a); // what is not known is passed over
const largest = (pasts, lines) => pasts.flatMap(({ series }) => lines.map(([, name]) => series[name].reduce(larger, 0))).reduce(larger, 0);
const smallest = (numbers) => numbers.reduce((a, b) => (b < a ? b : a), Infinity);
const shortly = (number) => number.toLocaleString("en", { maximumFractionDigits: number < 100 ? 1 : 0 });

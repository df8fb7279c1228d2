// From left to right: steps or seconds. All timelines and plots of a page share it, and two runs have the same scale.

class Axis {
  constructor() {
    Object.assign(this, { mode: "step", parts: [], followed: false });
  }

  get hasTimes() {
    return traces.every((trace) => pastOf(trace).hasTimes);
  }

  /** Where all of it ends, of the longest trace. */
  get end() {
    return Math.max(...traces.map((trace) => this.to(pastOf(trace), trace.length - 1)));
  }

  /** A step stands between these two. */
  from(past, place) {
    return this.mode === "step" ? place : past.begin[place];
  }

  to(past, place) {
    return this.mode === "step" ? place + 1 : past.end[place];
  }

  /** The place whose step stands here; where none does, the last one before. */
  placeAt(past, x) {
    const last = past.length - 1;
    if (this.mode === "step") return Math.max(0, Math.min(last, Math.floor(x)));
    const place = past.trace.placeAtTime(x), next = Math.min(last, place + 1);
    return past.begin[next] <= x ? next : place;
  }

  /** A part is drawn anew when this changes. */
  set(mode) {
    if (mode === this.mode || (mode === "time" && !this.hasTimes)) return;
    this.mode = mode;
    for (const part of this.parts) part.draw();
  }

  /** Two runs that are shown in time are drawn in time. */
  follow(inTime) {
    if (inTime !== this.followed) this.set(inTime ? "time" : "step");
    this.followed = inTime;
  }

  /** Marks for a trace's scale: [where, what is written there]; at most so many for the longest of the traces. */
  ticks(past, most) {
    const { trace } = past, inTime = this.mode === "time", stepsOf = ({ lines }) => lines.at(-1).step - lines[0].step;
    const first = inTime ? 0 : trace.lines[0].step, last = inTime ? past.end[past.length - 1] : trace.lines.at(-1).step;
    const longest = inTime ? this.end : Math.max(...traces.map(stepsOf));
    const every = Math.max(inTime ? 0 : 1, roundUp(longest / Math.max(1, most)));
    const digits = Math.max(0, Math.ceil(-Math.log10(every) - 1e-9));
    const numbers = Array.from({ length: Math.floor(last / every) + 1 }, (_, i) => i * every).filter((number) => number >= first);
    return numbers.map((number) => [inTime ? number : trace.placeOf(number) + 0.5, number.toFixed(digits)]);
  }
}

const axis = new Axis();

/** 1, 2 or 5 times a power of ten, and no less than this. */
function roundUp(number) {
  const power = 10 ** Math.floor(Math.log10(number || 1)), times = number / power;
  return power * (times <= 1 ? 1 : times <= 2 ? 2 : times <= 5 ? 5 : 10);
}

/** An element where pressing and dragging goes: `to` is called with the event. */
function draggable(element, to) {
  let before = null;
  const go = (event) => { const x = event.clientX; if (x !== before) to(event); before = x; };
  element.addEventListener("pointerdown", (event) => {
    if (event.button || event.ctrlKey) return;
    event.preventDefault(); // no text is chosen on the way
    element.setPointerCapture(event.pointerId);
    before = null;
    go(event);
  });
  element.addEventListener("pointermove", (event) => { if (element.hasPointerCapture(event.pointerId)) go(event); });
}

// Where we are in one trace or in two: play, pause, step, speed; and the link that says so.

const STEPS_A_SECOND = 4; // at speed 1

class Player {
  /** traces: one or two. show: called with the place in each. */
  constructor(traces, show) {
    Object.assign(this, { traces, show, place: 0, speed: 1, playing: false, inTime: false, carried: 0 });
    this.longest = traces.reduce((a, b) => (b.length > a.length ? b : a));
  }

  get last() {
    return this.longest.length - 1;
  }

  /** The place in each trace: the same number of steps, or the same time. */
  places() {
    if (!this.inTime) return this.traces.map((trace) => Math.min(this.place, trace.length - 1));
    return this.traces.map((trace) => (trace === this.longest ? this.place : trace.placeAtTime(this.longest.timeOf(this.place))));
  }

  go(place) {
    this.place = Math.max(0, Math.min(this.last, Math.round(place)));
    this.show(this.places());
  }

  toggle(yes = !this.playing) {
    if (yes && this.place === this.last) this.place = 0;
    this.playing = yes;
    this.before = performance.now();
    this.show(this.places());
    if (yes) requestAnimationFrame((now) => this.tick(now));
  }

  tick(now) {
    if (!this.playing) return;
    this.carried += Math.max(0, now - this.before) / 1000 * STEPS_A_SECOND * this.speed;
    this.before = now;
    const steps = Math.floor(this.carried);
    this.carried -= steps;
    if (steps) this.go(this.place + steps);
    if (this.place === this.last) this.toggle(false);
    else requestAnimationFrame((next) => this.tick(next));
  }
}

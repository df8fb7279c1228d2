// Where we are in one trace or in two: play, pause, step, speed.

const STEPS_A_SECOND = 4; // at speed 1

class Player {
  /** traces: one or two. show: called when something has changed. */
  constructor(traces, show) {
    Object.assign(this, { traces, show, speed: 1, playing: false, inTime: false });
    this.now = 0; // the place; in time: seconds
  }

  get last() {
    return Math.max(...this.traces.map((trace) => (this.inTime ? trace.timeOf(trace.length - 1) : trace.length - 1)));
  }

  /** The trace that has most steps: "step 9" is its step. */
  get lead() {
    return this.traces.reduce((most, trace) => (trace.length > most.length ? trace : most));
  }

  /** The place in each trace: the same number of steps, or the same time. */
  get places() {
    return this.traces.map((trace) => (this.inTime ? trace.placeAtTime(this.now + 1e-9) : Math.min(this.now, trace.length - 1)));
  }

  go(now) {
    this.now = Math.max(0, Math.min(this.last, this.inTime ? now : Math.round(now)));
    this.carried = 0;
    this.show();
  }

  /** To a place of one of the traces; the other one follows, in step or in time. */
  goTo(place, number = 0) {
    this.go(this.inTime ? this.traces[number].timeOf(place) : place);
  }

  /** Some steps on; in time: to the next moment at which a step ends in any trace, or the one before. */
  move(steps) {
    if (!this.inTime) return this.go(this.now + steps);
    const there = this.traces.map((trace) => this.timeNear(trace, steps)).filter((time) => (steps > 0 ? time > this.now : time < this.now));
    if (there.length) this.go(steps > 0 ? Math.min(...there) : Math.max(...there));
  }

  /** When the step of a trace ends that is so many steps from now; the first of them may be under way. */
  timeNear(trace, steps) {
    const place = trace.placeAtTime(this.now + 1e-9), time = trace.timeOf(place);
    const counted = steps > 0 ? time > this.now : time < this.now - 1e-9;
    return trace.timeOf(Math.max(0, Math.min(trace.length - 1, place + steps - (counted ? Math.sign(steps) : 0))));
  }

  together(inTime) {
    const place = this.places[this.traces.indexOf(this.lead)], time = this.lead.timeOf(place);
    this.inTime = inTime;
    this.go(inTime ? time : place);
  }

  toggle(yes = !this.playing) {
    if (yes && this.now >= this.last) this.now = 0;
    this.playing = yes;
    this.carried = 0;
    this.show();
    cancelAnimationFrame(this.frame); // of when it was played before
    if (yes) this.frame = requestAnimationFrame((now) => { this.before = now; this.tick(now); });
  }

  tick(now) {
    if (!this.playing) return;
    const seconds = Math.min(0.25, (now - this.before) / 1000); // a hidden page doesn't run ahead
    this.before = now;
    this.advance(seconds);
    if (this.now >= this.last) this.toggle(false);
    else this.frame = requestAnimationFrame((next) => this.tick(next));
  }

  /** speed 0: as it was, by the clock of the run. */
  advance(seconds) {
    const trace = this.lead;
    if (this.inTime) return this.goOn(this.now + seconds * (this.speed || 1));
    if (this.speed) this.carried += seconds * STEPS_A_SECOND * this.speed;
    else {
      this.clock = this.carried === 0 ? trace.timeOf(this.now) : this.clock;
      this.clock += seconds;
      this.carried = Math.max(1e-9, trace.placeAtTime(this.clock) - this.now);
    }
    if (this.carried >= 1) this.goOn(this.now + Math.floor(this.carried));
  }

  goOn(now) {
    const carried = this.inTime || !this.speed ? this.carried : this.carried - Math.floor(this.carried);
    this.now = Math.min(this.last, now);
    this.carried = !this.inTime && !this.speed ? 1e-9 : carried;
    this.show();
  }
}

// All requests over time: when each waited, was computed, was preempted. Clicking and dragging goes there.

class Timeline {
  /** go: called with the place of a step. */
  constructor(view, element, trace, go) {
    Object.assign(this, { view, element, trace, go });
  }

  update({ place }) {}
}

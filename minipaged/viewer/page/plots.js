// The account over time, as small plots.

class Plots {
  constructor(view, element, trace, go) {
    Object.assign(this, { view, element, trace, go });
  }

  update({ place }) {}
}

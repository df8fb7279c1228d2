// Lines from page tables to blocks, and what moved in a step, drawn over a run.

class Moves {
  constructor(view, layer) {
    Object.assign(this, { view, layer });
  }

  update({ state, did }) {}
}

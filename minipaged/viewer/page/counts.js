// The account of a moment, in numbers.

const COUNTS = { // name -> [what it is called, its value in a state]
  used: ["blocks in use", ({ usage }) => usage.used],
  shared: ["shared", ({ usage }) => usage.shared],
  cached: ["cached", ({ usage }) => usage.cached],
  tokens_stored: ["tokens stored", ({ usage }) => usage.tokens_stored],
  waste: ["waste", ({ usage }) => `${wasteOf(usage).toFixed(1)} %`],
  blocks_saved_by_sharing: ["saved by sharing", ({ usage }) => usage.blocks_saved_by_sharing],
  copies: ["copied on write", ({ usage }) => usage.copies],
  swapped_out_blocks: ["swapped out", ({ usage }) => usage.swapped_out_blocks],
  swapped_in_blocks: ["swapped in", ({ usage }) => usage.swapped_in_blocks],
  evicted: ["evicted", ({ usage }) => usage.evicted],
  finished: ["requests ended", (state) => state.num_finished ?? "-"],
  preemptions: ["preemptions", (state) => state.num_preemptions],
  found: ["tokens found", ({ prefixes }) => prefixes?.found ?? "-"],
  tokens: ["tokens in the step", ({ step }) => step.tokens],
};

class Counts {
  constructor(view, list) {
    this.values = {};
    for (const [name, [title]] of Object.entries(COUNTS)) {
      const value = make("dd");
      value.dataset.count = name;
      const term = make("dt", "", title);
      explain(term, title);
      list.append(make("div", "", "", term, value));
      this.values[name] = value;
    }
    walkWords(list);
  }

  update({ state }) {
    for (const [name, [, value]] of Object.entries(COUNTS)) setText(this.values[name], String(value(state)));
  }
}

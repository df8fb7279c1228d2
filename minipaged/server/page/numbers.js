// --- the engine in numbers, and how they went; and a pool that is too large to be shown block by block -------------------

const SECONDS = 60; // that the lines show

class Numbers {
  constructor() {
    this.recent = []; // {seconds, drawn} of the last two seconds of work
    this.past = []; // {at, rate, used}
  }

  /** Another server's seconds are not those of the one before. */
  forget() {
    this.recent = [];
  }

  update(state) {
    const { usage, step } = state, rate = this.rateOf(state), now = performance.now();
    this.past.push({ at: now, rate, used: usage.used });
    this.past = this.past.filter((one) => now - one.at < 1000 * SECONDS);
    $("rate").textContent = rate < 10 ? rate.toFixed(rate ? 1 : 0) : Math.round(rate);
    $("used").replaceChildren(String(usage.used), make("small", "", ` of ${usage.num_blocks}`));
    $("step").textContent = step.number;
    $("batch").textContent = step.sequences ? `${count(step.tokens, "token")} of ${count(step.sequences, "sequence")}` : "";
    $("waste").textContent = `${wasteOf(usage).toFixed(1)} %`;
    $("saved").textContent = `sharing saves ${count(usage.blocks_saved_by_sharing, "block")}`;
    const blocks = `${count(usage.num_blocks, "block")} of ${usage.block_size} tokens`;
    $("about").textContent = `${blocks}; ${usage.shared} shared, ${usage.cached} cached`;
    this.drawLine($("rate-line"), "rate", Math.max(1, ...this.past.map((one) => one.rate)));
    this.drawLine($("used-line"), "used", usage.num_blocks);
  }

  /** Tokens a second, while somebody runs. */
  rateOf({ requests, step, num_drawn }) {
    if (!Object.values(requests).some((request) => request.state === "running")) {
      this.recent = [];
      return 0;
    }
    this.recent.push({ seconds: step.seconds, drawn: num_drawn });
    while (this.recent.length > 2 && this.recent.at(-1).seconds - this.recent[0].seconds > 2) this.recent.shift();
    const passed = this.recent.at(-1).seconds - this.recent[0].seconds;
    return passed > 0.2 ? (this.recent.at(-1).drawn - this.recent[0].drawn) / passed : this.past.at(-1)?.rate ?? 0;
  }

  drawLine(svg, what, most) {
    svg.setAttribute("viewBox", "0 0 100 26");
    svg.setAttribute("preserveAspectRatio", "none");
    const now = performance.now();
    const points = this.past.map((one) => [100 - (now - one.at) / (10 * SECONDS), 25 - 24 * one[what] / most].map((x) => x.toFixed(2)));
    if (!svg.firstChild) svg.append(drawn("path"));
    svg.firstChild.setAttribute("d", points.length ? `M${points.join(" L")}` : "");
  }
}

class Bar {
  update({ usage }) {
    const parts = { shared: usage.shared, "held by one": usage.used - usage.shared, cached: usage.cached, free: usage.free - usage.cached };
    const bar = $("bar").firstElementChild;
    bar.replaceChildren(...Object.entries(parts).map(([word, blocks]) => {
      const part = make("div", { shared: "cell held shared", "held by one": "cell held", cached: "cell cached" }[word] ?? "");
      for (const [name, value] of Object.entries({ flex: `${blocks} 0 0`, "--hue": 200 })) part.style.setProperty(name, value);
      return part;
    }));
    const words = Object.entries(parts).map(([word, blocks]) => `${blocks} ${word}`).join(", ");
    bar.setAttribute("aria-label", words);
    $("bar").lastElementChild.textContent = `${usage.num_blocks} blocks are too many to show each: ${words}. ` +
      "A server that is started with --num-blocks 512 shows them all.";
  }
}

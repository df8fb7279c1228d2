// Search for a request: by its name, its id, or words of its text.

class Search {
  /** found: called with {number, name, place}: the run, the request, and the step in which it came. */
  constructor(traces, found) {
    Object.assign(this, { traces, found, hits: [], next: 0, asked: "" });
    const names = new Set(traces.flatMap((trace) => [...trace.requests.keys()]));
    $("names").append(...[...names].sort(inOrder).slice(0, 200).map((name) => Object.assign(make("option"), { value: name })));
    $("find").onsubmit = (event) => { event.preventDefault(); this.go(); };
    $("search").oninput = () => { $("found").textContent = ""; };
  }

  /** To the first request that is meant; asked again, to the next. */
  go() {
    const asked = $("search").value.trim();
    if (!asked) return;
    if (asked !== this.asked) Object.assign(this, { asked, next: 0, hits: this.search(asked) });
    if (!this.hits.length) {
      $("found").textContent = "no such request";
      return;
    }
    const hit = this.hits[this.next % this.hits.length];
    $("found").textContent = `${hit.name}: ${this.next % this.hits.length + 1} of ${this.hits.length}`;
    this.next++;
    this.found(hit);
  }

  search(asked) {
    const all = this.traces.flatMap((trace, number) => [...trace.requests].map(([name, one]) => ({ number, name, ...one })));
    const exactly = all.filter(({ name, id }) => name.toLowerCase() === asked.toLowerCase() || id === asked);
    return exactly.length ? exactly : all.filter(({ number, name }) => this.says(this.traces[number], name, asked.toLowerCase()));
  }

  says(trace, name, words) {
    const sequences = [...trace.words.keys()].filter((sequence) => requestOf(sequence) === name);
    return sequences.some((sequence) => (trace.wordsOf(sequence, trace.length - 1) ?? []).join("").toLowerCase().includes(words));
  }
}

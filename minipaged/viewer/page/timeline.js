// All requests over time: when each waited, was computed, was preempted. Clicking and dragging goes there.
// It is drawn once, as SVG: a lane is few shapes however long the run is, and themes and zoom need no code. Only a cursor moves.

const MOST_WIDE = 40000; // pixels: a browser draws no more of it than is seen, but can't draw without end

class Timeline {
  /** go: called with the place of a step. */
  constructor(view, element, trace, go) {
    Object.assign(this, { view, element, trace, go, past: pastOf(trace), zoom: 1, chosen: -1, width: 0, left: 0, top: 0, key: "" });
    this.lanes = [...this.past.lanes.values()];
    this.make();
    this.listen();
    axis.parts.push(this);
    new ResizeObserver(() => this.draw()).observe(this.box);
  }

  make() {
    this.names = make("ol", "names");
    this.names.setAttribute("role", "listbox");
    this.names.setAttribute("aria-label", "All requests; up and down choose one, Enter lets it stand out, left and right move in time");
    this.names.tabIndex = 0;
    this.options = this.lanes.map(({ name }, i) => {
      const option = make("li", "", "", chip(name));
      option.id = `${this.view.find(".pool")?.id}-lane-${i}`;
      option.setAttribute("role", "option");
      return option;
    });
    this.names.append(...this.options);
    this.corner = make("div", "corner small");
    this.ticks = make("div", "ticks small");
    this.ticks.ariaHidden = "true";
    this.svg = drawn("svg", { height: this.lanes.length * LANE, "aria-hidden": "true" });
    this.band = make("div", "band"); // behind the lane that is chosen
    this.band.hidden = true;
    this.cursor = make("div", "cursor");
    this.field = make("div", "field", "", this.band, this.svg, this.cursor);
    this.box = make("div", "lanes", "", this.corner, this.ticks, this.names, this.field);
    this.told = make("div", "here");
    this.told.hidden = true;
    this.element.append(this.bar(), this.box, this.told);
    this.element.classList.add("timeline");
    this.groups = this.lanes.map(({ name }) => { const group = drawn("g", { class: "lane" }); paint(group, name); return group; });
    this.groups.forEach((group, i) => group.setAttribute("transform", `translate(0 ${i * LANE})`));
    this.rests = drawn("path", { class: "rest" });
    this.svg.append(patterns(), this.rests, ...this.groups);
  }

  /** Buttons, and what the shapes mean. */
  bar() {
    const button = (text, title, press) => Object.assign(make("button", "", text), { type: "button", title, onclick: press });
    this.modes = { step: button("steps", "Each step is as wide as any other", () => axis.set("step")),
      time: button("seconds", "A step is as wide as it took long", () => axis.set("time")) };
    const zooms = [button("−", "Smaller (Ctrl and wheel)", () => this.zoomBy(0.5)),
      button("+", "Larger (Ctrl and wheel)", () => this.zoomBy(2)), button("all", "All of it", () => this.zoomBy(0))];
    zooms.forEach((one, i) => one.setAttribute("aria-label", ["zoom out", "zoom in", "show all of the time"][i]));
    const group = (ariaLabel, ...children) => Object.assign(make("span", "group", "", ...children), { role: "group", ariaLabel });
    const modes = axis.hasTimes ? [group("left to right", ...Object.values(this.modes))] : [];
    return make("div", "bar-of", "", ...modes, group("zoom", ...zooms), this.legend());
  }

  /** Of what occurs. */
  legend() {
    const spans = this.lanes.flatMap((lane) => lane.spans.filter((span) => span.to > span.from || this.past.begin[span.from] > span.since));
    const occurs = new Set(["end", ...spans.map(({ kind }) => kind), ...this.lanes.flatMap(({ marks }) => marks.map(({ kind }) => kind))]);
    if (this.lanes.some(({ accepted }) => accepted.length)) occurs.add("accepted");
    const entries = Object.entries({ ...KINDS, ...MARKS }).filter(([kind]) => occurs.has(kind));
    const legend = make("span", "legend", "", ...entries.map(([kind, what]) => this.entry(kind, what)));
    if (this.past.gaps.length) legend.append(make("span", "", "", make("i", "rests"), "no step"));
    walkWords(legend);
    return legend;
  }

  entry(kind, { word, shape }) {
    const isBar = kind in KINDS, d = isBar ? shape(1, 22) : shape(8, 3);
    const group = drawn("g", { class: "lane" }, drawn("path", { d, class: `kind-${kind}` }));
    if (hasPattern(kind)) group.append(patterned(kind, d));
    const picture = drawn("svg", { width: isBar ? 24 : 16, height: LANE, "aria-hidden": "true" }, group);
    const words = make("span", "", hasLetter(kind) ? `${kind} ${word}` : word);
    explain(words, word.split(":")[0]);
    return make("span", "", "", picture, words);
  }

  // --- drawing ------------------------------------------------------------------------------------------------------------

  draw() {
    this.corner.textContent = axis.mode === "time" ? "s" : "step";
    const room = this.box.clientWidth - this.corner.offsetWidth;
    if (room <= 0) return;
    this.most = Math.max(1, Math.min(MOST_WIDE, 40 * this.past.length) / room);
    this.zoom = Math.min(this.zoom, this.most);
    const width = Math.floor(room * this.zoom), key = `${width}|${axis.mode}`;
    if (key === this.key) return;
    const seen = this.box.clientHeight - this.ticks.offsetHeight; // below the scale
    Object.assign(this, { key, width, room, scale: width / axis.end, seen });
    this.field.style.setProperty("width", `${width}px`);
    this.svg.setAttribute("width", width);
    this.drawAxis();
    this.drawSeen();
    this.at = null;
    if (this.view.moment) this.update(this.view.moment);
  }

  /** The lanes that are in sight, if they are not drawn yet. */
  drawSeen() {
    const first = Math.floor(this.box.scrollTop / LANE) - 5, last = first + this.box.clientHeight / LANE + 10;
    for (let i = Math.max(0, first); i <= last && i < this.lanes.length; i++) {
      if (this.groups[i].key === this.key) continue;
      this.groups[i].key = this.key;
      this.groups[i].replaceChildren(...drawLane(this.lanes[i], this.past, this.scale));
    }
  }

  /** The scale, where the engine rested, and what listeners hear of a lane. */
  drawAxis() {
    const { begin, end, gaps } = this.past, rest = bar(0, this.lanes.length * LANE), inTime = axis.mode === "time";
    const rests = gaps.map((place) => [end[place - 1], begin[place]].map((seconds) => seconds * this.scale));
    this.rests.setAttribute("d", inTime ? rests.map(([from, to]) => rest(from, to - from)).join("") : "");
    const label = (option, i) => option.setAttribute("aria-label", laneInWords(this.lanes[i], this.past));
    if (this.labels !== axis.mode) this.options.forEach(label);
    this.labels = axis.mode;
    const fit = axis.ticks(this.past, this.width / 70).filter(([x]) => x * this.scale < this.width - 12);
    this.ticks.replaceChildren(...fit.map(([x, text]) => {
      const tick = make("span", "", text);
      tick.style.setProperty("left", `${Math.max(12, x * this.scale)}px`);
      return tick;
    }));
    for (const [mode, button] of Object.entries(this.modes)) button.setAttribute("aria-pressed", String(mode === axis.mode));
  }

  update({ place }) {
    axis.follow(player.inTime);
    if (this.picked !== this.view.picked) this.show(this.view.picked);
    if (place === this.at || !this.scale) return;
    this.at = place;
    const from = axis.from(this.past, place) * this.scale, to = axis.to(this.past, place) * this.scale;
    this.cursor.style.setProperty("width", `${Math.max(2, to - from)}px`);
    this.cursor.style.setProperty("translate", `${Math.min(from, to - 2)}px`);
    if (this.zoom > 1 && (to < this.left || to > this.left + this.room)) this.box.scrollLeft = to - this.room / 2;
    this.follow(place);
    if (document.activeElement === this.names) this.tellChosen();
  }

  /** Where not all lanes are in sight, some of the requests that are there are; unless the reader is just looking at others. */
  follow(place) {
    const { first, last } = this.past.liveAt(place), top = this.top / LANE, seen = this.seen / LANE;
    if (this.lanes.length <= seen || this.pointed || this.picked || first < 0) return;
    if (last < top + 1 || first > top + seen - 1) this.box.scrollTop = this.top = first * LANE;
  }

  /** The request that is picked stands out. */
  show(name) {
    const before = this.lanes.findIndex((lane) => lane.name === this.picked), now = this.lanes.findIndex((lane) => lane.name === name);
    this.picked = name;
    this.svg.classList.toggle("picking", now >= 0);
    for (const [i, yes] of [[before, false], [now, true]]) {
      if (i < 0) continue;
      this.groups[i].classList.toggle("picked", yes);
      this.options[i].setAttribute("aria-selected", String(yes));
    }
    if (now >= 0) this.choose(now);
  }

  // --- pointing, choosing, zooming ----------------------------------------------------------------------------------------

  listen() {
    draggable(this.field, (event) => this.go(this.placeAt(event)));
    this.field.addEventListener("pointermove", (event) => {
      this.pointed = true;
      this.tell(this.laneAt(event), this.placeAt(event), event.clientX, event.clientY);
    });
    this.field.addEventListener("pointerleave", () => { this.pointed = false; this.told.hidden = true; });
    this.names.addEventListener("click", (event) => {
      const i = this.options.indexOf(event.target.closest("li"));
      if (i >= 0) this.view.pick(this.lanes[i].name);
    });
    this.names.addEventListener("keydown", (event) => this.press(event));
    this.names.addEventListener("focus", () => this.choose(Math.max(0, this.chosen)));
    this.names.addEventListener("blur", () => { this.told.hidden = true; });
    this.box.addEventListener("scroll", () => {
      Object.assign(this, { left: this.box.scrollLeft, top: this.box.scrollTop });
      this.drawSeen();
    }, { passive: true });
    this.box.addEventListener("wheel", (event) => {
      if (!event.ctrlKey) return;
      event.preventDefault();
      this.zoomBy(event.deltaY < 0 ? 1.25 : 0.8, event.clientX);
    }, { passive: false });
  }

  placeAt(event) {
    return axis.placeAt(this.past, (event.clientX - this.field.getBoundingClientRect().left) / this.scale);
  }

  laneAt(event) {
    return Math.max(0, Math.min(this.lanes.length - 1, Math.floor((event.clientY - this.field.getBoundingClientRect().top) / LANE)));
  }

  press(event) {
    const moves = { ArrowUp: -1, ArrowDown: 1 };
    if (event.key === "Escape") this.told.hidden = true;
    if (isForBrowser(event) || !(event.key in moves || event.key === "Enter") || this.chosen < 0) return;
    event.preventDefault();
    if (event.key === "Enter") this.view.pick(this.lanes[this.chosen].name);
    else this.choose(Math.max(0, Math.min(this.lanes.length - 1, this.chosen + moves[event.key])));
  }

  choose(i) {
    if (!this.options[i]) return; // nobody was there
    const top = i * LANE;
    this.options[this.chosen]?.classList.remove("chosen");
    this.chosen = i;
    this.options[i].classList.add("chosen");
    this.band.hidden = false;
    this.names.setAttribute("aria-activedescendant", this.options[i].id);
    this.band.style.setProperty("translate", `0 ${top}px`);
    if (top < this.box.scrollTop || top > this.box.scrollTop + this.seen - LANE) this.box.scrollTop = top - this.seen / 2;
    if (document.activeElement === this.names) this.tellChosen();
  }

  tellChosen() {
    const rect = this.field.getBoundingClientRect();
    this.tell(this.chosen, this.at, rect.left + axis.to(this.past, this.at) * this.scale, rect.top + this.chosen * LANE + LANE / 2);
  }

  /** Beside a point of the window: what a request did at a step. */
  tell(i, place, x, y) {
    const around = this.element.getBoundingClientRect();
    this.told.hidden = false;
    this.told.replaceChildren(...stepInWords(this.lanes[i], this.past, place).map((text) => make("div", "", text)));
    const left = Math.min(x - around.left + 14, around.width - this.told.offsetWidth);
    const below = y + 16 + this.told.offsetHeight < innerHeight - 60; // above the player
    this.told.style.setProperty("translate", `${Math.max(0, left)}px ${y - around.top + (below ? 16 : -12 - this.told.offsetHeight)}px`);
  }

  /** 0: all of it. What is under x, or else the cursor, stays where it is. */
  zoomBy(factor, x) {
    const edge = this.box.getBoundingClientRect().left + this.corner.offsetWidth, cursor = axis.to(this.past, this.at) * this.scale;
    const under = x === undefined ? cursor : x - edge + this.left, before = under - this.left, wide = this.width;
    this.zoom = Math.max(1, Math.min(this.most, this.zoom * factor));
    this.draw();
    this.box.scrollLeft = under * this.width / wide - Math.max(0, Math.min(this.room, before));
    this.left = this.box.scrollLeft;
  }
}

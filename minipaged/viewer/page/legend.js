// What the signs in the cells mean: only of those that have occurred.

const SIGNS = { // class of a cell -> [its other classes, label, number of holders, what it means]
  held: ["held half", "A", "", "of A; its slots fill up", "slots"],
  written: ["held half written", "A", "", "written in this step", "written"],
  shared: ["held shared", "A", "3", "shared by 3", "full"],
  several: ["held shared several", "AB", "2", "shared by two requests", "full"],
  back: ["held half back", "A", "", "wrong guesses, taken back", "back"],
  reserved: ["held half reserved", "A", "", "reserved for A, empty", "empty"],
  loading: ["held half loading", "\u2193A", "", "on its way from another engine", "empty"],
  cached: ["cached", ":", "", "free, can still be found", ""],
  freed: ["freed", "\u00d7", "", "emptied in this step", ""],
  free: ["", "", "", "free", ""],
};
const FILLS = { slots: [7, null], written: [9, { from: 8, to: 9 }], full: [16, null], back: [8, { from: 7, to: 11 }], empty: [0, null] };

class Legend {
  constructor(view, element) {
    Object.assign(this, { view, element, seen: new Set(["held", "free"]), shown: 0 });
  }

  update() {
    for (const name of Object.keys(SIGNS)) if (!this.seen.has(name) && this.view.find(`.pool .cell.${name}`)) this.seen.add(name);
    if (this.shown === this.seen.size) return;
    this.shown = this.seen.size;
    this.element.replaceChildren(...Object.keys(SIGNS).filter((name) => this.seen.has(name)).map((name) => this.sign(name)));
  }

  sign(name) {
    const [classes, label, holders, meaning, fill] = SIGNS[name], cell = make("span", `cell ${classes}`), slots = make("u");
    if (fill) slots.style.setProperty("--strip", strip(16, ...FILLS[fill]));
    cell.append(make("b", "", label), make("i", "", holders), slots);
    cell.setAttribute("aria-hidden", "true");
    return make("span", "", "", cell, make("span", "", meaning));
  }
}

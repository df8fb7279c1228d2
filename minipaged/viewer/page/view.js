// One run on the screen: its parts, and what the reader points at. A part is an object with `update(moment)`, which
// draws a moment: {state, did, line, step, ...} (see trace.js; the server's page has state and did only).

class View {
  /** root: the element that all parts stand in. isMine: of a request's name, whether it is the reader's own. */
  constructor(root, isMine = () => false) {
    Object.assign(this, { root, isMine, parts: [], moment: null });
    this.picked = ""; // the request that stands out
    this.here = null; // the block that is told about: {block, swapped}
    this.kept = false; // it stays so, wherever the pointer is
    this.onpick = () => this.refresh(); // where there are several views, all of them are to show it
  }

  /** The element that a part draws into. */
  find(selector) {
    return this.root.querySelector(selector);
  }

  show(moment) {
    this.moment = moment;
    this.refresh();
  }

  refresh() {
    if (this.moment) for (const part of this.parts) part.update(this.moment);
  }

  /** Whether it is the request that stands out, or one of its sequences. */
  isPicked(name) {
    return requestOf(name) === this.picked;
  }

  /** Whether it is the block that is told about. */
  isHere(block, swapped = false) {
    return this.here?.block === block && this.here.swapped === swapped;
  }

  /** A request stands out, or ("") none does. */
  pick(name) {
    this.picked = this.picked === name ? "" : name;
    this.onpick(this.picked);
  }

  /** A block is told about, or (null) none is. */
  look(block, swapped = false) {
    this.here = block === null ? null : { block, swapped };
    this.refresh();
  }

  /** The same, until somebody asks for another one. */
  keep(block, swapped = false) {
    this.kept = true;
    this.look(block, swapped);
  }
}

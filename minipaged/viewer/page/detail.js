// What is known of the block that the reader points at.

class Detail {
  constructor(view, element) {
    Object.assign(this, { view, element });
  }

  update({ state }) {}
}

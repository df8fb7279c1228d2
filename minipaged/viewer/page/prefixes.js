// What can be found again: the radix tree, or the chains of hashes.

class Prefixes {
  constructor(view, element) {
    Object.assign(this, { view, element });
  }

  update({ state }) {}
}

// The tokens of the request that stands out, as text, block by block.

class TextPart {
  constructor(view, element) {
    Object.assign(this, { view, element });
  }

  update({ state, wordsOf }) {}
}

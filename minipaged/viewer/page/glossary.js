// What words mean: hover or focus says it.

const GLOSSARY = {
  "blocks in use": "A block has the slots of some tokens (16), for all layers. It is in use while a page table has it.",
};

/** An element that says what a word means. */
function explain(element, word) {
  if (GLOSSARY[word]) element.title = GLOSSARY[word];
}

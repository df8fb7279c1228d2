// What words mean: hover or focus says it, and a list at the end of the page has them all.

const GLOSSARY = {
  "accepted": "A draft that was right: the model would have drawn that token itself. Its keys and values stay.",
  "admitted": "A waiting request gets blocks and runs. What is found of its prompt needn't be computed.",
  "answer": "The tokens that the model drew, after those of the prompt.",
  "beam": "A beginning that a search keeps, with the likeliest others. Beams part and end, and share blocks as samples do.",
  "block": "Slots for some tokens in a row (16, unless set otherwise), for the keys and values of all layers. Also called page.",
  "blocks in use": "Blocks that stand in at least one page table.",
  "budget": "The most tokens that a step may compute, of all sequences together.",
  "cached": "Nobody holds the block, but what it holds can still be found. It is given away when no empty one is left.",
  "chunk": "The part of a prompt that one step computes. A long prompt is cut, so that the others needn't wait for all of it.",
  "computed": "A token whose keys and values are stored. The newest token of a sequence is computed in the next step.",
  "copied on write": "Blocks that were copied because somebody was going to write into them while others held them too.",
  "copy-on-write": "A block that others hold too is copied before it is written: the writer goes on in the copy.",
  "CPU pool": "Blocks in the CPU's memory, for requests that are swapped out.",
  "decode": "Computing a sequence's newest token, which gives the next one: one token a step, without drafts.",
  "draft": "A guess of the next tokens. One step checks them all: those that are right are accepted.",
  "drawn": "Chosen as the next token. Its keys and values are not there yet.",
  "evicted": "A cached block was given to somebody else: what it held can't be found any more.",
  "finished": "The request has its answer: ended by itself (stop), cut at the most tokens (length), or given up (abort).",
  "fork": "A new sequence begins with all blocks of another one. Nothing is copied.",
  "free": "Nobody holds the block, and nothing in it can be found.",
  "hash chain": "How a block is found: by a hash of its tokens and of the block before it, and so of all tokens before.",
  "held": "In a page table. A block is held by as many sequences as have it in theirs.",
  "idle": "Found in the index, but in nobody's page table: cached.",
  "page table": "Which block of the pool each block of a sequence is: logical block -> physical block. Also called block table.",
  "poisoned": "Freed memory that was filled with NaN (with --debug), so that whoever reads it by mistake is found out.",
  "pool": "All blocks: memory that is cut once, at the start.",
  "preempted": "Memory was full, and the request gave up its blocks. It comes back later: by swap, or by recompute.",
  "prefill": "Computing the tokens of a prompt, many in one step.",
  "prefix cache": "Blocks that can be found by their tokens and all tokens before, for whoever begins in the same way.",
  "prefix hit": "A prompt begins as another did: the blocks of that beginning are found, held once more, and not computed again.",
  "prompt": "The tokens that a request came with.",
  "radix tree": "What can be found, as a tree: a node is a run of blocks, and it branches where sequences part.",
  "recompute": "A preempted request drops its blocks. When it comes back, its tokens are computed again.",
  "request": "One prompt with all its sequences: samples or beams. A, B, C in the order of arrival; A1, A2 are sequences of A.",
  "reservation": "Slots that are kept for tokens which may come. Contiguous memory reserves the longest possible text.",
  "running": "Has blocks, and is computed in each step, as far as the budget goes.",
  "salt": "Whose tokens they are: what was computed under one salt isn't found under another.",
  "saved by sharing": "Blocks that would be needed besides, if each sequence had its own copy of what it shares.",
  "sequence": "One stream of tokens: a prompt and one answer.",
  "shared": "Held by several sequences: the same tokens from the beginning on, stored once.",
  "slot": "One token's place in a block. Its number is block * block size + offset.",
  "step": "One run of the model over some tokens of some sequences. Between two steps requests come and go.",
  "swap": "A preempted request's blocks are copied to the CPU pool, and later back.",
  "swapped in": "Blocks that were copied back from the CPU pool.",
  "swapped out": "In the CPU pool: the request waits until there is room for it again.",
  "taken back": "A draft that was wrong: its slots are empty again.",
  "tokens found": "Tokens of prompts that were found, and not computed again.",
  "tokens in the step": "Tokens that the step computed, of all sequences together.",
  "tokens stored": "Tokens whose keys and values are in blocks in use; what is shared counts once.",
  "waiting": "Has no blocks yet, or none any more. Who came first is admitted first, unless set otherwise.",
  "waste": "The share of slots that are empty, in blocks that are in use.",
  "watermark": "Blocks that are kept free when a request is admitted, so that the others can grow.",
};

const ALSO = { // other words for the same
  blocks: "block", "page tables": "page table", slots: "slot", preemptions: "preempted", "copy on write": "copy-on-write",
  evictions: "evicted", swapped: "swapped out", found: "prefix hit", drafts: "draft", chunks: "chunk", requests: "request",
  tokens: "tokens stored", freed: "free",
  "swap out": "swapped out", "swap in": "swapped in", reserved: "reservation", "the pool": "pool", resumed: "swapped in", guess: "draft",
};

const meaningOf = (word) => [word, ALSO[word]].find((one) => Object.hasOwn(GLOSSARY, one));
const idOf = (word) => `meaning-${word.replace(/[^a-zA-Z]+/g, "-")}`;

/** All words as a list: in #words where a page has it; else unseen, for screen readers. Who is explained refers to it. */
function makeWords() {
  if (document.getElementById("meanings")) return;
  const list = make("dl");
  list.id = "meanings";
  for (const [word, meaning] of Object.entries(GLOSSARY)) {
    const told = make("dd", "", meaning);
    told.id = idOf(word);
    list.append(make("div", "", "", make("dt", "", word), told));
  }
  const place = $("words") ?? document.body;
  list.hidden = place === document.body;
  place.append(list);
}

/** An element that says what a word means, to the mouse, the keyboard and screen readers. */
function explain(element, word) {
  const known = meaningOf(word);
  if (!known) return;
  makeWords();
  element.classList.add("word");
  element.setAttribute("aria-describedby", idOf(known));
  if (element.tabIndex < 0 && !element.matches("button, a, input, select")) element.tabIndex = 0;
  for (const kind of ["pointerenter", "focus"]) element.addEventListener(kind, () => tip.show(element, GLOSSARY[known]));
  for (const kind of ["pointerleave", "blur"]) element.addEventListener(kind, () => tip.leave());
}

/** The words that an element has by now are one stop of Tab; arrow keys go from one to the next. */
function walkWords(element) {
  const words = () => [...element.querySelectorAll(".word")];
  words().forEach((word, number) => { word.tabIndex = number ? -1 : 0; });
  element.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key], all = words(), at = all.indexOf(event.target);
    if (!by || at < 0 || isForBrowser(event)) return;
    event.preventDefault();
    all[(at + by + all.length) % all.length].focus();
  });
  element.addEventListener("focusin", (event) => {
    if (event.target.matches(".word")) for (const word of words()) word.tabIndex = word === event.target ? 0 : -1;
  });
}

/** The one tip of the page. It stays while the pointer is on it or on its word, and Escape closes it (WCAG 1.4.13). */
const tip = {
  element: null, owner: null, timer: 0,

  show(owner, text) {
    clearTimeout(this.timer);
    this.make();
    this.owner = owner;
    this.element.textContent = text;
    this.element.hidden = false;
    this.place();
  },

  make() {
    if (this.element) return;
    this.element = make("div", "word-tip");
    this.element.setAttribute("role", "tooltip");
    this.element.hidden = true;
    this.element.addEventListener("pointerleave", () => this.leave());
    document.body.append(this.element);
    document.addEventListener("keydown", (event) => this.close(event), true);
    addEventListener("scroll", () => (this.owner?.isConnected ? this.place() : this.hide()), { capture: true, passive: true });
  },

  /** Under its word, or above it where there is no room; never outside of the window. */
  place() {
    const word = this.owner.getBoundingClientRect(), own = this.element.getBoundingClientRect();
    const left = Math.max(8, Math.min(word.left, document.documentElement.clientWidth - own.width - 8));
    const below = word.bottom + 3 + own.height < innerHeight || word.top < own.height + 3;
    this.element.style.setProperty("left", `${left}px`);
    this.element.style.setProperty("top", `${below ? word.bottom + 3 : word.top - own.height - 3}px`);
  },

  /** Not at once: the pointer may be on its way from the word to the tip. What has the focus keeps its tip. */
  leave() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => { if (document.activeElement !== this.owner && !this.element.matches(":hover")) this.hide(); }, 150);
  },

  hide() {
    clearTimeout(this.timer);
    this.element.hidden = true;
    this.owner = null;
  },

  close(event) {
    if (event.key !== "Escape" || this.element.hidden) return;
    event.preventDefault();
    event.stopPropagation();
    this.hide();
  },
};

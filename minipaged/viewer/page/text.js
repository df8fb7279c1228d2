// The tokens of the request that stands out, as text, block by block; of several sequences first what all of them share.

const MOST_SEQUENCES = 16; // whose texts are shown
const NEAR = { first: 2, around: 3, last: 8 }; // blocks of a long text that are shown: at both ends, and where it is computed
const TOKEN_SIGNS = { // what is told of a token, and the word that explains it
  found: ["found in the cache", "prefix hit"], now: ["computed in this step", "computed"], todo: ["not computed yet", "computed"],
  drawn: ["drawn in this step", "drawn"], right: ["a draft that was accepted", "accepted"],
};

class TextPart {
  constructor(view, element) {
    Object.assign(this, { view, element, stretches: new Map() });
    this.told = make("p", "small");
    this.body = make("div", "stretches");
    this.body.tabIndex = 0;
    this.body.setAttribute("role", "region");
    this.body.setAttribute("aria-label", "Text; left and right go from block to block");
    pointing(view, this.body, isOnCpu);
    this.body.addEventListener("keydown", (event) => this.move(event));
    element.append(this.told, this.body, this.legend());
  }

  legend() {
    const legend = make("p", "legend signs");
    for (const [sign, [words, word]] of Object.entries(TOKEN_SIGNS)) {
      const told = make("span", "", words);
      explain(told, word);
      legend.append(make("span", "", "", make("span", `token ${sign}`, "token"), told));
    }
    walkWords(legend);
    return legend;
  }

  update(moment) {
    this.past ??= moment.trace ? textPastOf(moment.trace) : null;
    const request = this.view.picked || this.past?.standIn(moment), known = request && this.past;
    const sequences = known ? sequencesOf(moment, this.past, request).slice(0, MOST_SEQUENCES + 1) : [];
    const more = sequences.length > MOST_SEQUENCES ? " Only the first sequences are shown." : "";
    setText(this.told, this.inWords(moment, request, sequences) + more);
    this.element.querySelector(".signs").hidden = this.body.hidden = !sequences.length;
    arrange(this.body, stretchesOf(sequences.slice(0, MOST_SEQUENCES), moment).map((one) => this.draw(one)));
    for (const [key, { element }] of this.stretches) if (!element.parentNode) this.stretches.delete(key);
  }

  /** The line above the text. */
  inWords({ state, place, header }, request, sequences) {
    if (!request) return "Nobody is there.";
    const hint = this.view.picked ? "" : " No request is picked: choose one among those that run, in the timeline, or by search.";
    const ended = this.past?.endOf(request, place), there = state.requests[request];
    if (!sequences.length) {
      if (!there && !ended) return `${request} hasn't come yet.`;
      return header?.version === 1 || !this.past?.any ? "This trace has no texts." : `Of ${request} no text is known.${hint}`;
    }
    if (!there) return `${request} has ended${ended?.reason ? ` (${ended.reason})` : ""}.${hint}`;
    return `${request} ${{ running: "runs", waiting: "waits", swapped: "is swapped out" }[there.state]}.${hint}`;
  }

  /** An element for a stretch of text, of which only those blocks are new that look other than before. */
  draw({ key, names, words, blocks }) {
    const stretch = this.stretches.get(key) ?? this.newStretch(key, names);
    setText(stretch.words, words);
    const children = [], kept = new Map();
    let left = 0;
    for (const block of [...blocks, null]) {
      if (block?.folded) left += block.folded;
      else if (left) children.push(stretch.fold(left, children.length)), left = 0;
      if (!block || block.folded) continue;
      block.here = this.view.isHere(block.number, block.swapped);
      const { at, number, here: isHere, shared, signs, tokens } = block, before = stretch.blocks.get(at);
      const look = `${number}|${isHere}|${shared}|${signs.join()}|${tokens.join("\n")}`;
      const shown = before?.look === look ? before : { look, element: blockOfText(block) };
      kept.set(at, shown);
      children.push(shown.element);
    }
    stretch.blocks = kept;
    arrange(stretch.text, children);
    return stretch.element;
  }

  newStretch(key, names) {
    const words = make("span", "small"), text = make("p", "tokens"), folds = [];
    text.dir = "auto";
    const element = make("div", key ? "stretch" : "stretch common", "", make("p", "head", "", ...names.map(chip), words), text);
    const fold = (tokens, at) => {
      folds[at] ??= make("span", "fold small");
      setText(folds[at], `… ${count(tokens, "token")} …`);
      return folds[at];
    };
    const stretch = { element, words, text, fold, blocks: new Map() };
    this.stretches.set(key, stretch);
    return stretch;
  }

  move(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key], all = [...this.body.querySelectorAll("[data-block]")];
    if (!by || !all.length || isForBrowser(event)) return;
    event.preventDefault();
    event.stopPropagation();
    const same = all[this.at]?.classList.contains("here"), at = same ? this.at : all.findIndex((one) => one.classList.contains("here"));
    this.at = Math.max(0, Math.min(all.length - 1, at < 0 ? (by > 0 ? 0 : all.length - 1) : at + by));
    this.view.keep(Number(all[this.at].dataset.block), isOnCpu(all[this.at]));
    this.body.querySelectorAll("[data-block]")[this.at]?.scrollIntoView({ block: "nearest" });
  }
}

const isOnCpu = (element) => element.classList.contains("swapped");

function blockOfText({ number, at, here, shared, swapped, tokens, signs }) {
  const element = make("span", ["page", here && "here", shared && "shared", swapped && "swapped"].filter(Boolean).join(" "));
  if (number >= 0) element.dataset.block = number;
  const mark = make("span", "number", number >= 0 ? String(number) : "");
  mark.setAttribute("role", "img");
  mark.setAttribute("aria-label", `its block ${at}${number >= 0 ? ` is ${swapped ? "CPU block" : "block"} ${number}` : ""}: `);
  element.append(mark, ...tokens.flatMap((text, i) => tokenOf(text, signs[i])));
  return element;
}

/** A token as an element; one that ends a line has a break behind it. */
function tokenOf(text, sign) {
  const special = /^<[|｜/]?[^<>\s]{1,40}>$/u.test(text) && text.length > 3, blank = text !== "" && text.trim() === "";
  const shown = readable(text.length > 200 ? `${text.slice(0, 200)}…` : text), broken = text.includes("\ufffd");
  const classes = ["token", sign, special && "special", (blank || broken) && "quiet"].filter(Boolean).join(" ");
  const element = make("span", classes, text === "" ? "∅" : blank ? shown.replaceAll(" ", "␣") : shown);
  if (broken) element.title = "A piece of a sign: this token has not all of its bytes";
  return text.includes("\n") ? [element, make("br")] : [element];
}

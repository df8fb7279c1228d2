// What a request did, as shapes in a lane, and in words. A kind has its height, its pattern and its letter: never colour alone.

const LANE = 20; // pixels

const bar = (top, high) => (x, wide) => `M${x} ${top}h${wide}v${high}h${-wide}z`;
const KINDS = { // letter -> what it is called, its shape from x on
  W: { word: "waiting", shape: (x, wide) => `M${x} 10h${wide}` },
  P: { word: "prefill", shape: bar(2, 16) },
  D: { word: "decode", shape: bar(5, 10) },
  R: { word: "recompute", shape: bar(2, 16) },
  S: { word: "swapped out", shape: bar(5, 10) },
  I: { word: "running, without tokens in a step", shape: (x, wide) => `M${x} 10h${wide}` },
  X: { word: "running", shape: bar(5, 10) },
};
const MARKS = { // what happened at a moment
  found: { word: "prefix hit", shape: (x) => `M${x} 5l5 5l-5 5l-5 -5z` },
  swap: { word: "preempted: swapped out", shape: (x) => `M${x - 5} 2h10l-5 9z` },
  resumed: { word: "swapped in again", shape: (x) => `M${x - 5} 18h10l-5 -9z` },
  recompute: { word: "preempted: recompute", shape: (x) => `M${x - 5} 7l2 -2 3 3 3 -3 2 2 -3 3 3 3 -2 2 -3 -3 -3 3 -2 -2 3 -3z` },
  accepted: { word: "drafts accepted", shape: (x, right) => `M${x} 5v${-Math.min(5, 1 + right)}` },
  end: { word: "finished", shape: (x) => `M${x} 3v14` },
  error: { word: "error", shape: (x) => `M${x} 3v9m0 2v3` },
};
const GOES_ON = new Set(["W", "S", "I"]); // also while the engine rests

const rounded = (x) => Math.round(10 * x) / 10;

/** Where a span begins and ends on the axis. */
function endsOf(span, past) {
  const from = axis.mode === "time" ? span.since ?? past.begin[span.from] : span.from;
  const untilNext = GOES_ON.has(span.kind) && span.to < past.length, to = untilNext ? axis.from(past, span.to) : axis.to(past, span.to - 1);
  return [from, Math.max(from, to)];
}

/** The pieces that are drawn of a span: nothing is computed while the engine rests. */
function piecesOf(span, past) {
  const [from, to] = endsOf(span, past);
  if (GOES_ON.has(span.kind) || axis.mode === "step") return [[from, to]];
  const cuts = past.gaps.filter((place) => place > span.from && place < span.to);
  return [span.from, ...cuts].map((place, i) => [past.begin[place], i < cuts.length ? past.end[cuts[i] - 1] : to]);
}

/** A lane's elements. scale: pixels of a step or a second. */
function drawLane(lane, past, scale) {
  const shapes = {}, letters = [];
  for (const span of lane.spans) {
    const pieces = piecesOf(span, past);
    for (const [from, to] of pieces) {
      const x = rounded(from * scale), wide = rounded((to - from) * scale), chunk = span.kind === "P" || span.kind === "R";
      if (to <= from) continue;
      shapes[span.kind] = (shapes[span.kind] ?? "") + KINDS[span.kind].shape(x, Math.max(1, chunk && wide > 4 ? wide - 1.5 : wide));
      letters.push(...letterOf(span.kind, pieces.length > 1 ? 0 : span.tokens, x, wide));
    }
  }
  for (const { kind, place } of lane.marks) {
    const x = rounded(scale * (kind === "end" ? axis.to(past, place) : axis.from(past, place)));
    shapes[kind] = (shapes[kind] ?? "") + MARKS[kind].shape(kind === "end" ? x - 1 : x);
  }
  for (const { place, right } of lane.accepted) {
    const middle = rounded(scale * (axis.from(past, place) + axis.to(past, place)) / 2);
    shapes.accepted = (shapes.accepted ?? "") + MARKS.accepted.shape(middle, right);
  }
  const order = [...Object.keys(KINDS), ...Object.keys(MARKS)].filter((kind) => shapes[kind]);
  const over = order.filter(hasPattern).map((kind) => patterned(kind, shapes[kind]));
  return [...order.map((kind) => drawn("path", { d: shapes[kind], class: `kind-${kind}` })), ...over, ...letters];
}

const hasPattern = (kind) => kind === "R" || kind === "S";
const hasLetter = (kind) => "WPDRS".includes(kind);
const patterned = (kind, d) => drawn("path", { d, class: `pattern-${kind}` });

/** Stripes for what is computed again, dots for what is on the CPU. */
function patterns() {
  if ($("pattern-R")) return drawn("defs");
  const pattern = (id, ...children) => drawn("pattern", { id, width: 6, height: 6, patternUnits: "userSpaceOnUse" }, ...children);
  return drawn("defs", {}, pattern("pattern-R", drawn("path", { d: "M-1 7L7 -1M-4 4L4 -4M2 10L10 2", class: "stripe" })),
    pattern("pattern-S", drawn("circle", { cx: 3, cy: 3, r: 1, class: "dot" })));
}

/** The letter of a bar, and how many tokens it was, where there is room. */
function letterOf(kind, tokens, x, wide) {
  const text = [tokens > 0 ? `${kind} ${tokens}` : kind, kind].find((one) => one.length * 6.2 + 6 < wide);
  if (!text || !hasLetter(kind)) return [];
  const element = drawn("text", { x: rounded(x + wide / 2), y: 10, class: `letter letter-${kind}` });
  element.textContent = text;
  return [element];
}

// --- in words -------------------------------------------------------------------------------------------------------------

const secondsOf = (number) => number.toFixed(number < 1 ? 3 : 2);

/** From when to when, as the axis has it. */
function whenOf(span, past) {
  if (axis.mode === "time") return `${endsOf(span, past).map(secondsOf).join(" to ")} s`;
  const steps = [span.from, span.to - 1].map((place) => past.trace.lines[place].step);
  return steps[0] === steps[1] ? `step ${steps[0]}` : `steps ${steps.join(" to ")}`;
}

/** All that a request did, in a sentence. */
function laneInWords(lane, past) {
  const told = [], { spans } = lane;
  for (let i = 0; i < spans.length; i++) {
    const { kind } = spans[i], first = i, [from, to] = endsOf(spans[i], past);
    if (to <= from) continue;
    while (kind === spans[i + 1]?.kind) i++; // chunks, one after the other
    const tokens = spans.slice(first, i + 1).reduce((sum, span) => sum + (span.tokens ?? 0), 0), chunks = i + 1 - first;
    const what = tokens ? ` ${count(tokens, "token")}${chunks > 1 ? ` in ${chunks} chunks` : ""}` : "";
    told.push(`${KINDS[kind].word}${what}, ${whenOf({ ...spans[first], to: spans[i].to }, past)}`);
  }
  const marks = lane.marks.filter(({ kind }) => kind !== "end").map((mark) => markInWords(mark, lane));
  if (lane.guessed) marks.push(`${lane.right} of ${lane.guessed} drafts accepted`);
  return `${lane.name}: ${[...told, ...marks, endInWords(lane)].filter(Boolean).join("; ")}`;
}

const markInWords = ({ kind, words }, lane) => (kind === "end" ? endInWords(lane) : words || MARKS[kind].word);

function endInWords({ reason, told }) {
  return reason === null ? "" : reason ? `finished: ${reason}` : told ? "finished" : "ended before it was finished";
}

/** What a request did at a step: a line for each thing. */
function stepInWords(lane, past, place) {
  const span = lane.spans.find(({ from, to }) => from <= place && place < to), { lines } = past.trace;
  const when = past.hasTimes ? `, ${secondsOf(past.begin[place])} to ${secondsOf(past.end[place])} s` : "";
  const told = [`${lane.name} in step ${lines[place].step}${when}`];
  if (span) told.push(spanInWords(span, lane, past));
  else told.push(place < lane.place ? "not there yet" : endInWords(lane));
  for (const mark of lane.marks) if (mark.place === place) told.push(markInWords(mark, lane));
  for (const one of lane.accepted) if (one.place === place) told.push(`${one.right} of ${one.guessed} drafts accepted`);
  return told;
}

function spanInWords(span, lane, past) {
  const { kind, start, tokens } = span, word = KINDS[kind].word, when = whenOf(span, past);
  const prompt = lane.prompt ? `, of a prompt of ${lane.prompt}` : "";
  if (kind === "P" || kind === "R") return `${word}: ${count(tokens, "token")}, from ${start} on${prompt}`;
  return tokens ? `${word}: ${count(tokens, "token")}, ${when}` : `${word}, ${when}`;
}

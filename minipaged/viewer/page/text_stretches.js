// What text.js shows: which sequences, and for each of their blocks its tokens, and what is told of each token.

/** What a trace says of requests beyond their moment: who had which names, prompts, how much was found, and how they ended. */
function textPastOf(trace) {
  const names = new Map(), prompts = new Map(), admitted = new Map(), ended = [];
  for (const name of [...trace.words.keys()].sort(inOrder)) names.set(requestOf(name), [...names.get(requestOf(name)) ?? [], name]);
  trace.lines.forEach(({ patch, did = {} }, place) => {
    for (const [name, request] of Object.entries(patch.requests ?? {})) {
      if (request?.prompt !== undefined) prompts.set(name, request.prompt);
    }
    for (const name of did.admitted ?? []) admitted.set(name, [...admitted.get(name) ?? [], { place, tokens: did.found?.[name] ?? 0 }]);
    for (const [name, reason] of Object.entries(did.finished ?? {})) ended.push({ place, name, reason });
  });
  const endOf = (name, place) => ended.find((one) => one.name === name && one.place <= place);
  /** Whose text is shown if nobody is picked: who runs, is there, or ended last. */
  const standIn = ({ state, place }) => {
    const there = Object.keys(state.requests).sort(inOrder), first = (which) => there.find((name) => state.requests[name].state === which);
    return first("running") ?? first("swapped") ?? first("waiting") ?? lastOf(ended, place)?.name ?? "";
  };
  return { any: names.size > 0, names, prompts, admitted, endOf, standIn };
}

/** The sequences of a request whose texts are known: those that live first. */
function sequencesOf({ state, did, line, place, wordsOf }, past, request) {
  const names = past.names.get(request) ?? [], there = state.requests[request], anyTable = names.some((name) => state.tables[name]);
  const found = lastOf(past.admitted.get(request), place)?.tokens ?? 0;
  const sequences = names.map((name) => {
    const table = state.tables[name], tokens = wordsOf(name), start = did.computed?.[name]?.[0];
    const now = start === undefined ? [0, 0] : [start, start + did.computed[name][1] + did.computed[name][2]];
    return {
      name, table, tokens, now, found, prompt: past.prompts.get(request), guessed: did.guessed?.[name],
      ended: !there || (anyTable && !table), computed: table ? table.tokens : there && !anyTable ? 0 : Infinity,
      drawn: drawnFrom(line.words?.[name], tokens),
    };
  });
  return sequences.filter((one) => one.tokens).sort((a, b) => a.ended - b.ended);
}

/** From which token on they are new in this step. */
function drawnFrom(news, tokens) {
  return news && tokens ? tokens.length - news.add.length : Infinity;
}

/** Stretches of text: what all sequences begin with, in whole blocks that are the same for all, and what each has on its own. */
function stretchesOf(sequences, moment) {
  const size = moment.state.usage.block_size, common = sequences.length > 1 ? alike(sequences, size) : 0, held = heldIn(moment);
  const stretches = common ? [{ key: "", names: sequences.slice(0, 6).map((one) => one.name), from: 0, to: common, of: sequences[0] }] : [];
  const all = sequences.length > 6 ? ` (all ${sequences.length})` : "";
  if (common) stretches[0].words = `begin with the same ${count(common * size, "token")}${all}`;
  for (const one of sequences) {
    const { name } = one, to = Math.ceil(one.tokens.length / size);
    stretches.push({ key: name, names: [name], words: inNumbers(one), from: common, to, of: one });
  }
  return stretches.map((stretch) => ({ ...stretch, blocks: textBlocksOf(stretch, size, held) }));
}

/** Blocks in which all have the same tokens; of those with a page table, also in the same place. */
function alike(sequences, size) {
  const [first, ...others] = sequences, shortest = Math.min(...sequences.map((one) => one.tokens.length));
  let tokens = 0;
  while (tokens < shortest && others.every((one) => one.tokens[tokens] === first.tokens[tokens])) tokens++;
  const tables = sequences.filter((one) => one.table).map((one) => one.table);
  const isElsewhere = (table, block, at) => table.blocks[at] !== block || Boolean(table.swapped) !== Boolean(tables[0].swapped);
  const apart = tables[0]?.blocks.findIndex((block, at) => tables.some((table) => isElsewhere(table, block, at)));
  return Math.min(Math.floor(tokens / size), apart >= 0 ? apart : Infinity);
}

function inNumbers({ tokens, prompt, computed, table, ended, guessed }) {
  const ofPrompt = Math.min(prompt, tokens.length), ofAnswer = tokens.length - ofPrompt;
  const answer = prompt === undefined ? "" : `, ${grouped(ofPrompt)} of prompt and ${grouped(ofAnswer)} of answer`;
  const guesses = guessed ? `; ${guessed[0]} guessed in this step, ${guessed[1]} accepted, ${guessed[2]} slots taken back` : "";
  const where = ended ? "; ended" : `; ${grouped(Math.min(computed, tokens.length))} computed${table?.swapped ? ", on the CPU" : ""}`;
  return `${count(tokens.length, "token")}${answer}${where}${guesses}`;
}

/** {at, number: of the block of the pool or -1, tokens, signs}; of a long text, far from its ends and from what is
 *  computed: {folded: how many tokens}. */
function textBlocksOf({ from, to, of }, size, held) {
  const blocks = [], around = Math.floor(Math.min(of.computed, of.tokens.length) / size), swapped = Boolean(of.table?.swapped);
  for (let at = from; at < to; at++) {
    if (to - from > 24 && at >= from + NEAR.first && at < to - NEAR.last && Math.abs(at - around) > NEAR.around) {
      blocks.push({ folded: Math.min(size, of.tokens.length - at * size) });
      continue;
    }
    const tokens = of.tokens.slice(at * size, (at + 1) * size), number = of.table?.blocks[at] ?? -1;
    const signs = tokens.map((_, i) => signOf(of, at * size + i));
    blocks.push({ at, number, swapped, tokens, signs, shared: !swapped && held.get(number)?.names.length > 1 });
  }
  return blocks;
}

/** What is told of a token, as classes. Of what is new in the step, the last was drawn by the model, the others were drafts. */
function signOf({ prompt, found, now, drawn, computed, guessed, tokens, ended }, position) {
  const answer = position >= prompt, fresh = answer && position >= drawn, accepted = guessed?.[1] ?? 0;
  const draft = fresh && accepted === tokens.length - drawn - 1 && position < tokens.length - 1;
  const state = position >= computed ? "todo" : position >= now[0] && position < now[1] ? "now" : position < found && !ended ? "found" : "";
  return [position === prompt && "begins", answer && "answer", draft ? "right" : fresh && "drawn", state].filter(Boolean).join(" ");
}

// --- the chat ---------------------------------------------------------------------------------------------------------

const TAB = random(4); // by it the live state says which requests are this tab's
let numTurns = 0;
let turns = []; // {asked, answers: [{text, ...elements}], chosen, failed, ...}
let controller = null; // of the answer that is growing

const welcome = $("welcome");
$("composer").onsubmit = (event) => { event.preventDefault(); send(); };
$("say").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
};
document.addEventListener("keydown", (event) => {
  const looks = event.defaultPrevented || event.target.closest(".pool, .tables, .index"); // there it ends the look at a block
  if (event.key === "Escape" && !looks && !$("ask-key").open) controller?.abort();
});
$("stop").onclick = () => controller?.abort();
$("new").onclick = () => { controller?.abort(); turns = []; $("turns").replaceChildren(welcome); $("say").focus(); };
$("beams").onchange = () => {
  $("n-name").textContent = $("beams").checked ? "beams" : "samples";
  $("temperature").disabled = $("beams").checked;
  if ($("beams").checked && number("n", 1) < 2) $("n").value = 4;
};
for (const button of welcome.querySelectorAll("button")) {
  button.onclick = () => {
    $("n").value = button.dataset.n;
    $("beams").checked = "beams" in button.dataset;
    $("beams").onchange();
    $("say").value = button.textContent.replace(/^\w+ (samples|beams): /, "");
    send();
  };
}

function number(id, otherwise) {
  const value = $(id).valueAsNumber;
  return Number.isNaN(value) ? otherwise : value;
}

function asRequest(turn) {
  const before = turns.filter((one) => one !== turn && one.answers[one.chosen]?.text);
  const messages = before.flatMap((one) => [
    { role: "user", content: one.asked }, { role: "assistant", content: one.answers[one.chosen].text },
  ]);
  const how = $("beams").checked
    ? { use_beam_search: true, beam_width: turn.n }
    : { temperature: number("temperature", 0.7) };
  return {
    messages: [...messages, { role: "user", content: turn.asked }], n: turn.n, max_tokens: number("max-tokens", 200), ...how,
    request_id: `page-${turn.tag}-${random(8)}`, stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
}

async function send() {
  const asked = $("say").value.trim();
  if (!asked || controller) return;
  const turn = newTurn(asked);
  const body = asRequest(turn);
  $("say").value = "";
  controller = new AbortController();
  busy(true);
  try {
    const response = await ask("/v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal: controller.signal });
    for await (const data of eventsOf(response)) if (data !== "[DONE]") grow(turn, JSON.parse(data));
    if (turn.answers.some((answer) => !answer.ended)) throw new Error(BROKE_OFF);
  } catch (error) {
    if (error.name === "AbortError") turn.answers.forEach((answer) => end(turn, answer, "stopped"));
    else fail(turn, error.message);
  }
  turn.over = true;
  tellFacts(turn);
  controller = null;
  busy(false);
}

function busy(yes) {
  $("send").hidden = yes;
  $("stop").hidden = !yes;
  if (!yes && matchMedia("(hover: hover)").matches) $("say").focus(); // on a phone that would bring up the keyboard
}

function newTurn(asked) {
  const turn = {
    asked, n: number("n", 1), beams: $("beams").checked, answers: [], chosen: 0, began: performance.now(), first: null,
    usage: null, over: false, name: "", tag: `${TAB}-${++numTurns}`,
  };
  turn.box = make("div", "answers");
  turn.facts = make("p", "small facts");
  turn.element = make("article", "turn", "", make("p", "asked", asked), turn.box, turn.facts);
  turn.element.setAttribute("aria-busy", "true");
  for (let index = 0; index < Math.min(Math.max(turn.n, 1), 1000); index++) turn.answers.push(newAnswer(turn, index));
  welcome.remove();
  turns.push(turn);
  $("turns").append(turn.element);
  $("turns").scrollTop = $("turns").scrollHeight;
  tellFacts(turn);
  return turn;
}

function newAnswer(turn, index) {
  const answer = { text: "", ended: false, chip: make("span", "chip mine"), note: make("span"), words: make("p", "text growing") };
  answer.chip.hidden = true;
  const head = make("div", "head", "", answer.chip, answer.note);
  answer.element = make("div", "answer", "", head, answer.words);
  if (turn.n > 1) {
    const choose = make("input");
    choose.type = "radio";
    choose.name = turn.tag;
    choose.checked = index === 0;
    choose.onchange = () => { turn.chosen = index; showChosen(turn); };
    head.append(make("label", "", "", choose, "go on with it"));
    answer.element.classList.toggle("chosen", index === 0);
  }
  turn.box.append(answer.element);
  return answer;
}

function showChosen(turn) {
  turn.answers.forEach((answer, index) => answer.element.classList.toggle("chosen", index === turn.chosen));
}

/** A chunk came. */
function grow(turn, chunk) {
  const atEnd = $("turns").scrollHeight - $("turns").scrollTop - $("turns").clientHeight < 40;
  if (chunk.error) throw new Error(chunk.error.message);
  if (chunk.usage) turn.usage = chunk.usage;
  for (const choice of chunk.choices) {
    const answer = turn.answers[choice.index];
    if (choice.delta?.content) {
      turn.first ??= performance.now();
      answer.text += choice.delta.content;
      answer.words.textContent = answer.text;
    }
    if (choice.error) fail(turn, choice.error.message);
    if (choice.finish_reason) end(turn, answer, { length: "cut at max tokens", abort: "stopped" }[choice.finish_reason] ?? "");
  }
  turn.last = performance.now();
  tellFacts(turn);
  if (atEnd) $("turns").scrollTop = $("turns").scrollHeight;
}

function end(turn, answer, note) {
  if (answer.ended) return;
  answer.ended = true;
  answer.note.textContent = note;
  answer.words.classList.remove("growing");
}

function fail(turn, message) {
  turn.answers.forEach((answer) => { end(turn, answer, ""); answer.element.hidden = !answer.text; });
  const line = make("p", "wrong", message);
  line.setAttribute("role", "alert");
  turn.element.insertBefore(line, turn.facts);
  if (!turn.answers.some((answer) => answer.text) && !$("say").value) $("say").value = turn.asked;
}

/** The line below an answer: what it took. */
function tellFacts(turn) {
  const facts = [], now = turn.over ? (turn.last ?? turn.began) : performance.now(), tokens = turn.usage?.completion_tokens;
  if (!turn.over && doing(turn)) facts.push(doing(turn));
  if (tokens) facts.push(count(tokens, "token"));
  if (turn.first !== null) facts.push(`first after ${((turn.first - turn.began) / 1000).toFixed(2)} s`);
  const rate = 1000 * (tokens - turn.n) / (now - turn.first); // of those after the first of each answer
  if (tokens > turn.n && now > turn.first && !turn.beams) facts.push(`${rate.toFixed(1)} tokens/s`);
  const cached = turn.usage?.prompt_tokens_details?.cached_tokens;
  if (turn.usage) facts.push(`${cached ?? 0} of ${turn.usage.prompt_tokens} prompt tokens cached`);
  turn.facts.textContent = facts.join(" · ");
  turn.element.setAttribute("aria-busy", String(!turn.over));
}

function doing(turn) {
  const request = Object.values(state.requests ?? {}).find((one) => one.page === turn.tag);
  if (request?.state === "waiting") return request.output ? "dropped to make room: waits to be computed again" : "waits for its turn";
  if (request?.state === "swapped") return "swapped out: others need its blocks";
  if (turn.first !== null) return "";
  return turn.beams ? "the beams are told at their end" : "its prompt is being computed";
}

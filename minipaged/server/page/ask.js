// This page's own script: asking the server, the chat, numbers, and following the state, which the parts before it draw.

const pause = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));
const random = (bytes) => [...crypto.getRandomValues(new Uint8Array(bytes))].map((b) => b.toString(16).padStart(2, "0")).join("");

// --- asking the server ------------------------------------------------------------------------------------------------

/** fetch with the API key of this tab, which is asked for if the server wants one. An answer that isn't ok is an Error in words. */
async function ask(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem("key");
    const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      throw error.name === "AbortError" ? error : new Error("The server can't be reached.");
    }
    if (response.ok) return response;
    if (response.status !== 401) throw new Error(await reasonOf(response));
    if (sessionStorage.getItem("key") === key) await askForKey(key !== null);
    if (options.signal?.aborted) throw new DOMException("stopped", "AbortError");
  }
}

async function reasonOf(response) {
  const body = await response.json().catch(() => null);
  const seconds = response.headers.get("Retry-After");
  return (body?.error?.message ?? `The server answered ${response.status}.`) + (seconds ? ` (Try again in ${seconds} s.)` : "");
}

let keyIsComing = null; // who asks meanwhile waits for the same one
let keyMissing = false; // nobody was there to give it

function askForKey(wasWrong) {
  keyIsComing ??= new Promise((done, failed) => {
    $("key-wrong").hidden = !wasWrong;
    $("key").value = "";
    $("ask-key").onclose = () => {
      keyIsComing = null;
      if ($("ask-key").returnValue !== "use") { // Escape
        sessionStorage.removeItem("key");
        keyMissing = true;
        return failed(new Error("The server wants an API key."));
      }
      sessionStorage.setItem("key", $("key").value.trim());
      keyMissing = false;
      done();
    };
    $("ask-key").returnValue = "";
    $("ask-key").showModal();
  });
  return keyIsComing;
}

const BROKE_OFF = "The connection broke off.";

/** The data of server-sent events, as they come. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => { throw error.name === "AbortError" ? error : new Error(BROKE_OFF); });
    if (done) return;
    const events = (text + value).split("\n\n");
    text = events.pop();
    for (const event of events) if (event.startsWith("data: ")) yield event.slice(6);
  }
}

/** The live page: the newest frame with its answer, and what was answered before. */

import { ApiError, streamLive, useKey } from "./client.js";
import { element } from "./element.js";

const PAST = 20;
const AGAIN_MS = 2000;
const LOST = "Not connected; trying again …";

const part = (id) => document.getElementById(id);

const round = (value, digits = 0) => (value === null ? "–" : value.toFixed(digits));

function say(state) {
  // A screen reader says again what is set again.
  if (part("state").textContent !== state) part("state").textContent = state;
}

function show(seen) {
  part("picture").src = seen.picture;
  part("picture").hidden = false;
  part("frame").hidden = true;
  part("seen").hidden = false;
  part("question").textContent = seen.prompt;
  showAnswer(seen.answer.trim());
  const figures = {
    "kept visual tokens": `${seen.kept_tokens} of ${seen.visual_tokens}`,
    "latency, capture to answer": `${round(seen.latency_ms)} ms`,
    "median, 99 %": `${round(seen.latency_p50_ms)} ms, ${round(seen.latency_p99_ms)} ms`,
    source: `${round(seen.source_fps, 1)} frames/s`,
    answers: `${round(seen.answers_per_second, 2)} per second, ${seen.answered} in all`,
    "frames dropped": `${seen.dropped} of ${seen.received}`,
    reconnects: String(seen.reconnects),
  };
  part("figures").replaceChildren(
    ...Object.entries(figures).flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]),
  );
}

/** Put an answer in the place of the one before, which goes to the earlier ones; the same again changes nothing. */
function showAnswer(answer) {
  const before = part("answer").textContent;
  if (answer === before) return;
  part("answer").textContent = answer;
  if (!before) return;
  part("earlier").hidden = false;
  part("past").prepend(element("li", {}, before));
  while (part("past").children.length > PAST) part("past").lastChild.remove();
}

/** Show what comes until it ends; what there is to say then. */
async function watch() {
  for await (const seen of streamLive()) {
    if (seen.ended) {
      return "Watching has ended: the source is at its end, or the program was stopped. Waiting for it to begin again …";
    }
    say("Watching.");
    show(seen);
  }
  return LOST; // the way there broke off
}

let watching = false;

/** Watch for as long as the page is open, also when the program is started anew; not twice at a time. */
async function keepWatching() {
  if (watching) return;
  watching = true;
  try {
    await watchAgainAndAgain();
  } finally {
    watching = false;
  }
}

async function watchAgainAndAgain() {
  let state;
  say("Connecting …");
  for (;;) {
    try {
      state = await watch();
    } catch (error) {
      if (!(error instanceof ApiError)) console.error(error); // a fault of this page
      state = error.status ? error.message : LOST;
      if (error.status === 401) {
        say(state);
        part("door").hidden = false;
        part("key").focus();
        return;
      }
    }
    say(state);
    await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
  }
}

part("door").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(part("key").value.trim());
  part("key").value = "";
  part("door").hidden = true;
  keepWatching();
});

keepWatching();

"use strict";

// EventSource cannot send a key, so the events are read from a fetch.

const part = (id) => document.getElementById(id);
const PAST = 20;
let key = "";

const round = (value, digits = 0) => (value === null ? "–" : value.toFixed(digits));

function show(seen) {
  part("picture").src = seen.picture;
  part("picture").hidden = false;
  const old = part("answer").textContent;
  if (old && old !== seen.answer.trim()) {
    const item = document.createElement("li");
    item.textContent = old;
    part("past").prepend(item);
    while (part("past").children.length > PAST) part("past").lastChild.remove();
  }
  part("answer").textContent = seen.answer.trim();
  const numbers = {
    "kept visual tokens": `${seen.kept_tokens} of ${seen.visual_tokens}`,
    "latency, capture to answer": `${round(seen.latency_ms)} ms`,
    "median, 99 %": `${round(seen.latency_p50_ms)} ms, ${round(seen.latency_p99_ms)} ms`,
    "source": `${round(seen.source_fps, 1)} frames/s`,
    "answers": `${round(seen.answers_per_second, 2)} per second, ${seen.answered} in all`,
    "frames dropped": `${seen.dropped} of ${seen.received}`,
    "reconnects": seen.reconnects,
  };
  part("numbers").replaceChildren(...Object.entries(numbers).flatMap(([name, value]) => {
    const [term, description] = [document.createElement("dt"), document.createElement("dd")];
    [term.textContent, description.textContent] = [name, value];
    return [term, description];
  }));
}

async function watch() {
  const response = await fetch("/live/events", key ? { headers: { Authorization: `Bearer ${key}` } } : {});
  part("door").hidden = response.status !== 401;
  if (!response.ok) {
    part("state").textContent = (await response.json()).error.message;
    return response.status !== 401;
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return true;
    const events = (text + value).split("\n\n");
    text = events.pop();
    for (const one of events) {
      const seen = JSON.parse(one.slice("data: ".length));
      if (seen.ended) {
        part("state").textContent = "The source has ended.";
        return false;
      }
      part("state").textContent = seen.prompt;
      show(seen);
    }
  }
}

async function keepWatching() {
  let again = true;
  while (again) {
    try {
      again = await watch();
    } catch (error) {
      part("state").textContent = "Not connected; trying again …";
    }
    if (again) await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}

part("door").addEventListener("submit", (submitted) => {
  submitted.preventDefault();
  key = part("key").value.trim();
  keepWatching();
});
keepWatching();

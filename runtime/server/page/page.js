/** The page: a picture, questions about it, and how many of its tokens they may keep. */

import { ApiError, fetchModel, streamAnswer, useKey } from "./client.js";
import { element } from "./element.js";
import { keptCells, PictureError, PictureView, preparePicture, tokenCount } from "./picture.js";
import { takePictures } from "./sources.js";
import { Turn } from "./turn.js";

const part = (id) => document.getElementById(id);
const composer = part("composer");
const question = part("question");
const budget = part("budget");
const count = part("count");
const turns = part("turns");
const alertBox = part("alert");
const view = new PictureView(part("canvas"));

/** What `/v1/models` says of the model, once it is known. */
let model = null;
/** @type {import("./picture.js").Picture|null} */
let picture = null;
/** Completed questions and answers about the picture. */
let history = [];
/** How many pictures were given so far: one that takes long to open does not replace a later one. */
let given = 0;
/** @type {AbortController|null} Of the answer that is being written. */
let running = null;
/** @type {import("./turn.js").Run|null} Whose tokens are on the picture. */
let shown = null;
/** What to do again once a key was given. */
let afterKey = null;

// ---- the server

async function loadModel() {
  try {
    model = await fetchModel();
  } catch (error) {
    complain(error, loadModel);
    return;
  }
  quiet();
  const { visual_tokens: most, default_budget: usual, selectors } = model.flashvlm;
  part("model").textContent = model.id;
  part("of").textContent = `of ${most}`;
  for (const input of [budget, count]) {
    input.max = most;
    input.value = usual;
    input.disabled = false;
  }
  markBudget();
  part("selector").replaceChildren(...selectors.map((name) => element("option", {}, name)));
  part("selector-label").hidden = selectors.length < 2;
}

/**
 * Say what went wrong, in the server's own words where it spoke.
 *
 * @param {Error|string} problem
 * @param {() => void} [again] Offered as “Try again” where that can help; also done once an API key was given.
 */
function complain(problem, again) {
  const known = typeof problem === "string" || problem instanceof ApiError || problem instanceof PictureError;
  if (!known) console.error(problem); // a fault of this page: leave its trace where it can be found
  const words = [typeof problem === "string" ? problem : problem.message];
  if (problem.retryAfterS) words.push(`The server asks to wait ${problem.retryAfterS} s.`);
  const missingKey = problem.status === 401;
  part("key-form").hidden = !missingKey;
  afterKey = missingKey ? again : null;
  alertBox.replaceChildren(element("p", {}, words.join("\n")));
  if (again && (problem.passing ?? known)) {
    const button = element("button", { class: "button", type: "button" }, "Try again");
    button.addEventListener("click", () => {
      part("ask").focus(); // this button is about to go
      again();
    });
    alertBox.append(button);
  }
  alertBox.hidden = false;
  if (!sticks(part("dock"))) alertBox.scrollIntoView({ block: "nearest" });
  if (missingKey) part("key").focus();
}

function quiet() {
  alertBox.hidden = true;
  alertBox.replaceChildren();
  part("key-form").hidden = true;
}

part("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(part("key").value.trim());
  part("key").value = "";
  const again = afterKey;
  quiet();
  question.focus();
  // Without a model, that is what comes first: the question was never sent.
  (model ? again : loadModel)?.();
});

// ---- the picture

async function takePicture(blob, name) {
  const number = ++given;
  try {
    const { max_image_pixels: maxPixels, max_body_bytes: maxBytes } = model?.flashvlm ?? {};
    const prepared = await preparePicture(blob, name, { maxPixels, maxBytes });
    if (number !== given) {
      prepared.bitmap.close();
      return;
    }
    running?.abort();
    picture = prepared;
  } catch (error) {
    if (number === given) complain(error);
    return;
  }
  quiet();
  history = [];
  turns.replaceChildren();
  view.setPicture(picture.bitmap);
  show(null);
  part("canvas").hidden = false;
  part("invitation").hidden = true;
  part("frame").classList.add("filled");
  part("choose").textContent = "New picture";
  part("caption").textContent = picture.note;
  part("status").textContent = "";
  question.focus({ preventScroll: true });
}

/** Show what a run kept on the picture; null shows the picture alone. */
function show(run) {
  shown?.button.setAttribute("aria-pressed", "false");
  shown = run;
  shown?.button.setAttribute("aria-pressed", "true");
  const selection = run?.selection ?? null;
  view.setSelection(selection);
  const kept = selection && `${run.tokens} of ${tokenCount(selection)} visual tokens are bright, the others dimmed`;
  part("canvas").setAttribute("aria-label", `${picture.name}: ${kept ?? "the whole picture"}`);
  part("lit").hidden = !selection;
  showGrids(selection);
}

/** Several grids lie over each other: an overview and finer tiles. Let one be chosen. */
function showGrids(selection) {
  const grids = selection ? keptCells(selection) : [];
  part("grids").hidden = grids.length < 2;
  const choices = grids.map(({ rows, columns }, number) => {
    const input = element("input", { type: "radio", name: "grid", value: String(number) });
    input.checked = number === view.grid;
    return element("label", {}, input, element("span", {}, `${rows} × ${columns}`));
  });
  part("grids").replaceChildren(part("grids").querySelector("legend"), ...choices);
}

part("grids").addEventListener("change", (event) => {
  view.grid = Number(event.target.value);
});

part("lit").addEventListener("click", ({ currentTarget }) => {
  const lit = currentTarget.getAttribute("aria-pressed") !== "true";
  currentTarget.setAttribute("aria-pressed", String(lit));
  view.lit = lit;
});

takePictures(part, takePicture, complain);

// ---- the budget

function markBudget() {
  budget.style.setProperty("--part", (budget.value - 1) / Math.max(1, budget.max - 1));
}

budget.addEventListener("input", () => {
  count.value = budget.value;
  markBudget();
});

/** Take over what was typed; where that is no number, the last budget stays. */
function commitCount() {
  const typed = count.valueAsNumber;
  if (!Number.isNaN(typed)) budget.value = Math.round(typed); // a range input keeps to its limits by itself
  count.value = budget.value;
  markBudget();
}

count.addEventListener("change", commitCount);
// Letters are no value: a browser may see no change in them.
count.addEventListener("blur", commitCount);

// ---- the question

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});

question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});

part("stop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !part("camera").open) stop();
});

function stop() {
  running?.abort();
}

async function ask() {
  if (running || !canAsk()) return;
  quiet();
  const text = question.value.trim();
  const asked = picture;
  const controller = new AbortController();
  const turn = new Turn(text, part("compare").checked ? [Number(budget.value), "full"] : [Number(budget.value)]);
  for (const run of turn.runs) run.button.addEventListener("click", () => show(run === shown ? null : run));
  turns.append(turn.element);
  bringIntoSight(turn);
  show(null);
  question.value = "";
  setRunning(controller);

  let problem = null;
  const messages = conversation(text);
  try {
    // One after the other, so that neither slows the other down.
    for (const run of turn.runs) {
      await hear(run, messages, controller.signal);
      turn.showTimes();
      bringIntoSight(turn);
    }
  } catch (error) {
    problem = error;
  }
  setRunning(null);
  // Another picture may have come meanwhile, and taken the place of all of this.
  if (picture === asked) settle(turn, problem, controller.signal.aborted);
}

/** Say what is missing before anything can be asked. */
function canAsk() {
  if (!model) complain("The server has not said yet which model it runs.", loadModel);
  else if (!picture) {
    complain("Choose a picture first.");
    part("file").focus();
  } else if (!question.value.trim()) {
    complain("Type a question first.");
    question.focus();
  } else return true;
  return false;
}

function setRunning(controller) {
  running = controller;
  if (document.activeElement === part("stop")) part("ask").focus(); // it is about to go
  part("stop").hidden = !running;
  part("ask").setAttribute("aria-disabled", String(running !== null));
}

/**
 * The new question, after all that was said if it is to go on from there, with the picture where it came.
 *
 * By default each question stands alone: small models, trained on single questions, repeat an earlier answer otherwise.
 */
function conversation(text) {
  const before = part("follow").checked ? history : [];
  const messages = before.flatMap((past) => [
    { role: "user", content: past.question },
    { role: "assistant", content: past.answer },
  ]);
  messages.push({ role: "user", content: text });
  const image = { type: "image_url", image_url: { url: picture.url } };
  messages[0].content = [image, { type: "text", text: messages[0].content }];
  return messages;
}

/** Keep what was heard, and give back a question that was not answered. */
function settle(turn, problem, stopped) {
  for (const run of turn.runs) if (!run.complete) run.end(stopped ? "Stopped." : "Not answered.");
  const [first] = turn.runs;
  const heard = first.complete || (stopped && first.text !== "");
  if (heard) history.push({ question: turn.question, answer: first.text });
  else {
    if (!question.value.trim()) question.value = turn.question; // nobody types a question twice
    if (!first.text) turn.element.remove();
  }
  if (problem) part("status").textContent = stopped ? "Stopped." : "";
  if (problem && !stopped) complain(problem, heard ? undefined : ask);
  bringIntoSight(turn);
}

/** Scroll as little as is needed to see a turn between picture and form, or else its comparison. */
function bringIntoSight(turn) {
  leaveOutCovers();
  // Nearest also means: of what is too tall, the beginning. Styles say whether the way there is seen.
  (turn.comparison ?? turn.element).scrollIntoView({ block: "nearest" });
}

// What scrolls into sight, focus too, is to lie neither behind the form nor, on a phone, behind the picture.
function leaveOutCovers() {
  const { style } = document.documentElement;
  style.scrollPaddingTop = sticks(part("window")) ? `${part("window").offsetHeight}px` : "";
  style.scrollPaddingBottom = sticks(part("dock")) ? `${part("dock").offsetHeight}px` : "";
}

function sticks(covering) {
  return getComputedStyle(covering).position === "sticky";
}

const covers = new ResizeObserver(leaveOutCovers);
for (const id of ["window", "dock"]) covers.observe(part(id));

/** Stream one run's answer into its place. */
async function hear(run, messages, signal) {
  const body = {
    model: model.id,
    messages,
    token_budget: run.budget,
  };
  if (model.flashvlm.selectors.length > 1) body.selector = part("selector").value;
  const status = part("status");
  status.textContent = run.budget === "full" ? "Asking again with all tokens…" : "The server looks at the picture…";
  const sent = performance.now();
  for await (const chunk of streamAnswer(body, signal)) {
    signal.throwIfAborted(); // a chunk that lay ready is not wanted either
    const first = run.selection === null;
    run.take(chunk, performance.now() - sent);
    // Before the first word: what the question kept. The unpruned run keeps everything, which shows nothing.
    if (first && run.selection && run.budget !== "full") {
      show(run);
      status.textContent = `${run.tokens} tokens kept. Answering…`;
    }
  }
  run.end();
  status.textContent = "Answered.";
}

loadModel();

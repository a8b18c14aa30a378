/** One question with its answer, or with two answers beside each other. */

import { element } from "./element.js";
import { tokenCount } from "./picture.js";
import { reusedPicture, timesFigure } from "./times.js";

/** An answer while it is written, with what was kept for it. */
export class Run {
  text = "";
  /** @type {import("./picture.js").Selection|null} */
  selection = null;
  finish = "";
  tokens = 0;
  stageMs = null;
  firstTokenMs = null;
  totalMs = null;

  #head = element("p", { class: "kept" });
  #answer = element("p", { class: "answer waiting", "aria-live": "polite", "aria-busy": "true" });
  #notes = element("p", { class: "notes small muted" });
  /** Shows on the picture what this run kept. */
  button = element(
    "button",
    { class: "small-button toggle", type: "button", "aria-pressed": "false", hidden: "" },
    "Show",
    element("span", { class: "unseen" }, " these tokens on the picture"),
  );
  element = element(
    "article",
    { class: "run" },
    element("div", { class: "run-head" }, this.#head, this.button),
    this.#answer,
    this.#notes,
  );

  /** @param {number|"full"} budget */
  constructor(budget) {
    this.budget = budget;
    this.#head.textContent = budget === "full" ? "All tokens" : `Budget of ${budget}`;
  }

  /** Take in a chunk of the stream, `ms` after the question was sent. */
  take(chunk, ms) {
    const choice = chunk.choices?.[0];
    if (chunk.flashvlm?.images?.length) this.#select(chunk.flashvlm.images[0]);
    if (choice?.delta?.content) {
      this.firstTokenMs ??= ms;
      this.text += choice.delta.content;
      this.#answer.classList.remove("waiting");
      this.#answer.append(choice.delta.content);
    }
    if (choice?.finish_reason) this.finish = choice.finish_reason;
    if (chunk.flashvlm?.stage_ms) this.stageMs = chunk.flashvlm.stage_ms;
    this.totalMs = ms;
  }

  /** @param {string} [why] What kept the answer from being complete. */
  end(why = "") {
    this.#answer.classList.remove("waiting");
    this.#answer.removeAttribute("aria-busy");
    if (!this.text) this.#answer.append(element("em", {}, why || "The model says nothing."));
    const notes = [];
    if (this.text && why) notes.push(why);
    if (this.finish === "length") notes.push("Cut off at the longest answer allowed.");
    if (this.stageMs && reusedPicture(this.stageMs)) notes.push("Picture reused, not encoded again.");
    this.#notes.replaceChildren(...notes.map((note) => element("span", {}, note)));
  }

  /** Whether this run was heard to its end. */
  get complete() {
    return this.finish !== "" && this.stageMs !== null;
  }

  /** @returns {import("./times.js").Times} */
  get times() {
    const { tokens, stageMs, totalMs } = this;
    return { tokens, stageMs, totalMs, firstTokenMs: this.firstTokenMs ?? totalMs };
  }

  #select(selection) {
    this.selection = selection;
    this.tokens = selection.kept_indices.length;
    const all = tokenCount(selection);
    const share = this.tokens === all ? "" : element("span", { class: "muted" }, ` ${percent(this.tokens / all)}`);
    this.#head.replaceChildren(`${this.tokens} of ${all} tokens`, share);
    this.button.hidden = false;
  }
}

/** A question with one run for each budget. */
export class Turn {
  #times = element("div", {});

  /**
   * @param {string} question
   * @param {(number|"full")[]} budgets
   */
  constructor(question, budgets) {
    this.question = question;
    this.runs = budgets.map((budget) => new Run(budget));
    const runs = element("div", { class: "runs" }, ...this.runs.map((run) => run.element));
    this.element = element("li", { class: "turn" }, element("h3", {}, question), runs, this.#times);
  }

  /** What both runs' times say about each other, once that is known. */
  get comparison() {
    return this.#times.querySelector("figure:has(.verdict)");
  }

  /** Show the times of the runs that are complete. */
  showTimes() {
    const complete = this.runs.filter((run) => run.complete);
    if (complete.length) this.#times.replaceChildren(timesFigure(complete.map((run) => run.times)));
  }
}

function percent(share) {
  return share < 0.01 ? "under 1 %" : `${Math.round(100 * share)} %`;
}

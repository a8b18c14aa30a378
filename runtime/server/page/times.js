/** Stage times, and what two runs' times say about each other. */

import { element } from "./element.js";

// In the order in which they run. A fused graph encodes and selects in one stage.
const STAGES = new Map([
  ["queue", "wait"],
  ["tokenize", "tokenise"],
  ["image_keys", "recognise"],
  ["load_images", "load"],
  ["preprocess", "preprocess"],
  ["encode", "encode"],
  ["visual", "encode and select"],
  ["select", "select"],
  ["splice", "splice"],
  ["prefill", "prefill"],
  ["decode", "decode"],
]);
// What a picture costs once: a server that remembers it skips these.
const ONCE = ["load_images", "preprocess", "encode"];
const COLOURED = new Set(["encode", "visual", "select", "prefill", "decode", "elsewhere"]);

/**
 * @typedef {object} Times Of one answer.
 * @property {number} tokens Visual tokens that were kept.
 * @property {Record<string, number>} stageMs As the server measured them.
 * @property {number} firstTokenMs From sending the question to the first text, as the page saw it.
 * @property {number} totalMs From sending the question to the end.
 */

/** Return a duration for people. */
export function duration(ms) {
  if (ms >= 999.5) return `${(ms / 1000).toFixed(2)} s`;
  return ms >= 9.95 ? `${Math.round(ms)} ms` : `${ms.toFixed(1)} ms`;
}

/**
 * Return what a run took beyond its stages: the browser, the network, and the server's taking in of the request.
 *
 * @param {Times} run
 */
export function elsewhereMs(run) {
  return Math.max(0, run.totalMs - stageSum(run));
}

/** Return whether the server had encoded the picture before. */
export function reusedPicture(stageMs) {
  return !("encode" in stageMs || "visual" in stageMs);
}

/**
 * Return how many times later the first token comes in `all` than in `kept`.
 *
 * Waiting for other people's questions says nothing about pruning. Neither does what a picture costs once, where only
 * the run that came first paid for it: `leftOut` says whether that was so.
 *
 * @param {Times} kept
 * @param {Times} all
 */
export function compareFirstToken(kept, all) {
  const unshared = ONCE.filter((stage) => stage in kept.stageMs !== stage in all.stageMs);
  const time = (run) => ["queue", ...unshared].reduce((ms, stage) => ms - (run.stageMs[stage] ?? 0), run.firstTokenMs);
  return { ratio: Math.max(time(all), 0.1) / Math.max(time(kept), 0.1), leftOut: unshared.includes("encode") };
}

/**
 * Draw one bar for each run, on one scale, with all times below: as a legend of one run, as a table of two.
 *
 * @param {Times[]} runs One, or the pruned one and the one with all tokens.
 */
export function timesFigure(runs) {
  const longest = Math.max(...runs.map((run) => stageSum(run) + elsewhereMs(run)));
  const bars = runs.map((run) => bar(run, longest, runs.length > 1));
  const where = element("p", { class: "muted" }, "Elsewhere: browser, network, and taking in the request.");
  if (runs.length === 1) return element("figure", { class: "times" }, ...bars, legend(runs[0]), where);
  return element("figure", { class: "times" }, verdict(...runs), ...bars, table(...runs), where);
}

function stageSum({ stageMs }) {
  return Object.values(stageMs).reduce((sum, ms) => sum + ms, 0);
}

/** The stages that ran in any run, known ones in their order, then what a newer server may add. */
function stagesOf(...runs) {
  const ran = new Set(runs.flatMap(({ stageMs }) => Object.keys(stageMs)));
  return [...new Set([...STAGES.keys(), ...ran])].filter((stage) => ran.has(stage));
}

function swatch(stage) {
  return element("span", { class: `swatch ${stageClass(stage)}`, "aria-hidden": "true" });
}

function stageClass(stage) {
  return COLOURED.has(stage) ? `stage-${stage}` : "stage-other";
}

function stageName(stage) {
  return STAGES.get(stage) ?? stage.replaceAll("_", " ");
}

/** A picture of what the legend or table says in words. */
function bar(run, longest, labelled) {
  const piece = (kind, ms) => {
    const part = element("span", { class: kind });
    part.style.flexGrow = ms / longest;
    return part;
  };
  const parts = stagesOf(run).map((stage) => piece(stageClass(stage), run.stageMs[stage]));
  const elsewhere = elsewhereMs(run);
  parts.push(piece("stage-elsewhere", elsewhere));
  const rest = piece("stage-none", longest - stageSum(run) - elsewhere);
  const label = labelled ? [element("span", { class: "bar-label" }, String(run.tokens))] : [];
  const whole = element("div", { class: "parts" }, ...parts, rest);
  return element("div", { class: "bar", "aria-hidden": "true" }, ...label, whole);
}

function legend(run) {
  const item = (kind, ms, ...name) =>
    element("div", { class: kind }, element("dt", {}, ...name), element("dd", {}, duration(ms)));
  return element(
    "dl",
    { class: "legend" },
    item("whole", run.firstTokenMs, "first token"),
    item("whole", run.totalMs, "whole answer"),
    ...stagesOf(run).map((stage) => item("", run.stageMs[stage], swatch(stage), stageName(stage))),
    item("", elsewhereMs(run), swatch("elsewhere"), "elsewhere"),
  );
}

function verdict(kept, all) {
  const { ratio, leftOut } = compareFirstToken(kept, all);
  let words = "as soon as";
  if (ratio >= 1.05) words = `${ratio.toFixed(1)}× sooner than`;
  if (ratio <= 0.95) words = `${(1 / ratio).toFixed(1)}× later than`;
  const sentence = `With ${kept.tokens} visual tokens the answer begins ${words} with all ${all.tokens}.`;
  const why = "Not counting the encoding of the picture, which only the first of the two runs had to do.";
  return element("figcaption", { class: "verdict" }, element("strong", {}, sentence), ...(leftOut ? [" ", why] : []));
}

function table(kept, all) {
  const row = (head, before, after, ratio, kind = "") =>
    element(
      "tr",
      { class: kind },
      element("th", { scope: "row" }, ...head),
      ...[before, after].map((ms) => element("td", {}, ms === undefined ? "–" : duration(ms))),
      element("td", {}, ratio),
    );
  // Of what takes next to no time, a ratio would only tell of chance.
  const least = 0.05 * Math.max(kept.totalMs, all.totalMs);
  const ratioOf = (before, after) => (Math.max(before, after) >= least ? `${(after / before).toFixed(1)}×` : "");
  const first = `${compareFirstToken(kept, all).ratio.toFixed(1)}×`;
  const columns = [`${kept.tokens} tokens`, `all ${all.tokens}`, "ratio"];
  const heads = columns.map((column) => element("th", { scope: "col" }, column));
  return element(
    "table",
    {},
    element("caption", { class: "unseen" }, "Times of both runs"),
    element("thead", {}, element("tr", {}, element("td"), ...heads)),
    element(
      "tbody",
      {},
      row(["first token"], kept.firstTokenMs, all.firstTokenMs, first, "whole"),
      row(["whole answer"], kept.totalMs, all.totalMs, ratioOf(kept.totalMs, all.totalMs), "whole"),
      ...stagesOf(kept, all).map((stage) => {
        const [before, after] = [kept.stageMs[stage], all.stageMs[stage]];
        return row([swatch(stage), stageName(stage)], before, after, ratioOf(before, after));
      }),
      row([swatch("elsewhere"), "elsewhere"], elsewhereMs(kept), elsewhereMs(all), ""),
    ),
  );
}

/** The server's HTTP API: what it serves, and answers as they are written. */

// Relative to this file, so that the page also works below another path of a proxy.
const API = new URL("../v1/", import.meta.url);
const KEY = "flashvlm-api-key";
// Besides 500 and above: no response, one that came too slowly, too many requests.
const PASSING = new Set([0, 408, 429]);

/** What the server, or the way to it, refused. `message` is the server's own where it gave one. */
export class ApiError extends Error {
  /**
   * @param {string} message
   * @param {object} [details]
   * @param {number} [details.status] 0 where no response came at all.
   * @param {number} [details.retryAfterS]
   * @param {boolean} [details.passing] Whether the same request may succeed later; by default, what the status says.
   */
  constructor(message, { status = 0, retryAfterS, passing = PASSING.has(status) || status >= 500 } = {}) {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.retryAfterS = retryAfterS;
    this.passing = passing;
  }
}

/** Keep an API key for as long as this tab is open. */
export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

/** Return the first model of the server, as `/v1/models` lists it. */
export async function fetchModel() {
  const response = await request("models");
  const [model] = (await response.json()).data;
  if (!model?.flashvlm) throw new ApiError("This server has no model of flashvlm-export.", { status: response.status });
  return model;
}

/**
 * Yield the chunks of an answer while they arrive.
 *
 * @param {object} body A chat completion request; streaming, usage and the selection are asked for here.
 * @param {AbortSignal} signal Ends the answer, on the server too.
 */
export async function* streamAnswer(body, signal) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true }, selection: true };
  const response = await request("chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(asked),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) {
      const { message, type } = chunk.error;
      throw new ApiError(message, { status: response.status, passing: type === "server_error" });
    }
    yield chunk;
  }
  const cut = "The server ended the answer before it was complete.";
  throw new ApiError(cut, { status: response.status, passing: true });
}

/**
 * Yield each object that `/live/events` sends, until the server ends the stream.
 *
 * EventSource cannot send a key, so the events are read from a fetch, as those of answers are.
 */
export async function* streamLive() {
  const response = await request("../live/events");
  for await (const data of events(response.body)) yield JSON.parse(data);
}

async function request(path, options = {}) {
  const headers = new Headers(options.headers);
  const key = sessionStorage.getItem(KEY);
  if (key) headers.set("Authorization", `Bearer ${sendable(key)}`);
  const response = await reach(() => fetch(new URL(path, API), { ...options, headers }));
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  throw new ApiError(said?.error?.message ?? `The server answered ${response.status} ${response.statusText}.`, {
    status: response.status,
    retryAfterS: Number(response.headers.get("Retry-After")) || undefined,
  });
}

/** A key that no header can carry would fail before the server sees it, again and again. */
function sendable(key) {
  if (/^[\x21-\x7e]+$/.test(key)) return key;
  sessionStorage.removeItem(KEY);
  throw new ApiError("This API key has characters that no key has.", { status: 401 });
}

/** Yield the data of server-sent events; one line holds one event's data here. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reach(() => reader.read());
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } finally {
    reader.cancel().catch(() => {}); // Already broken or aborted: nothing is left to be cancelled.
  }
}

/** Browsers report a network failure as a TypeError with words of their own. */
async function reach(step) {
  try {
    return await step();
  } catch (error) {
    if (error instanceof TypeError) throw new ApiError("The server cannot be reached. Is it still running?");
    throw error;
  }
}

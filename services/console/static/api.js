// What is asked of the gateway. The admin token and the key live in sessionStorage: in this tab, and until it is closed.

const TOKEN = "portcullis-admin-token";
const KEY = "portcullis-api-key";

function stored(name) {
  try {
    return sessionStorage.getItem(name);
  } catch {
    return null;
  }
}

function store(name, value) {
  try {
    if (value === null) sessionStorage.removeItem(name);
    else sessionStorage.setItem(name, value);
  } catch {
    // storage is switched off: it has to be given again
  }
}

export const token = { get: () => stored(TOKEN), set: (value) => store(TOKEN, value) };
export const key = { get: () => stored(KEY), set: (value) => store(KEY, value) };

/** `status` 0: there was no answer. `body`: what it said, an object. */
export class Refusal extends Error {
  constructor(status, body) {
    super(body.detail ?? (status ? `The gateway answered ${status}.` : "The gateway does not answer."));
    this.status = status;
    this.body = body;
  }
}

function authorised() {
  const given = token.get();
  return given ? { Authorization: `Bearer ${given}` } : {};
}

async function answerOf(response) {
  let body = {};
  try {
    body = await response.json();
  } catch {
    // no JSON: its status says enough
  }
  if (!response.ok) throw new Refusal(response.status, body);
  return body;
}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { cache: "no-store", credentials: "omit", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, {});
  }
  return answerOf(response);
}

export const session = () => ask("api/session", { headers: authorised() });

export function traces(query, signal) {
  const wanted = new URLSearchParams(Object.entries(query).filter(([, value]) => value !== ""));
  return ask(`api/traces?${wanted}`, { headers: authorised(), signal });
}

export const trace = (id) => ask(`api/traces/${encodeURIComponent(id)}`, { headers: authorised() });

export const register = () =>
  ask("../auth/register", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...authorised() },
    body: JSON.stringify({ name: "Console", rate_limit_per_minute: 120 }),
  });

/** A verdict on one text, straight from the gateway: the console's own service never sees it. */
export const detect = (text, config, apiKey, traceparent) =>
  ask("../v1/detect", {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-API-Key": apiKey, traceparent },
    body: JSON.stringify({ text, config }),
  });

/** A traceparent of our own, with the flag that says: keep this trace. */
export function newTrace() {
  const hex = (bytes) => Array.from(crypto.getRandomValues(new Uint8Array(bytes)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  const traceId = hex(16);
  return { traceId, traceparent: `00-${traceId}-${hex(8)}-01` };
}

const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 8000;

/** Server-sent events, read with fetch so that the token can be sent. `on`: a function for each event, and `state`. */
export function listen(on) {
  const stop = new AbortController();
  const pause = (milliseconds) => new Promise((resume) => setTimeout(resume, milliseconds));
  (async () => {
    let wait = FIRST_PAUSE_MS;
    while (!stop.signal.aborted) {
      try {
        const response = await fetch("api/live", {
          headers: { Accept: "text/event-stream", ...authorised() },
          cache: "no-store",
          credentials: "omit",
          signal: stop.signal,
        });
        if (response.status === 401 || response.status === 403) {
          on.state("refused");
          return;
        }
        if (response.ok && response.body) {
          wait = FIRST_PAUSE_MS;
          on.state("live");
          await read(response.body, on);
        }
      } catch {
        // the connection failed or broke off; see below
      }
      if (stop.signal.aborted) return;
      on.state("away");
      await pause(wait);
      wait = Math.min(LONGEST_PAUSE_MS, wait * 2);
    }
  })();
  return () => stop.abort();
}

async function read(body, on) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += value;
    const messages = rest.split("\n\n");
    rest = messages.pop();
    for (const message of messages) {
      const event = /^event: (.*)$/m.exec(message)?.[1];
      const data = /^data: (.*)$/m.exec(message)?.[1];
      if (event && data && on[event]) on[event](JSON.parse(data));
    }
  }
}

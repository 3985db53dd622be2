// The frame: which view is shown, the stream of news, light and dark, and the way in.
import * as api from "./api.js";
import { fill, h } from "./dom.js";
import { overview } from "./overview.js";
import { traceList } from "./traces.js";
import { tracePage } from "./trace.js";
import { tryPage } from "./try.js";

const main = document.getElementById("main");
const live = document.getElementById("live");
const leave = document.getElementById("leave");

/** What all views know: the newest of what the stream has told, and who wants to hear of it. */
const news = {
  slowMs: 1000,
  history: null,
  fleet: null,
  traces: null,
  listeners: new Set(),
  tell(event, data) {
    this[event] = data;
    for (const listener of this.listeners) listener(event, data);
  },
};

const VIEWS = [
  [/^#\/traces\/([0-9a-f]{1,32})$/, "traces", (found) => tracePage(news, found[1])],
  [/^#\/traces$/, "traces", () => traceList(news)],
  [/^#\/try$/, "try", () => tryPage(news)],
  [/^/, "overview", () => overview(news)],
];
const TITLES = { overview: "Overview", traces: "Traces", try: "Try a text" };
const LIVE = {
  live: "Live",
  away: "Reconnecting",
  connecting: "Connecting",
  nats: "NATS is away",
  refused: "Signed out",
};

let closeView = () => {};
let stopListening = () => {};

function show(moved) {
  if (location.hash === "#main") return; // the skip link
  closeView();
  const [pattern, name, make] = VIEWS.find(([pattern]) => pattern.test(location.hash));
  const view = make(pattern.exec(location.hash));
  closeView = view.close ?? (() => {});
  fill(main, view.element);
  document.title = `${TITLES[name]} · Portcullis`;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (moved) {
    scrollTo(0, 0);
    main.focus({ preventScroll: true });
  }
}

function setLive(state) {
  if (live.dataset.state === state) return;
  live.dataset.state = state;
  live.lastElementChild.textContent = LIVE[state];
  document.body.classList.toggle("stale", state === "away" || state === "nats");
}

function start() {
  leave.hidden = !api.token.get();
  stopListening = api.listen({
    state: (state) => {
      if (state === "refused") askForToken("The token is no longer taken.");
      else setLive(state);
    },
    history: (data) => news.tell("history", data),
    fleet: (data) => {
      setLive(data.connected ? "live" : "nats");
      news.tell("fleet", data);
    },
    traces: (data) => news.tell("traces", data),
  });
  addEventListener("hashchange", moved);
  show(false);
}

const moved = () => show(true);

function askForToken(complaint) {
  stopListening();
  removeEventListener("hashchange", moved);
  closeView();
  closeView = () => {};
  setLive("refused");
  leave.hidden = true;
  const input = h("input", { type: "password", id: "token", autocomplete: "off", required: true, spellcheck: "false" });
  const said = h("p", { class: "complaint", role: "alert" }, complaint ?? "");
  const form = h(
    "form",
    { class: "panel way-in" },
    h("h1", {}, "Who goes there?"),
    h("p", {}, "The console needs the admin token. It is kept in this tab only, until the tab is closed."),
    h("label", { for: "token" }, "Admin token"),
    input,
    said,
    h("button", { class: "primary", type: "submit" }, "Open the console"),
    h("p", { class: "hint" }, "./run up keeps it in .portcullis/secrets/admin-token."),
  );
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    api.token.set(input.value.trim());
    const answer = await begin(true);
    if (answer) said.textContent = answer;
  });
  fill(main, form);
  document.title = "Sign in · Portcullis";
  input.focus();
}

/** Enter if we may. Returns what stands in the way when a token was `given` and is not enough. */
async function begin(given) {
  let session;
  try {
    session = await api.session();
  } catch (error) {
    if (given) return error.message;
    fill(main, h("p", { class: "empty" }, `${error.message} This page tries again.`));
    setTimeout(() => begin(false), 2000);
    return null;
  }
  news.slowMs = session.slow_ms;
  if (session.access === "welcome") {
    start();
    return null;
  }
  if (session.access === "never") {
    const say = "The console is closed. Set PORTCULLIS_ADMIN_TOKEN for it, and open it from the gateway's own address.";
    if (given) return say;
    fill(main, h("p", { class: "empty" }, say));
    return null;
  }
  if (given) {
    api.token.set(null);
    return "That is not the admin token.";
  }
  askForToken("");
  return null;
}

// --- light and dark: as the system has it, or the other way round, or as the system has it again ---------------------------

const root = document.documentElement;
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const themeButton = document.getElementById("theme");

/** A sun, a moon, or a disc of both halves. */
function themeSign(chosen) {
  const shapes = {
    light: [h("svg:circle", { cx: 8, cy: 8, r: 3 }), h("svg:path", { d: "M8 1v1.5M8 13.5V15M1 8h1.5M13.5 8H15M3 3l1.1 1.1M11.9 11.9 13 13M3 13l1.1-1.1M11.9 4.1 13 3" })],
    dark: [h("svg:path", { d: "M13.5 10A6 6 0 0 1 6 2.5a6 6 0 1 0 7.5 7.5Z" })],
  };
  const both = [h("svg:circle", { cx: 8, cy: 8, r: 6 }), h("svg:path", { class: "full", d: "M8 2a6 6 0 0 1 0 12Z" })];
  return h("svg:svg", { viewBox: "0 0 16 16", "aria-hidden": "true" }, shapes[chosen] ?? both);
}

function describeTheme() {
  const chosen = root.dataset.theme;
  themeButton.setAttribute("aria-label", `Colours: ${chosen ?? "as the system has them"}. Change`);
  themeButton.title = `Colours: ${chosen ?? "system"}`;
  fill(themeButton, themeSign(chosen));
}

themeButton.addEventListener("click", () => {
  const other = prefersDark.matches ? "light" : "dark";
  const same = prefersDark.matches ? "dark" : "light";
  const next = { [other]: same, [same]: undefined }[root.dataset.theme] ?? (root.dataset.theme === same ? undefined : other);
  if (next) root.dataset.theme = next;
  else delete root.dataset.theme;
  try {
    if (next) localStorage.setItem("portcullis-theme", next);
    else localStorage.removeItem("portcullis-theme");
  } catch {
    // storage is switched off: for this page only
  }
  describeTheme();
});
describeTheme();

leave.addEventListener("click", () => {
  api.token.set(null);
  api.key.set(null);
  askForToken("");
});

begin(false);

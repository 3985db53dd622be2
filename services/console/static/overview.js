// The path of a request, stage by stage, as it is now; what is wrong with it; breakers; what happened lately.
import * as api from "./api.js";
import { SERVICES, ago, clock, fill, h, ms, percent, plural, rate, say } from "./dom.js";
import { traceTable } from "./traces.js";

const POINTS = 90;
const LIST_PAUSE_MS = 1500;
const BREAKERS = { primary: "Primary engine", fallback: "Fallback pool" };
const STATE_WORDS = { closed: "closed", half_open: "half-open", open: "open" };
const ENGINE_KINDS = { detect: "detection engine", tei: "text-embeddings-inference", kserve: "Open Inference Protocol", pool: "pool" };
const WHAT = {
  edge: "HTTP in and out",
  auth: "who calls",
  limiter: "is there room",
  detector_proxy: "which engine, and the verdict",
  fallback_model: "the model that comes along",
  jobs: "texts that may wait take the same way, when there is room",
};

export function overview(news) {
  const health = h("section", { class: "verdict", "aria-live": "polite", "aria-label": "State" });
  const cards = Object.fromEntries(Object.keys(SERVICES).map((name) => [name, stageCard(name, () => toggle(name))]));
  const engine = engineCard();
  const toEngine = wire("to-engine");
  const toPool = wire("to-pool");
  const path = h(
    "section",
    { class: "path", "aria-label": "The path of a request" },
    cards.edge.element,
    wire().element,
    cards.auth.element,
    wire().element,
    cards.limiter.element,
    wire().element,
    cards.detector_proxy.element,
    toEngine.element,
    engine.element,
    cards.jobs.element,
    toPool.element,
    cards.fallback_model.element,
  );
  const detail = h("section", { class: "panel detail", id: "detail", hidden: true });
  const breakers = h("div", { class: "breakers" });
  const stores = h("p", { class: "stores" });
  const happened = h("ol", { class: "news", tabindex: "0", "aria-labelledby": "news-title" });
  const notable = traceTable(news, { compact: true });
  const element = h(
    "div",
    { class: "overview" },
    h("h1", { class: "unseen" }, "Overview"),
    health,
    path,
    detail,
    h(
      "div",
      { class: "columns" },
      h("section", { class: "panel", "aria-labelledby": "breakers-title" }, h("h2", { id: "breakers-title" }, "Breakers and stores"), breakers, stores),
      h("section", { class: "panel", "aria-labelledby": "news-title" }, h("h2", { id: "news-title" }, "Lately"), happened),
    ),
    h(
      "section",
      { class: "panel", "aria-labelledby": "notable-title" },
      h("div", { class: "panel-head" }, h("h2", { id: "notable-title" }, "Traces worth a look"), h("a", { href: "#/traces" }, "All traces")),
      notable.element,
    ),
  );

  let chosen = null;
  const curves = Object.fromEntries(Object.keys(SERVICES).map((name) => [name, []]));
  let asked = 0;
  let later = null;

  function toggle(name) {
    chosen = chosen === name ? null : name;
    for (const [each, card] of Object.entries(cards)) card.choose(each === chosen);
    drawDetail();
    if (chosen) detail.scrollIntoView({ block: "nearest", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
  }

  function drawDetail() {
    const stage = news.fleet?.stages.find((each) => each.name === chosen);
    detail.hidden = !stage;
    if (stage) fill(detail, stageDetail(stage, news.fleet.at_ms));
  }

  function draw(picture) {
    drawHealth(health, picture, news.slowMs);
    for (const stage of picture.stages) cards[stage.name]?.draw(stage, curves[stage.name], news.slowMs, picture);
    engine.draw(picture);
    const primary = picture.breakers.find((each) => each.name === "primary");
    const fallback = picture.breakers.find((each) => each.name === "fallback");
    toEngine.draw(primary?.state ?? null);
    toPool.draw(fallback?.state ?? null);
    drawBreakers(breakers, picture);
    drawStores(stores, picture);
    drawNews(happened, picture);
    drawDetail();
  }

  async function listTraces() {
    const wait = asked + LIST_PAUSE_MS - Date.now();
    if (wait > 0) {
      later ??= setTimeout(() => {
        later = null;
        listTraces();
      }, wait);
      return;
    }
    asked = Date.now();
    try {
      const { traces } = await api.traces({ order: "notable", limit: 6 });
      notable.draw(traces);
    } catch (error) {
      notable.complain(error.message);
    }
  }

  function hear(event, data) {
    if (event === "history") {
      for (const [name, points] of Object.entries(data)) if (curves[name]) curves[name] = points.slice(-POINTS);
    } else if (event === "fleet") {
      if (data.connected) {
        for (const stage of data.stages) {
          curves[stage.name]?.push([stage.flow.rate, stage.flow.failed, stage.flow.p99_ms]);
          if (curves[stage.name]?.length > POINTS) curves[stage.name].shift();
        }
      }
      draw(data);
    } else if (event === "traces") {
      listTraces();
    }
  }

  news.listeners.add(hear);
  if (news.history) hear("history", news.history);
  if (news.fleet) draw(news.fleet);
  listTraces();
  return {
    element,
    close() {
      news.listeners.delete(hear);
      clearTimeout(later);
    },
  };
}

// --- what is wrong -----------------------------------------------------------------------------------------------------------

/** [severity, sentence] of all that is not as it should be, the worst first. */
export function troubles(picture, slowMs) {
  const found = [];
  const bad = (text) => found.push(["bad", text]);
  const odd = (text) => found.push(["odd", text]);
  if (!picture.connected) {
    bad("NATS is away: nothing gets through, and what is shown here is from before.");
    return found;
  }
  const { engine } = picture;
  const hasEngine = engine.kind && engine.kind !== "pool";
  for (const stage of picture.stages) {
    const name = SERVICES[stage.name];
    if (stage.status === "down") {
      const needed = ["edge", "auth", "limiter", "detector_proxy"].includes(stage.name) || (stage.name === "fallback_model" && !hasEngine);
      (needed ? bad : odd)(stage.up ? `${name} cannot answer.` : `${name}: nobody is there.`);
      continue;
    }
    if (stage.flow.failed >= 0.05) bad(`${name} fails ${rate(stage.flow.failed)} a second.`);
    if (stage.flow.queued >= 100) odd(`${stage.flow.queued} wait at ${name}.`);
    const gone = stage.replicas.filter((each) => each.presence === "gone").length;
    if (gone && picture.at_ms - Math.max(...stage.replicas.filter((each) => each.presence === "gone").map((each) => each.seen_ms)) < 60_000)
      odd(`${plural(gone, "replica")} of ${name} ${gone === 1 ? "is" : "are"} gone.`);
  }
  if (hasEngine && engine.breaker === "open") bad("The breaker of the primary engine is open: the fallback pool answers.");
  else if (hasEngine && engine.breaker === "half_open") odd("The breaker of the primary engine is half-open: it is being tried again.");
  else if (hasEngine && engine.status !== "up" && picture.stages.some((each) => each.name === "detector_proxy" && each.up))
    odd(`The primary engine says that it is ${engine.status}.`);
  if (picture.stores.redis === "down") odd("Redis is away: each limiter counts for itself.");
  if (picture.stores.postgres === "down") odd("PostgreSQL is away: keys that were seen lately go on, others do not.");
  const slow = picture.stages.filter((each) => each.flow.p99_ms >= slowMs && each.name !== "jobs");
  const deepest = slow.at(-1); // the edge is slow with whatever is slow behind it
  if (deepest) odd(`${SERVICES[deepest.name]} is slow: one in a hundred takes ${ms(deepest.flow.p99_ms)} or more.`);
  return found.sort(([one], [other]) => (one === "bad" ? 0 : 1) - (other === "bad" ? 0 : 1));
}

function drawHealth(element, picture, slowMs) {
  const found = troubles(picture, slowMs);
  const worst = found[0]?.[0] ?? "good";
  const edge = picture.stages.find((each) => each.name === "edge");
  const texts = found.length ? found.map(([, text]) => text) : ["All is well."];
  const key = JSON.stringify([worst, texts]);
  if (element.dataset.key !== key) {
    element.dataset.key = key;
    element.dataset.state = worst;
    fill(
      element,
      h("span", { class: "verdict-sign", "aria-hidden": "true" }, worst === "good" ? "✓" : "!"),
      h("div", {}, h("p", { class: "verdict-title" }, texts[0]), texts.length > 1 && h("ul", {}, texts.slice(1).map((text) => h("li", {}, text)))),
      h("p", { class: "verdict-now", "aria-live": "off" }),
    );
  }
  say(element.lastElementChild, edge ? `${rate(edge.flow.rate)} calls/s · ${edge.flow.in_flight} in flight` : "");
}

// --- cards -------------------------------------------------------------------------------------------------------------------

function stageCard(name, choose) {
  const number = (label) => {
    const value = h("dd", {}, "–");
    return { value, element: h("div", {}, h("dt", {}, label), value) };
  };
  const numbers = { p50: number("p50"), p99: number("p99"), flight: number("in flight"), queued: number("queued") };
  const perSecond = h("b", {}, "–");
  const curve = h("svg:svg", { class: "curve", viewBox: "0 0 90 24", preserveAspectRatio: "none", "aria-hidden": "true" });
  const wrong = h("p", { class: "wrong" });
  const pips = h("ul", { class: "pips", "aria-label": "Replicas" });
  const many = h("span", { class: "many" });
  const button = h(
    "button",
    { class: "card-title", type: "button", "aria-expanded": "false", "aria-controls": "detail", onclick: choose },
    h("i", { class: "dot", "aria-hidden": "true" }),
    h("span", {}, SERVICES[name]),
    many,
  );
  const element = h(
    "article",
    { class: "card stage", "data-stage": name, "data-status": "unknown", "aria-label": SERVICES[name] },
    h("h3", {}, button),
    h("p", { class: "what" }, WHAT[name]),
    h("div", { class: "flow" }, h("p", { class: "rate" }, perSecond, h("span", {}, "/s")), curve),
    h("dl", { class: "numbers" }, Object.values(numbers).map((each) => each.element)),
    wrong,
    pips,
  );
  element.addEventListener("click", (event) => {
    if (!event.target.closest("button") && !getSelection()?.toString()) choose();
  });
  return {
    element,
    choose(chosen) {
      button.setAttribute("aria-expanded", String(chosen));
      element.classList.toggle("chosen", chosen);
    },
    draw(stage, points, slowMs, picture) {
      const { flow } = stage;
      element.dataset.status = picture.connected ? stage.status : "unknown";
      say(perSecond, rate(flow.rate));
      const p50 = flow.p50_ms ?? flow.mean_ms;
      say(numbers.p50.value, ms(p50));
      say(numbers.p99.value, ms(flow.p99_ms));
      numbers.p99.value.classList.toggle("hot", flow.p99_ms >= slowMs);
      say(numbers.flight.value, String(flow.in_flight));
      say(numbers.queued.value, String(flow.queued));
      numbers.queued.value.classList.toggle("hot", flow.queued >= 100);
      say(wrong, wrongWords(flow));
      wrong.hidden = !wrong.textContent;
      wrong.dataset.kind = flow.failed >= 0.05 ? "failed" : "refused";
      say(many, stage.up === 1 ? "" : `×${stage.up}`);
      drawPips(pips, stage);
      drawCurve(curve, points);
    },
  };
}

function wrongWords(flow) {
  const words = [];
  const share = (part) => (flow.rate > 0 ? ` (${percent(Math.min(1, part / flow.rate))})` : "");
  if (flow.failed >= 0.05) words.push(`${rate(flow.failed)}/s failed${share(flow.failed)}`);
  if (flow.refused >= 0.05) words.push(`${rate(flow.refused)}/s refused${share(flow.refused)}`);
  return words.join(" · ");
}

function stateOf(replica) {
  return replica.presence === "up" ? replica.status : replica.presence;
}

function drawPips(element, stage) {
  const shown = stage.replicas.slice(0, 16);
  const key = JSON.stringify([shown.map((each) => [each.instance, stateOf(each)]), stage.replicas.length]);
  if (element.dataset.key === key) return;
  element.dataset.key = key;
  fill(
    element,
    shown.map((each) => {
      const state = stateOf(each);
      const text = `${each.instance.slice(0, 8)}: ${state}`;
      return h("li", { "data-state": state, title: text }, h("span", { class: "unseen" }, text));
    }),
    stage.replicas.length > shown.length && h("li", { class: "more" }, `+${stage.replicas.length - shown.length}`),
    !stage.replicas.length && h("li", { class: "none" }, "nobody"),
  );
}

/** How many came through a second, and in red how many of those failed. */
function drawCurve(svg, points) {
  const top = Math.max(1, ...points.map(([rate]) => rate));
  const x = (index) => POINTS - points.length + index;
  const y = (value) => (23 - (Math.min(value, top) / top) * 21).toFixed(1);
  const line = (which) => points.map((point, index) => `${x(index)},${y(point[which])}`).join(" ");
  const area = (which) => (points.length ? `${x(0)},24 ${line(which)} ${x(points.length - 1)},24` : "");
  if (!svg.firstChild) {
    svg.append(
      h("svg:polygon", { class: "curve-area" }),
      h("svg:polyline", { class: "curve-line", "vector-effect": "non-scaling-stroke" }),
      h("svg:polygon", { class: "curve-failed" }),
    );
  }
  const [ground, edge, failed] = svg.children;
  ground.setAttribute("points", area(0));
  edge.setAttribute("points", line(0));
  failed.setAttribute("points", points.some((point) => point[1] > 0.01) ? area(1) : "");
}

function engineCard() {
  const dot = h("i", { class: "dot", "aria-hidden": "true" });
  const what = h("p", { class: "what" });
  const rest = h("div", { class: "engine-rest" });
  const element = h(
    "article",
    { class: "card engine", "data-stage": "engine", "data-status": "unknown", "aria-label": "Primary engine" },
    h("h3", {}, h("span", { class: "card-title" }, dot, h("span", {}, "Primary engine"))),
    what,
    rest,
  );
  return {
    element,
    draw(picture) {
      const { engine } = picture;
      const primary = picture.breakers.find((each) => each.name === "primary");
      const absent = !engine.kind || engine.kind === "pool";
      element.classList.toggle("absent", absent);
      element.dataset.status = absent ? "unknown" : engine.breaker === "open" || engine.status === "down" ? "down" : engine.status === "up" && engine.breaker === "closed" ? "ok" : "degraded";
      say(what, absent ? "none is configured" : (ENGINE_KINDS[engine.kind] ?? engine.kind));
      const sums = (primary?.replicas ?? []).reduce(([good, bad], each) => [good + each.successes, bad + each.failures], [0, 0]);
      const key = JSON.stringify([absent, engine, sums]);
      if (rest.dataset.key === key) return;
      rest.dataset.key = key;
      fill(
        rest,
        absent
          ? h("p", { class: "hint" }, "The fallback pool is the engine. Yours goes here: PORTCULLIS_ENGINE_URL.")
          : [
              h("p", { class: "engine-name" }, engine.name ?? "–"),
              h("dl", { class: "numbers" }, pair("health", engine.status), pair("breaker", STATE_WORDS[engine.breaker] ?? "–"), pair("answered", sums[0]), pair("failed", sums[1], sums[1] > 0)),
            ],
      );
    },
  };
}

function pair(label, value, hot = false) {
  return h("div", {}, h("dt", {}, label), h("dd", { class: hot ? "hot" : "" }, String(value)));
}

function wire(name) {
  const label = h("span", { class: "wire-label" });
  const element = h("div", { class: `wire ${name ?? ""}`, "aria-hidden": "true" }, h("i", {}), name && label);
  return {
    element,
    draw(state) {
      element.dataset.state = state ?? "none";
      say(label, state ? STATE_WORDS[state] : "");
    },
  };
}

// --- one stage -----------------------------------------------------------------------------------------------------------------

function stageDetail(stage, nowMs) {
  const head = ["replica", "state", "calls/s", "failed/s", "refused/s", "p50", "p99", "in flight", "queued", "up since"];
  const cells = (flow) => [
    rate(flow.rate),
    h("span", { class: flow.failed >= 0.05 ? "hot" : "" }, rate(flow.failed)),
    rate(flow.refused),
    ms(flow.p50_ms ?? flow.mean_ms),
    ms(flow.p99_ms),
    String(flow.in_flight),
    String(flow.queued),
  ];
  const rows = stage.replicas.map((each) => {
    const state = stateOf(each);
    const told = state === "gone" ? `gone, last seen ${ago(each.seen_ms, nowMs)}` : state === "left" ? `left ${ago(each.seen_ms, nowMs)}` : state;
    const notes = Object.entries(each.note);
    const own = h(
      "tr",
      { class: "replica", "data-state": state },
      h("th", { scope: "row", class: "mono" }, each.instance.slice(0, 8)),
      h("td", {}, h("i", { class: "dot", "data-state": state, "aria-hidden": "true" }), told),
      each.presence === "up" ? cells(each.flow).map((value) => h("td", { class: "number" }, value)) : h("td", { colspan: "7" }),
      h("td", { class: "number" }, each.started ? clock(Date.parse(each.started)) : ""),
    );
    const endpoints = each.endpoints
      .filter((one) => one.flow.rate > 0 || one.flow.in_flight || one.flow.queued || one.flow.p50_ms !== null)
      .map((one) =>
        h("tr", { class: "endpoint" }, h("td", { colspan: "2", class: "mono" }, one.name), cells(one.flow).map((value) => h("td", { class: "number" }, value)), h("td", {})),
      );
    const note = notes.length
      ? h("tr", { class: "note" }, h("td", { colspan: "10" }, notes.map(([name, value]) => h("span", {}, `${name.replaceAll(".", " ")}: `, h("b", {}, value)))))
      : null;
    return [own, endpoints, note];
  });
  return [
    h("h2", {}, `${SERVICES[stage.name]}: ${plural(stage.up, "replica")}`),
    h(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": `Replicas of ${SERVICES[stage.name]}` },
      h("table", {}, h("thead", {}, h("tr", {}, head.map((title, index) => h("th", { scope: "col", class: index > 1 ? "number" : "" }, title)))), h("tbody", {}, rows)),
    ),
    !stage.replicas.length && h("p", { class: "empty" }, "Nobody has answered so far."),
  ];
}

// --- breakers, stores, news ----------------------------------------------------------------------------------------------------

function drawBreakers(element, picture) {
  const seconds = Math.floor(picture.at_ms / 1000);
  const key = JSON.stringify([picture.breakers, picture.breakers.some((each) => each.state === "open") ? seconds : 0]);
  if (element.dataset.key === key) return;
  element.dataset.key = key;
  fill(
    element,
    picture.breakers.map((breaker) =>
      h(
        "article",
        { class: "breaker", "data-state": breaker.state, "data-breaker": breaker.name },
        h("h3", {}, BREAKERS[breaker.name] ?? breaker.name, h("span", { class: "chip", "data-state": breaker.state }, STATE_WORDS[breaker.state])),
        breaker.replicas.map((each) => {
          const calls = each.successes + each.failures;
          const left = each.retry_at ? Math.max(0, Math.round((Date.parse(each.retry_at) - picture.at_ms) / 1000)) : null;
          return h(
            "p",
            { class: "breaker-replica" },
            h("span", { class: "mono" }, each.replica.slice(0, 8)),
            h("span", { class: "share", "aria-hidden": "true", vars: { share: calls ? each.failures / calls : 0 }, "data-empty": calls ? null : "" }),
            h("span", {}, `${each.successes} well, ${each.failures} failed`),
            breaker.replicas.length > 1 && each.state !== "closed" && h("span", { class: "chip", "data-state": each.state }, STATE_WORDS[each.state]),
            each.state === "open" && left !== null && h("span", {}, left > 0 ? `tried again in ${left} s` : "to be tried again with the next text"),
            each.state !== "closed" && each.reason && h("span", { class: "hint" }, each.reason),
          );
        }),
      ),
    ),
    !picture.breakers.length && h("p", { class: "empty" }, "No proxy has told of any."),
  );
}

function drawStores(element, picture) {
  const names = { nats: "NATS", redis: "Redis", postgres: "PostgreSQL" };
  const key = JSON.stringify(picture.stores);
  if (element.dataset.key === key) return;
  element.dataset.key = key;
  fill(
    element,
    Object.entries(names).map(([name, title]) => {
      const state = picture.stores[name] ?? "unknown";
      return h("span", { class: "store", "data-state": state }, h("i", { class: "dot", "data-state": state, "aria-hidden": "true" }), `${title} ${state}`);
    }),
  );
}

const NEWS_STATES = { came: "ok", left: "left", gone: "gone" };

function drawNews(element, picture) {
  const key = JSON.stringify(picture.news);
  if (element.dataset.key === key) return;
  element.dataset.key = key;
  fill(
    element,
    picture.news.slice(0, 12).map((each) => {
      const state = each.kind === "breaker" ? (each.what.endsWith("closed") ? "ok" : each.what.endsWith("open") && !each.what.endsWith("half-open") ? "down" : "degraded") : NEWS_STATES[each.kind];
      const subject = each.kind === "breaker" ? `${BREAKERS[each.subject] ?? each.subject}, breaker:` : SERVICES[each.subject];
      return h(
        "li",
        {},
        h("time", { datetime: new Date(each.at_ms).toISOString() }, clock(each.at_ms)),
        h("i", { class: "dot", "data-state": state, "aria-hidden": "true" }),
        h("span", {}, h("b", {}, subject), ` ${each.what}`, each.detail && h("span", { class: "hint" }, ` ${each.detail}`)),
      );
    }),
    !picture.news.length && h("li", { class: "empty" }, "Nothing has changed since the console has been watching."),
  );
}

// Making elements, and writing numbers and times. Text is only ever set as text: nothing here parses HTML.

/** An element: h("div", {class: "card", onclick: f}, "text", child, …). Properties that are null, false or undefined are left out. */
export function h(tag, properties = {}, ...children) {
  const element = tag.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4))
    : document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "vars") for (const [key, each] of Object.entries(value)) element.style.setProperty(`--${key}`, each);
    else if (name === "value") element.value = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Put `children` in place of what is in `element`. */
export function fill(element, ...children) {
  element.replaceChildren(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Set the text of an element if it is another one. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export const SERVICES = {
  edge: "Edge",
  auth: "Auth",
  limiter: "Limiter",
  detector_proxy: "Proxy",
  fallback_model: "Fallback pool",
  jobs: "Jobs",
};

/** A colour's number for each service, the same everywhere: 1 to 6, and 7 to 9 for services that are not ours. */
export function hue(service) {
  const known = Object.keys(SERVICES).indexOf(service);
  if (known >= 0) return known + 1;
  let sum = 0;
  for (const letter of service) sum += letter.codePointAt(0);
  return 7 + (sum % 3);
}

export function serviceName(service) {
  return SERVICES[service] ?? service;
}

/** Milliseconds: 0.42 ms, 12 ms, 1.31 s, 2 min 5 s. */
export function ms(value) {
  if (value === null || value === undefined) return "–";
  if (value < 0.001) return "0 ms";
  if (value < 0.1) return `${Math.round(value * 1000)} µs`;
  if (value < 10) return `${value.toFixed(value < 1 ? 2 : 1)} ms`;
  if (value < 1000) return `${Math.round(value)} ms`;
  if (value < 60_000) return `${(value / 1000).toFixed(value < 10_000 ? 2 : 1)} s`;
  return `${Math.floor(value / 60_000)} min ${Math.round((value % 60_000) / 1000)} s`;
}

/** Per second: 0, 0.3, 42, 1.2 k. */
export function rate(value) {
  if (value < 0.05) return "0";
  if (value < 10) return value.toFixed(1);
  if (value < 1000) return String(Math.round(value));
  return `${(value / 1000).toFixed(1)} k`;
}

export function percent(value) {
  const share = value * 100;
  return `${share > 0 && share < 10 ? share.toFixed(1) : Math.round(share)} %`;
}

export function ago(epochMs, now = Date.now()) {
  const seconds = Math.max(0, (now - epochMs) / 1000);
  if (seconds < 5) return "just now";
  if (seconds < 90) return `${Math.round(seconds)} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  if (seconds < 129_600) return `${Math.round(seconds / 3600)} h ago`;
  return `${Math.round(seconds / 86_400)} d ago`;
}

export function clock(epochMs) {
  return new Date(epochMs).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });
}

export function plural(count, one, many = `${one}s`) {
  return `${count} ${count === 1 ? one : many}`;
}

/** Something to press that copies `text`. */
export function copyable(text, label) {
  const button = h("button", { class: "copy mono", type: "button", title: `Copy ${label}`, "aria-label": `Copy ${label} ${text}` }, text);
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.dataset.copied = "";
      setTimeout(() => delete button.dataset.copied, 1200);
    } catch {
      getSelection()?.selectAllChildren(button); // no clipboard without HTTPS: at least it is marked
    }
  });
  return button;
}

export const STATES = {
  failed: { label: "Failed", sign: "✕" },
  slow: { label: "Slow", sign: "◷" },
  degraded: { label: "Degraded", sign: "△" },
  refused: { label: "Refused", sign: "⊘" },
  ok: { label: "OK", sign: "✓" },
};

export function badge(state, text) {
  const { label, sign } = STATES[state] ?? { label: state, sign: "•" };
  return h("span", { class: "badge", "data-state": state }, h("span", { "aria-hidden": "true" }, sign), text ?? label);
}

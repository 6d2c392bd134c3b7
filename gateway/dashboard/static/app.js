// What every page shares: the API, toasts, dialogs, forms that call the API, the theme, the menu, and the live stream.

export const $ = (selector, root = document) => root.querySelector(selector);
export const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

/** An element: its text is always text, never markup. */
export function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (value !== null && value !== false) made.setAttribute(key, value);
  made.append(...children.filter((child) => child !== null));
  return made;
}

const SVG = "http://www.w3.org/2000/svg";
export function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** What the server handed to this page's script. */
export const given = (id) => JSON.parse($(`#${id}`)?.textContent ?? "null");

/** Call the API as whoever is signed in. Throws an Error with the server's message, its `code` and `status`. */
export async function api(method, path, body, options = {}) {
  const headers = { accept: "application/json" };
  if (method !== "GET") headers["x-csrf-token"] = $("meta[name=csrf]").content;
  if (body !== undefined) headers["content-type"] = "application/json";
  const answer = await fetch(path, {
    method, headers, body: body === undefined ? undefined : JSON.stringify(body), credentials: "same-origin", ...options,
  });
  if (!answer.ok) throw await failure(answer);
  if (options.raw) return answer;
  return answer.status === 204 ? null : answer.json();
}

async function failure(answer) {
  const told = await answer.json().catch(() => null);
  const error = new Error(told?.error?.message ?? `the server answered ${answer.status}`);
  error.code = told?.error?.code ?? "";
  error.status = answer.status;
  return error;
}

let fading;
export function toast(text, bad = false) {
  const place = $("#toast");
  place.textContent = text;
  place.classList.toggle("bad", bad);
  place.classList.add("on");
  clearTimeout(fading);
  fading = setTimeout(() => place.classList.remove("on"), bad ? 7000 : 3500);
}

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    toast("Copied");
  } catch {
    toast("The browser did not allow copying: select it and copy by hand", true);
  }
}

/** Run what a button does; it cannot be pressed twice, and what goes wrong is said. */
export async function busy(button, work) {
  if (button.disabled) return;
  button.disabled = true;
  try {
    return await work();
  } catch (error) {
    toast(error.message, true);
  } finally {
    button.disabled = false;
  }
}

/** The fields of a form as JSON: empty ones left out, checkboxes of one name as a list, numbers as numbers. */
export function values(form) {
  const found = {};
  for (const field of form.elements) {
    if (!field.name || field.disabled) continue;
    if (field.type === "checkbox") {
      if (field.checked) (found[field.name] ??= []).push(field.value);
    } else if (field.value !== "") {
      found[field.name] = ["number", "range"].includes(field.type) ? Number(field.value) : field.value;
    }
  }
  return found;
}

export function ask(question, action) {
  const dialog = $("#confirm");
  $("h2", dialog).textContent = question;
  $("[value=yes]", dialog).textContent = action;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((done) => dialog.addEventListener("close", () => done(dialog.returnValue === "yes"), { once: true }));
}

// --- numbers for people

export const count = (number) => Math.round(number).toLocaleString("en-US");
export const credits = (micro) => (micro / 1e6).toLocaleString("en-US", { minimumFractionDigits: 2, maximumFractionDigits: 2 });
export function seconds(ms) {
  if (ms < 60000) return `${Math.max(0, Math.round(ms / 1000))} s`;
  if (ms < 5400000) return `${Math.round(ms / 60000)} min`;
  return ms < 172800000 ? `${Math.round(ms / 3600000)} h` : `${Math.round(ms / 86400000)} d`;
}
export const tail = (id) => `…${id.slice(-6)}`;
export const plural = (number, one) => `${count(number)} ${one}${number === 1 ? "" : "s"}`;

// --- the live stream: one for all that listens on a page

const listeners = new Map();
let source;
export function watch(topic, listener) {
  if (!source) open();
  if (!listeners.has(topic)) {
    listeners.set(topic, []);
    source.addEventListener(topic, (event) => hear(topic, event));
  }
  listeners.get(topic).push(listener);
}
function hear(topic, event) {
  const news = JSON.parse(event.data);
  for (const listener of listeners.get(topic)) listener(news);
}
function open() {
  source = new EventSource("/dashboard/live");
  source.addEventListener("open", () => shine(true));
  source.addEventListener("error", () => {
    shine(false);
    if (source.readyState === EventSource.CLOSED) setTimeout(reopen, 5000); // a refusal, not a broken line
  });
}
function reopen() {
  open();
  for (const topic of listeners.keys()) source.addEventListener(topic, (event) => hear(topic, event));
}
function shine(on) {
  for (const each of $$(".live")) {
    each.dataset.on = on;
    each.textContent = on ? "Live" : "Reconnecting";
  }
}
addEventListener("pagehide", () => source?.close());

// --- on every page

const THEMES = ["", "light", "dark"];
const NAMES = { "": "as the system", light: "light", dark: "dark" };
for (const button of $$("[data-do=theme]")) {
  button.addEventListener("click", () => {
    const root = document.documentElement;
    const next = THEMES[(THEMES.indexOf(root.dataset.theme ?? "") + 1) % THEMES.length];
    root.dataset.theme = next;
    document.cookie = `rios_theme=${next}; path=/dashboard; max-age=31536000; samesite=lax`;
    toast(`Theme: ${NAMES[next]}`);
  });
}

const side = $(".side");
function menu(open) {
  side.classList.toggle("open", open);
  $("[data-do=menu]").setAttribute("aria-expanded", open);
  $(".veil")?.remove();
  if (!open) return;
  const veil = el("button", { class: "veil", "aria-label": "Close the menu" });
  veil.addEventListener("click", () => menu(false));
  document.body.append(veil);
  $("a", side).focus();
}
$("[data-do=menu]")?.addEventListener("click", () => menu(!side.classList.contains("open")));
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && side?.classList.contains("open")) {
    menu(false);
    $("[data-do=menu]").focus();
  }
});

for (const opener of $$("[data-opens]")) {
  opener.addEventListener("click", () => $(`#${opener.dataset.opens}`).showModal());
}
for (const closer of $$("dialog [data-do=close]")) closer.addEventListener("click", () => closer.closest("dialog").close());
for (const button of $$("[data-copy]")) button.addEventListener("click", () => copy($(button.dataset.copy).textContent));
for (const choice of $$("select[data-go]")) choice.addEventListener("change", () => location.assign(choice.value));

$("[data-do=sign-out]")?.addEventListener("click", (event) =>
  busy(event.currentTarget, async () => {
    await api("POST", "/v1/auth/logout");
    location.assign("/dashboard/sign-in");
  }),
);

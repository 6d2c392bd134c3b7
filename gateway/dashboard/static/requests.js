// Requests that run now: a row each, with its speed over the last second.
import { $, count, el, given, seconds, watch } from "./app.js";

const names = given("names");
const models = given("models");
const before = new Map();

function speed(each, now) {
  const last = before.get(each.id);
  before.set(each.id, { tokens: each.tokens, at: now, speed: each.tokens_per_s });
  if (!last || now - last.at < 500) return last?.speed ?? each.tokens_per_s;
  const found = ((each.tokens - last.tokens) * 1000) / (now - last.at);
  before.get(each.id).speed = found;
  return found;
}

function row(each, now, most) {
  const rate = speed(each, now);
  const bar = el("progress", { max: Math.max(1, each.max_tokens), value: each.tokens, "aria-label": `${each.tokens} of at most ${each.max_tokens} tokens` });
  return el(
    "tr", { "data-request": each.id },
    el("td", { "data-label": "Model" }, el("b", { title: each.model }, models[each.model] ?? each.model.slice(0, 40))),
    el("td", { "data-label": "User" }, names[each.user_id] ?? "–"),
    el("td", { "data-label": "Endpoint" }, el("code", {}, each.endpoint)),
    el("td", { "data-label": "Prompt", class: "num" }, count(each.prompt_tokens)),
    el("td", { "data-label": "Answer", class: "num" }, count(each.tokens)),
    el("td", { "data-label": "Tokens/s", class: "num" }, el("b", {}, rate.toFixed(1))),
    el("td", { "data-label": "Of at most", class: "wide" }, bar),
    el("td", { "data-label": "Running", class: "num" }, seconds(now - each.started_ms)),
  );
}

let running = [];
watch("requests", (news) => {
  const ended = running.some((old) => !news.some((each) => each.id === old.id));
  running = news;
  const now = Date.now();
  $("#running").replaceChildren(...news.map((each) => row(each, now)));
  $("#idle").hidden = news.length > 0;
  $("#table").hidden = news.length === 0;
  $("#active").textContent = count(news.length);
  for (const id of before.keys()) if (!news.some((each) => each.id === id)) before.delete(id);
  if (ended) setTimeout(refresh, 800);
});
watch("pulse", (pulse) => ($("#speed").textContent = pulse.tokens_per_s.toFixed(1)));

/** The table of settled requests, as the server draws it. */
async function refresh() {
  const answer = await fetch("/dashboard/requests", { credentials: "same-origin" });
  if (!answer.ok) return;
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const rows = page.querySelector("#settled");
  if (rows) $("#settled").replaceWith(rows);
}

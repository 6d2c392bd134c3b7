// The playground: the same API that clients use, streamed.
import { $, api, el, toast } from "./app.js";

const lines = $("#lines");
const form = $("#ask");
const input = $("#message");
const send = $("#send");
const said = [];
let running = null;

function line(by, text, kind) {
  const made = el("article", { class: `line ${kind}` }, el("p", { class: "by" }, by), el("div", { class: "text" }, text));
  $("#hello")?.remove();
  lines.append(made);
  made.scrollIntoView({ block: "end" });
  return made;
}

/** Server-sent events of a fetch: the JSON of each, up to [DONE]. */
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((each) => each.startsWith("data: ")).map((each) => each.slice(6)).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

function question() {
  const number = (id) => Number($(id).value);
  const system = $("#system").value.trim();
  return {
    model: $("#model").value,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...said],
    temperature: number("#temperature"),
    top_p: number("#top_p"),
    max_tokens: number("#max_tokens"),
    stream: true,
    stream_options: { include_usage: true },
  };
}

async function answer() {
  const shown = line($("#model").selectedOptions[0].textContent, "", "assistant running");
  const text = $(".text", shown);
  const started = performance.now();
  let first = 0;
  let usage = null;
  running = new AbortController();
  busyNow(true);
  try {
    const stream = await api("POST", "/v1/chat/completions", question(), { raw: true, signal: running.signal });
    for await (const event of events(stream)) {
      if (event.error) throw new Error(event.error.message);
      const piece = event.choices[0]?.delta?.content;
      usage = event.usage ?? usage;
      if (!piece) continue;
      first ||= performance.now();
      const low = lines.scrollHeight - lines.scrollTop - lines.clientHeight < 80; // follow, unless somebody reads above
      text.append(piece);
      if (low) lines.scrollTop = lines.scrollHeight;
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      shown.classList.add("bad");
      text.append(text.textContent ? `\n\n${error.message}` : error.message);
    }
  }
  shown.classList.remove("running");
  if (text.textContent && !shown.classList.contains("bad")) said.push({ role: "assistant", content: text.textContent });
  figures(shown, usage, started, first);
  $("#told").textContent = `Answer: ${text.textContent}`;
  running = null;
  busyNow(false);
}

function figures(shown, usage, started, first) {
  if (!usage || !first) return;
  const spent = (performance.now() - first) / 1000;
  const parts = [`${usage.prompt_tokens} + ${usage.completion_tokens} tokens`, `first after ${((first - started) / 1000).toFixed(2)} s`];
  if (spent > 0.05 && usage.completion_tokens > 1) parts.push(`${((usage.completion_tokens - 1) / spent).toFixed(1)} tokens/s`);
  shown.append(el("p", { class: "figures" }, parts.join(" · ")));
  lines.scrollTop = lines.scrollHeight;
}

function busyNow(on) {
  send.textContent = on ? "Stop" : "Send";
  send.classList.toggle("primary", !on);
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return running.abort();
  const text = input.value.trim();
  if (!text) return toast("Write something first", true);
  input.value = "";
  said.push({ role: "user", content: text });
  line("You", text, "user");
  answer();
});
input.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!running) form.requestSubmit();
  }
});
$("#clear").addEventListener("click", () => {
  running?.abort();
  said.length = 0;
  lines.replaceChildren();
  input.focus();
});
for (const knob of document.querySelectorAll(".knobs input[type=range]")) {
  const tell = () => ($(`output[for=${knob.id}]`).textContent = knob.value);
  knob.addEventListener("input", tell);
  tell();
}

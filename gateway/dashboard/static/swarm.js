// The swarm map: nodes around this one, as far away as their round trips say; and who holds what.
import { $, count, el, given, plural, seconds, svg, tail, watch } from "./app.js";
import { Heat } from "./heat.js";

const CENTRE = { x: 210, y: 200 };
const REACH = { x: 165, y: 165 };
const RINGS_MS = [1, 10, 50, 200];
const nodes = new Map();
let workers = given("workers");
let maps = given("maps");
let chosen = null;
let model = maps[0]?.id ?? null;

const sky = $("#sky");
const links = svg("g");
const dots = svg("g");

/** 0 to 1 by the logarithm of the round trip: a millisecond is near, a quarter of a second at the edge. */
function distance(ms) {
  if (ms === null) return 1;
  return Math.min(1, 0.46 + (0.54 * Math.log10(1 + Math.max(0, ms))) / Math.log10(251));
}

function ring(ms) {
  const far = distance(ms);
  return [
    svg("ellipse", { class: "ring", cx: CENTRE.x, cy: CENTRE.y, rx: REACH.x * far, ry: REACH.y * far }),
    svg("text", { class: "faint", x: CENTRE.x, y: CENTRE.y - REACH.y * far - 3 }, `${ms} ms`),
  ];
}

/** Nodes stand in the order of their ids, so that each keeps its place when others come and go. */
function place(worker, index, total) {
  if (worker.is_self) return CENTRE;
  const angle = (2 * Math.PI * (index + 0.5)) / Math.max(1, total) - Math.PI / 2;
  const far = distance(worker.round_trip_ms);
  return { x: CENTRE.x + REACH.x * far * Math.cos(angle), y: CENTRE.y + REACH.y * far * Math.sin(angle) };
}

function dot(worker) {
  const group = svg("g", { class: worker.is_self ? "node self" : "node", tabindex: 0, role: "button" });
  group.append(svg("circle"), svg("circle", { class: "core" }), svg("text"), svg("text", { class: "faint" }));
  const choose = () => select(chosen === worker.peer_id ? null : worker.peer_id);
  group.addEventListener("click", choose);
  group.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      choose();
    }
  });
  const line = svg("line", { class: "link" });
  links.append(line);
  dots.append(group);
  return { group, line };
}

function draw() {
  const others = workers.filter((worker) => !worker.is_self).toSorted((a, b) => (a.peer_id < b.peer_id ? -1 : 1));
  const most = Math.max(1, ...workers.map((worker) => worker.shards));
  const known = new Set(workers.map((worker) => worker.peer_id));
  for (const [id, old] of nodes) {
    if (known.has(id)) continue;
    old.group.remove();
    old.line.remove();
    nodes.delete(id);
  }
  for (const worker of workers) {
    const at = place(worker, others.indexOf(worker), others.length);
    if (!nodes.has(worker.peer_id)) nodes.set(worker.peer_id, dot(worker));
    const { group, line } = nodes.get(worker.peer_id);
    const radius = 11 + 9 * Math.sqrt(worker.shards / most);
    const [outer, core, name, more] = group.children;
    for (const circle of [outer, core]) {
      circle.setAttribute("cx", at.x);
      circle.setAttribute("cy", at.y);
    }
    outer.setAttribute("r", radius);
    core.setAttribute("r", Math.max(3, radius - 7));
    name.setAttribute("x", at.x);
    name.setAttribute("y", at.y + radius + 15);
    name.textContent = worker.is_self ? worker.name || "this node" : tail(worker.peer_id);
    more.setAttribute("x", at.x);
    more.setAttribute("y", at.y + radius + 28);
    more.textContent = worker.health === "gone" ? "gone" : worker.is_self ? "this node" : told(worker);
    group.dataset.health = worker.health;
    group.dataset.peer = worker.peer_id;
    group.setAttribute("aria-pressed", chosen === worker.peer_id);
    group.setAttribute("aria-label", `${worker.is_self ? "This node" : `Node ${worker.peer_id.slice(-6)}`}: ${worker.health}, ${plural(worker.shards, "shard")}`);
    for (const [key, value] of Object.entries({ x1: CENTRE.x, y1: CENTRE.y, x2: at.x, y2: at.y })) line.setAttribute(key, value);
    line.setAttribute("class", worker.linked ? "link" : "link off");
  }
  sky.setAttribute("aria-label", `${plural(workers.length, "node")}: ${workers.map((worker) => worker.health).join(", ")}`);
}

function told(worker) {
  const trip = worker.round_trip_ms === null ? "unmeasured" : `${worker.round_trip_ms.toFixed(1)} ms`;
  return worker.region ? `${worker.region} · ${trip}` : trip;
}

// --- the list

function row(worker) {
  const hardware = worker.hardware;
  const gpu = hardware.gpus.length ? ` · ${hardware.gpus[0].name}` : "";
  const made = el(
    "tr", { "data-peer": worker.peer_id, "data-health": worker.health },
    el("td", { class: "wide" }, el("div", {}, el("b", {}, worker.is_self ? worker.name : tail(worker.peer_id))), el("code", { class: "faint nowrap" }, `${worker.peer_id.slice(0, 10)}…${worker.peer_id.slice(-6)}`)),
    el("td", { "data-label": "Health" }, badge(worker.health)),
    el("td", { "data-label": "Region", class: "nowrap" }, worker.region ? worker.region + (worker.region_inferred ? " ≈" : "") : "–"),
    el("td", { "data-label": "Round trip", class: "num" }, worker.is_self ? "–" : worker.round_trip_ms === null ? "–" : `${worker.round_trip_ms.toFixed(1)} ms`),
    el("td", { "data-label": "Hardware", class: "nowrap" }, `${plural(hardware.cores, "core")}, ${(hardware.ram_bytes / 1e9).toFixed(0)} GB${gpu}`),
    el("td", { "data-label": "Shards", class: "num" }, count(worker.shards)),
    el("td", { "data-label": "Waiting rows", class: "num" }, count(worker.load)),
    el("td", { "data-label": "Credits / TFLOP", class: "num" }, (worker.microcredits_per_tflop / 1e6).toLocaleString("en-US", { maximumFractionDigits: 6 })),
    el("td", { "data-label": "Audits", class: "nowrap" }, audits(worker.reputation)),
    el("td", { "data-label": worker.health === "gone" ? "Last seen" : "Since", class: "num" }, since(worker)),
  );
  return made;
}

function badge(state) {
  return el("span", { class: "badge", "data-state": state }, state);
}

function audits(reputation) {
  if (reputation.wrong) return el("span", { class: "badge", "data-state": "failed" }, `${reputation.wrong} wrong`);
  return reputation.audits ? `${count(reputation.audits)} right` : "none yet";
}

function since(worker) {
  return worker.since_ms ? `${seconds(Date.now() - worker.since_ms)}${worker.health === "gone" ? " ago" : ""}` : "–";
}

function list() {
  $("#list").replaceChildren(...workers.map(row));
  const well = workers.filter((worker) => worker.health === "healthy").length;
  $("#told").textContent = `${well} healthy of ${workers.length}`;
}

// --- the heat map

const heat = maps.length ? new Heat($("#heat"), maps[0]) : null;

function select(peerId) {
  chosen = peerId;
  heat?.only(peerId);
  const worker = workers.find((each) => each.peer_id === peerId);
  $("#chosen").textContent = worker ? `What ${worker.is_self ? "this node" : tail(worker.peer_id)} holds` : "";
  draw();
}

$("#model")?.addEventListener("change", (event) => {
  model = event.target.value;
  const map = maps.find((each) => each.id === model);
  if (map) heat.update(map);
});

watch("workers", (news) => {
  workers = news;
  draw();
  list();
});
watch("maps", (news) => {
  maps = news;
  const map = maps.find((each) => each.id === model);
  if (map) heat?.update(map);
});

sky.append(...RINGS_MS.flatMap(ring), links, dots);
draw();
list();

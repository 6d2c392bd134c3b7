// The overview: figures and the small map follow the stream.
import { $, count, credits, given, plural, svg, watch } from "./app.js";
import { Heat } from "./heat.js";

const speeds = [];
const SPEEDS_MAX = 60;

/** The newest speed stands at the right edge; what was before the page was opened is not known. */
function spark(place) {
  const top = Math.max(1, ...speeds);
  const x = (index) => 100 - ((speeds.length - 1 - index) / (SPEEDS_MAX - 1)) * 100;
  const line = `M${speeds.map((speed, index) => `${x(index)} ${23 - (speed / top) * 21}`).join("L")}`;
  place.replaceChildren(
    svg("path", { class: "ground", d: "M0 23.5L100 23.5" }),
    svg("path", { class: "under", d: `${line}L100 24L${x(0)} 24Z` }),
    svg("path", { d: line }),
  );
}

watch("pulse", (pulse) => {
  speeds.push(pulse.tokens_per_s);
  if (speeds.length > SPEEDS_MAX) speeds.shift();
  $("#speed").textContent = pulse.tokens_per_s.toFixed(1);
  $("#active").textContent = count(pulse.active);
  if (speeds.length > 1) spark($("#spark"));
  if ("balance" in pulse && $("#balance")) $("#balance").textContent = credits(pulse.balance);
  const note = $("#problems");
  note.hidden = pulse.ready;
  $("span", note).textContent = pulse.reasons.join("; ");
});

watch("workers", (workers) => {
  const well = workers.filter((worker) => worker.health === "healthy");
  $("#workers").textContent = count(well.length);
  $("#workers-of").textContent = `of ${plural(workers.length, "known node")}`;
});

watch("deployments", (deployments) => {
  for (const each of deployments) {
    const row = document.getElementById(`d-${each.id}`);
    if (!row) continue;
    const badge = $(".badge", row);
    badge.dataset.state = badge.textContent = each.state;
    $(".least", row).textContent = `${each.replicas_min} of ${each.replicas}`;
  }
});

const first = given("maps")?.[0];
if (first) {
  const heat = new Heat($("#map"), first, { still: true });
  watch("maps", (maps) => {
    const same = maps.find((each) => each.id === first.id);
    if (same) heat.update(same);
  });
}

// Deployments: what changes is shown where it stands; the buttons call the API.
import { $, $$, api, ask, busy, el, given, plural, toast, values, watch } from "./app.js";

const TICKS_MAX = 72;
const told = new Map(given("deployments").map((each) => [each.id, each.state]));

function show(each) {
  const card = document.getElementById(`d-${each.id}`);
  if (!card) return;
  const badge = $(".badge", card);
  badge.dataset.state = badge.textContent = each.state;
  $(".reason", card).textContent = each.reason;
  $(".least", card).textContent = each.replicas_min;
  $(".wanted", card).textContent = each.replicas;
  $(".done", card).textContent = `${each.shards_ready} of ${plural(each.shards.length, "shard")}`;
  const strip = $(".strip", card);
  const step = Math.ceil(each.shards.length / TICKS_MAX);
  const parts = Array.from({ length: Math.ceil(each.shards.length / step) }, (_, n) => each.shards.slice(n * step, (n + 1) * step));
  strip.replaceChildren(...parts.map(tick));
  strip.setAttribute("aria-label", `${each.shards_ready} of ${each.shards.length} shards have all their replicas`);
  if (told.get(each.id) !== each.state) toast(`${each.model || "A model"} is ${each.state}`, each.state === "failed");
  told.set(each.id, each.state);
}

/** One mark for a few shards: as bad as the worst of them. */
function tick(shards) {
  const worst = shards.toSorted((a, b) => a.healthy / a.wanted - b.healthy / b.wanted)[0];
  const title = `${worst.id}: ${worst.healthy} of ${worst.wanted}${worst.problem ? `, ${worst.problem}` : ""}`;
  return el("i", { class: worst.healthy >= worst.wanted ? null : worst.healthy ? "short" : "none", title });
}

watch("deployments", (news) => {
  news.forEach(show);
  const here = new Set($$("[data-deployment]").map((card) => card.dataset.deployment));
  if (news.length !== here.size || news.some((each) => !here.has(each.id))) location.reload();
});
given("deployments").forEach(show);

const path = (id) => `/v1/deployments/${encodeURIComponent(id)}`;
for (const card of $$("[data-deployment]")) {
  const id = card.dataset.deployment;
  for (const button of $$("[data-step]", card)) {
    button.addEventListener("click", () =>
      busy(button, async () => {
        const replicas = Number($(".wanted", card).textContent) + Number(button.dataset.step);
        if (replicas < 1) return toast("One replica is the least: take it back instead", true);
        show(await api("PATCH", path(id), { replicas }));
      }),
    );
  }
  $("[data-do=undeploy]", card)?.addEventListener("click", async (event) => {
    const button = event.currentTarget;
    if (!(await ask(`Take ${card.dataset.model} back? Its nodes stop serving it.`, "Undeploy"))) return;
    await busy(button, () => api("DELETE", path(id)));
    location.reload();
  });
}

$("#deploy form")?.addEventListener("submit", (event) => {
  event.preventDefault();
  busy($("[type=submit]", event.target), async () => {
    await api("POST", "/v1/deployments", values(event.target));
    location.reload();
  });
});

// Billing: set and remove budgets, pay in. Credits are typed; the API counts in microcredits.
import { $, $$, api, ask, busy, values } from "./app.js";

const micro = (credits) => Math.round(credits * 1e6);

function on(form, work) {
  $(form)?.addEventListener("submit", (event) => {
    event.preventDefault();
    busy($("[type=submit]", event.target), async () => {
      await work(values(event.target));
      location.reload();
    });
  });
}

on("#limit-form", ({ credits }) => {
  const { user, key } = $("#b-for").selectedOptions[0].dataset;
  return api("PUT", "/v1/billing/budgets", { microcredits: micro(credits), user_id: user, key_id: key || undefined });
});
on("#pay-form", ({ credits, ...more }) => api("POST", "/v1/billing/topups", { ...more, microcredits: micro(credits) }));

for (const row of $$("[data-budget]")) {
  $("[data-do=remove]", row)?.addEventListener("click", async (event) => {
    const button = event.currentTarget;
    if (!(await ask(`Remove the budget of “${button.dataset.name}”?`, "Remove"))) return;
    await busy(button, async () => {
      await api("DELETE", `/v1/billing/budgets/${encodeURIComponent(row.dataset.budget)}`);
      location.reload();
    });
  });
}

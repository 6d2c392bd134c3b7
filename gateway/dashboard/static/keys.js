// Keys: the secret of a new one is shown once, in a dialog that closes only when somebody says so.
import { $, $$, api, ask, busy, values } from "./app.js";

$("#make-form")?.addEventListener("submit", (event) => {
  event.preventDefault();
  const { name, scopes, days, cache } = values(event.target);
  const wanted = { name, scopes, cache: Boolean(cache), expires_at_ms: days ? Date.now() + Number(days) * 86400000 : undefined };
  busy($("[type=submit]", event.target), async () => {
    const made = await api("POST", "/v1/api-keys", wanted);
    $("#make").close();
    $("#secret").textContent = made.secret;
    $("#made").showModal();
  });
});
$("#made")?.addEventListener("cancel", (event) => event.preventDefault());
$("#kept")?.addEventListener("click", () => {
  $("#secret").textContent = "";
  location.reload();
});

for (const button of $$("[data-revoke]")) {
  button.addEventListener("click", async () => {
    if (!(await ask(`Revoke ${button.dataset.name}? What uses it stops working within seconds.`, "Revoke"))) return;
    await busy(button, async () => {
      await api("DELETE", `/v1/api-keys/${encodeURIComponent(button.dataset.revoke)}`);
      location.reload();
    });
  });
}

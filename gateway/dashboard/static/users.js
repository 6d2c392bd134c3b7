// Users: make, invite, give a role, shut out.
import { $, $$, api, ask, busy, toast, values } from "./app.js";

const path = (id) => `/v1/users/${encodeURIComponent(id)}`;

async function invite(id) {
  const made = await api("POST", "/v1/auth/invites", { user_id: id });
  $("#link").textContent = `${location.origin}/dashboard/invite#${made.token}`;
  $("#invited").showModal();
}

$("#make-form").addEventListener("submit", (event) => {
  event.preventDefault();
  busy($("[type=submit]", event.target), async () => {
    const made = await api("POST", "/v1/users", values(event.target));
    $("#make").close();
    await invite(made.id);
  });
});
$("#sent").addEventListener("click", () => location.reload());

const does = {
  invite: (id) => invite(id),
  disable: async (id, name) => {
    if (!(await ask(`Disable ${name}? Their keys and sessions stop working within seconds.`, "Disable"))) return;
    await api("PATCH", path(id), { disabled: true });
    location.reload();
  },
  enable: async (id) => {
    await api("PATCH", path(id), { disabled: false });
    location.reload();
  },
};
for (const row of $$("[data-user]")) {
  for (const button of $$("[data-do]", row)) {
    button.addEventListener("click", () => busy(button, () => does[button.dataset.do](row.dataset.user, $("b", row).textContent)));
  }
}
for (const choice of $$("[data-user] select")) {
  choice.addEventListener("change", async () => {
    const row = choice.closest("[data-user]");
    try {
      await api("PATCH", path(row.dataset.user), { role: choice.value });
      toast(`${$("b", row).textContent} is ${choice.value} now`);
    } catch (error) {
      toast(error.message, true);
      choice.value = choice.dataset.was;
    }
    choice.dataset.was = choice.value;
  });
}

// One's own account: the second factor, the password, the sessions, who one is elsewhere.
import { $, $$, api, busy, toast, values } from "./app.js";

function on(form, work) {
  $(form)?.addEventListener("submit", (event) => {
    event.preventDefault();
    busy($("[type=submit]", event.target), () => work(values(event.target)));
  });
}

let step = 1;
const steps = [
  async ({ password = "" }) => {
    const begun = await api("POST", "/v1/auth/totp/enrol", { password });
    $("#e-secret").textContent = begun.secret;
    $("#e-uri").href = begun.uri;
    go(2);
    $("#e-code").focus();
  },
  async ({ code = "" }) => {
    const done = await api("POST", "/v1/auth/totp/confirm", { code: code.replaceAll(" ", "") });
    $("#e-codes").textContent = done.recovery_codes.join("\n");
    $("#enrol [data-do=close]").hidden = true;
    $("#enrol [type=submit]").textContent = "I have kept them";
    go(3);
  },
  async () => location.reload(),
];
function go(to) {
  step = to;
  for (const each of [1, 2, 3]) $(`#step-${each}`).hidden = each !== to;
}
on("#enrol-form", (given) => steps[step - 1](given));
$("#enrol")?.addEventListener("cancel", (event) => step === 3 && event.preventDefault());

on("#off-form", async ({ password = "", code }) => {
  await api("POST", "/v1/auth/totp/disable", { password, code });
  location.reload();
});
on("#change-form", async ({ password = "", new_password, code = "" }) => {
  await api("POST", "/v1/auth/password", { password, new_password, code: code.replaceAll(" ", "") });
  $("#change").close();
  $("#change-form").reset();
  toast("The password is changed");
});
on("#link-form", async ({ password = "", code = "" }) => {
  const proof = { password, code: code.replaceAll(" ", ""), next: location.pathname };
  location.assign((await api("POST", "/v1/auth/oidc/link", proof)).location);
});

for (const row of $$("[data-link]")) {
  $("[data-do=unlink]", row).addEventListener("click", (event) =>
    busy(event.currentTarget, async () => {
      const user = encodeURIComponent(row.closest("[data-user]").dataset.user);
      await api("DELETE", `/v1/users/${user}/identities/${row.dataset.link}`);
      location.reload();
    }),
  );
}
for (const row of $$("[data-session]")) {
  $("[data-do=end]", row)?.addEventListener("click", (event) =>
    busy(event.currentTarget, async () => {
      await api("DELETE", `/v1/auth/sessions/${encodeURIComponent(row.dataset.session)}`);
      row.remove();
    }),
  );
}

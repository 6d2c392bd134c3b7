// Signing in: e-mail and password, then the second factor where there is one.
import { $, api, busy, values } from "./app.js";

const form = $("#sign-in");
const problem = $("#problem");

function say(text, field) {
  problem.textContent = text;
  problem.hidden = !text;
  for (const input of form.querySelectorAll("input")) input.removeAttribute("aria-invalid");
  field?.setAttribute("aria-invalid", "true");
  field?.focus();
}

// The other provider vouched for them: only the code is missing.
function show(code) {
  if (!code) return say("Enter the code.", $("#code"));
  busy($("[type=submit]", form), async () => {
    try {
      location.assign((await api("POST", "/v1/auth/oidc/code", { code: code.replaceAll(" ", "") })).location);
    } catch (error) {
      say(error.message, $("#code"));
    }
  });
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const { email, password, code } = values(form);
  if ("elsewhere" in form.dataset) return show(code);
  if (!email) return say("Enter your e-mail address.", $("#email"));
  if (!password) return say("Enter your password.", $("#password"));
  busy($("[type=submit]", form), async () => {
    try {
      await api("POST", "/v1/auth/login", { email, password, code: code?.replaceAll(" ", "") ?? "", cookie: true });
      location.assign(form.dataset.next);
    } catch (error) {
      if (error.code !== "totp_required") return say(error.message, code ? $("#code") : $("#password"));
      say("");
      $("#first").hidden = true;
      $("#second").hidden = false;
      $("#code").required = true;
      $("#code").focus();
    }
  });
});

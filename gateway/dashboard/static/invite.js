// Accepting an invite: its token stands behind the # of the address, which no server and no referrer ever sees.
import { $, api, busy, values } from "./app.js";

$("#accept").addEventListener("submit", (event) => {
  event.preventDefault();
  const problem = $("#problem");
  busy($("[type=submit]", event.target), async () => {
    try {
      await api("POST", "/v1/auth/accept", { token: location.hash.slice(1), password: values(event.target).password ?? "" });
      location.assign("/dashboard/sign-in");
    } catch (error) {
      problem.textContent = error.message;
      problem.hidden = false;
    }
  });
});

"""The page at ``/``: what this is, where its API is, what it can answer with. Plain HTML, no scripts."""

from collections.abc import Sequence
from html import escape

from config.generation import ModelInfo

_STYLE = """
:root { color-scheme: light dark }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 44rem; margin: 3rem auto; padding: 0 1rem }
code, pre { font-family: ui-monospace, monospace; font-size: .9em }
pre { padding: 1rem; overflow-x: auto; border: 1px solid #8886; border-radius: .5rem }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #8884 }
"""

HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def home(base_url: str, models: Sequence[tuple[str, ModelInfo]], reasons: Sequence[str], *, keys: bool) -> str:
    """The page. ``reasons`` say why the node is not ready, if it is not; ``keys``: requests need an API key."""
    rows = "".join(_row(name, info) for name, info in models)
    table = f"<table><tr><th>Model</th><th>Context</th><th>State</th></tr>{rows}</table>" if rows else ""
    first = models[0][0] if models else "MODEL"
    state = "Ready." if not reasons else "Not ready: " + "; ".join(escape(reason) for reason in reasons) + "."
    header = " \\\n  -H 'Authorization: Bearer rios_...'" if keys else ""
    body = f'{{"model": "{first}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    curl = f"curl {base_url}/chat/completions -H 'Content-Type: application/json'{header} \\\n  -d '{body}'"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>RiOS gateway</title><style>{_STYLE}</style></head><body>
<h1>RiOS gateway</h1>
<p>This node answers with language models whose experts run on many people's machines. It speaks OpenAI's API, so any
client of that API works with this base URL:</p>
<pre>{escape(base_url)}</pre>
<p>{state} {"Requests need an API key from the operator." if keys else "Requests need no API key."}</p>
<h2>Models</h2>
{table or "<p>None yet.</p>"}
<h2>Try it</h2>
<pre>{escape(curl)}</pre>
<p><a href="/dashboard">Dashboard</a> ·
<a href="/openapi.json">OpenAPI document</a> · <a href="/readyz">readiness</a> · <a href="/metrics">metrics</a></p>
</body></html>
"""


def _row(name: str, info: ModelInfo) -> str:
    state = "ready" if info.ready else escape(info.reason or "not ready")
    return f"<tr><td><code>{escape(name)}</code></td><td>{info.context_tokens}</td><td>{state}</td></tr>"

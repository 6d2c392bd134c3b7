"""The optional HTTP edge: OpenAI-compatible API, accounts and money. Knows engine and ledger only through ``ports``.

A request's way: ``server`` (connection) -> ``exchange`` (id, body cap, disconnect) -> ``app`` (route) -> ``openai`` ->
``guard`` (who) -> ``limits`` -> ``till`` (reserve; ``books`` and ``db`` below it) -> ``ports`` (the engine), and back.
``gateway.gateway.open_gateway`` starts all of it; ``gateway.accounts.open_accounts`` manages users and keys without it.

Importing this package imports none of that: a node without a gateway does not pay for one.
"""

"""The optional HTTP edge: OpenAI-compatible API, accounts and money. Knows engine and ledger only through ``ports``."""

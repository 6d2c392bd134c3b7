"""Sans-IO ledger rules: objects, validity, state, votes, channels."""

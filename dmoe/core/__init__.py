"""Sans-IO parts: what a model is made of, who holds what, which replica to ask, what the next token is."""

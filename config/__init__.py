"""Vocabulary, errors, settings, genesis and seed files. Standard library only; every package may import this."""

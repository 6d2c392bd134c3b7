"""Decentralized mixture of experts: models cut into shards, served to peers, called from a layer loop.

``core/`` is sans-IO; ``importer/`` makes shards out of GGUF files; ``ports`` is what dmoe needs of a ledger.
"""

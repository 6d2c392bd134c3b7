"""The replicated, signed billing ledger: account chains with one writer each, certificates of witnesses, no blockchain.

``core/`` is a sans-IO state machine; ``ledger.py`` is the package's face.
"""

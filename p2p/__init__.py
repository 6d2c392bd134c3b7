"""Peer-to-peer layer: the only importer of libp2p.

``face`` is what others see; ``network`` implements it over libp2p (``host``, ``streams``, ``rpc``, ``links``,
``directory``, ``gossip``, ``blobs``), ``memory`` in memory; ``core/`` holds the sans-IO protocol parts.
"""

"""Decentralized mixture of experts: models cut into shards, served to peers, called from a layer loop.

A request goes down this list, a shard's answer comes back up:

- generation: ``engine`` takes requests, ``passes`` (``slots``, ``outbox``, ``tallies``) shares each pass between
  them, ``drafting``, ``constraint`` (``grammar`` in processes of its own), ``tools``, ``template``, ``text``,
  ``embedding``; ``aside``, ``textaside`` strangers' text in a process of its own
- which models and routes there are: ``models``, ``planning`` (``timing``), ``runner`` the seam between the two halves
- a model here: ``layers`` the loop over ``segment`` and ``kv`` caches; ``attention``, ``latent``, ``graphs``,
  ``operators`` the graphs; ``weights``, ``runtime``, ``pages`` what they are loaded with; ``layerwise``, ``golden``
- experts at peers: ``caller``, ``session``, ``asking``, ``jobs``, ``hedging``, ``replicas``, ``purse``, ``tally``
- experts for peers: ``worker``, ``batches``, ``loaded``, ``threads``; ``stages/`` is both sides of whole layers;
  ``cells/`` the processes in which strangers' shards and models run, and the walls around every such process
- a node's share of the models: ``hosting``, ``taking``, ``fetching``, ``deployments``, ``store``, ``shardfile``
- what this machine can do: ``hardware``, ``measuring``

``core/`` is sans-IO; ``importer/`` makes shards out of other people's files; ``ports`` is what dmoe needs of a ledger.
"""

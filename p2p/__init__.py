"""Peer-to-peer layer: the only importer of libp2p.

``face`` is what others see; ``network`` implements it over libp2p, ``memory`` in memory; ``core/`` holds the sans-IO
protocol parts. From the bottom up: ``noise`` (its handshake, with or without a swarm key), ``secure`` (Noise session
and yamux, made quick), ``streams`` (one stream of them), ``kademlia`` (its DHT, bounded),
``addressbook`` and ``host`` (libp2p, tamed) are the only importers of libp2p; ``carrier`` says what ``rpc`` needs,
``pool`` runs handlers, ``links`` keeps one link per peer; ``directory``, ``gossip`` and ``blobs`` are built on calls;
``fetch`` brings a file from several peers; ``mesh`` dials, ``peerbook`` remembers, ``addressbook`` keeps what libp2p
hears apart; ``keyfile`` keeps the identity, ``swarmfile`` a private swarm's key. ``reachability`` joins how a node is
reached: ``reach`` finds out, ``upnp`` asks the router, ``relay`` and ``splice`` go through others, ``punch`` opens a
direct way.
"""

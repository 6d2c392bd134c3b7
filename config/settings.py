"""Every setting, once: frozen dataclasses with their defaults, their help and their bounds.

The TOML file, the environment, the flags, ``rios config show`` and the reference page are all made from these fields:
a field's metadata holds its help and, where it has any, its choices or its minimum and maximum.
Sizes are bytes, times milliseconds or seconds as the name says, money microcredits.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from config.generation import RouteWish


def _setting(default: Any, help: str, **bounds: Any) -> Any:  # noqa: ANN401 - a field of any type
    return field(default=default, metadata={"help": help, **bounds})


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings:
    """``[node]``"""

    name: str = _setting("", "A name for people; shown by status and logs. Empty: the short peer id.")
    data_dir: str = _setting("", "Where keys, models, ledger and accounts live. Empty: the XDG data folder.")
    log_level: str = _setting("info", "Least important log level shown.", choices=("debug", "info", "warning", "error"))
    log_format: str = _setting("text", "How a log line looks.", choices=("text", "json"))
    region: str = _setting("", "Where this node stands, e.g. eu-west. Free text.")
    metrics_port: int = _setting(
        0, "Prometheus port on 127.0.0.1; 0: off (a gateway always has /metrics).", minimum=0, maximum=65535
    )
    trace_endpoint: str = _setting(
        "",
        "Where traces go: an OTLP/HTTP collector, e.g. http://127.0.0.1:4318/v1/traces, or file:/path for one JSON "
        "object per span and line. Empty: no traces.",
    )
    trace_ratio: float = _setting(
        1.0,
        "Share of requests to this node's gateway that are traced; one that comes with a traceparent is traced if "
        "that says so. What peers ask is traced if their trace says so.",
        minimum=0.0,
        maximum=1.0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class P2pSettings:
    """``[p2p]``"""

    listen: tuple[str, ...] = _setting(("/ip4/0.0.0.0/tcp/4701",), "Multiaddrs to listen on (TCP).")
    announce: tuple[str, ...] = _setting((), "Multiaddrs to tell others instead of the ones found, e.g. behind a NAT.")
    seeds: tuple[str, ...] = _setting(
        (), "Bootstrap multiaddrs with /p2p/<peer id>, or /dnsaddr/<name>; dead ones are tolerated."
    )
    dns_servers: tuple[str, ...] = _setting(
        (), "DNS servers to resolve seeds with, address or address:port. Empty: the system's."
    )
    mdns: str = _setting(
        "auto",
        "Find peers on the LAN by multicast DNS; auto: where the node listens on a private address, not loopback.",
        choices=("auto", "on", "off"),
    )
    seeds_file: str = _setting("", "A seed-list file: one multiaddr a line, # starts a comment.")
    allow: tuple[str, ...] = _setting(
        (), "Peer ids that may connect, besides this node's own seeds; empty: everybody (who has the swarm's key)."
    )
    peers_max: int = _setting(256, "Most connected peers.", minimum=1, maximum=100_000)
    frame_bytes_max: int = _setting(64 << 20, "Largest RPC frame accepted.", minimum=1 << 16, maximum=1 << 30)
    calls_per_peer_max: int = _setting(256, "Most calls of one peer in flight.", minimum=1, maximum=65536)
    connections_max: int = _setting(1024, "Most open connections, of all peers.", minimum=8, maximum=1_000_000)
    connections_per_address_max: int = _setting(
        64, "Most connections from one IP address (IPv6: /64); 0: no limit.", minimum=0, maximum=1_000_000
    )
    connections_per_subnet_max: int = _setting(
        128,
        "Most connections from one /24 (IPv6: /56); 0: no limit. Raise it for a big LAN.",
        minimum=0,
        maximum=1_000_000,
    )
    calls_per_second_max: int = _setting(
        20_000,
        "Calls a second of one peer; above that it is read more slowly. 0: no limit.",
        minimum=0,
        maximum=1 << 30,
    )
    peer_bytes_per_second_max: int = _setting(
        1 << 30,
        "Bytes a second taken from one peer; above that it is read more slowly. 0: no limit.",
        minimum=0,
        maximum=1 << 40,
    )
    upload_bytes_per_second_max: int = _setting(
        0, "Bytes a second this node sends to all peers together; 0: no limit.", minimum=0, maximum=1 << 40
    )
    download_bytes_per_second_max: int = _setting(
        0, "Bytes a second this node takes from all peers together; 0: no limit.", minimum=0, maximum=1 << 40
    )
    blob_upload_bytes_per_second_max: int = _setting(
        0, "Of that, bytes of models sent; 65536 at least, or 0: no limit.", minimum=0, maximum=1 << 40
    )
    blob_download_bytes_per_second_max: int = _setting(
        0, "Of that, bytes of models fetched; 65536 at least, or 0: no limit.", minimum=0, maximum=1 << 40
    )
    loopback_limits: bool = _setting(False, "Count connections of this very machine for address and subnet limits too.")
    lane: bool = _setting(True, "Make and take direct connections for calls; false: libp2p streams only.")
    upnp: bool = _setting(True, "Behind a router, ask it by UPnP to forward the port.")
    relay: str = _setting(
        "auto",
        "auto: be reached through public peers if nobody can dial this node, and pass connections (encrypted, within "
        "the limits below) on for such peers if it is public itself. off: neither.",
        choices=("auto", "off"),
    )
    relay_reservations_max: int = _setting(
        128, "Most peers that may be reached through this one.", minimum=0, maximum=100_000
    )
    relay_circuits_max: int = _setting(64, "Most connections passed on at the same time.", minimum=0, maximum=100_000)
    relay_bytes_per_second_max: int = _setting(
        8 << 20, "Bytes a second passed on for all together.", minimum=1 << 10, maximum=1 << 40
    )
    relay_circuit_bytes_max: int = _setting(
        4 << 30, "Bytes passed on over one connection before it is closed.", minimum=1 << 16, maximum=1 << 50
    )
    relay_circuit_seconds_max: int = _setting(
        3600, "Seconds after which a connection that is passed on is closed.", minimum=1, maximum=7 * 24 * 3600
    )
    advert_seconds: int = _setting(60, "Time between heartbeats of the own advert.", minimum=1, maximum=3600)


@dataclass(frozen=True, slots=True, kw_only=True)
class DmoeSettings:
    """``[dmoe]``"""

    device: str = _setting(
        "auto",
        "Where experts run; auto takes a GPU if there is one and never fails without.",
        choices=("auto", "cpu", "cuda"),
    )
    threads: int = _setting(0, "Compute threads; 0: all cores.", minimum=0, maximum=1024)
    serve: bool = _setting(True, "Take shards and serve experts to other peers.")
    orchestrate: tuple[str, ...] = _setting((), "Models (name or id) this node answers requests with.")
    disk_bytes_max: int = _setting(50 << 30, "Most disk that models may use.", minimum=0, maximum=1 << 60)
    ram_bytes_max: int = _setting(0, "Memory offered for shards; 0: half of the machine's.", minimum=0, maximum=1 << 60)
    publishers: tuple[str, ...] = _setting(
        (),
        "Peer ids whose models are taken; empty: only models of this node "
        'itself and of the seeds\' network issuer; "*": anybody.',
    )
    replicas: int = _setting(2, "Replicas per shard in deployments made here.", minimum=1, maximum=64)
    call_timeout_ms: int = _setting(10_000, "Deadline of one expert call.", minimum=10, maximum=600_000)
    queue_rows_max: int = _setting(
        4096, "Rows that may wait per shard before callers are told busy.", minimum=1, maximum=1 << 20
    )
    batch_rows_max: int = _setting(512, "Rows run at once.", minimum=1, maximum=1 << 16)
    generations_max: int = _setting(16, "Answers generated at the same time; others wait.", minimum=1, maximum=1024)
    waiting_max: int = _setting(64, "Requests that may wait for a slot.", minimum=0, maximum=65536)
    kv_tokens_max: int = _setting(
        1 << 17,
        "Tokens of all running answers together, each counted with its prompt and the most it may say: bounds the "
        "memory of their caches, and the length of a single one.",
        minimum=16,
        maximum=1 << 32,
    )
    pass_rows_max: int = _setting(
        256,
        "Tokens fed to a model at once: one of each running answer, drafts, and parts of prompts in what is left.",
        minimum=1,
        maximum=1 << 14,
    )
    drafts_max: int = _setting(
        16, "Tokens guessed ahead of an answer, as far as that pays; 0: none.", minimum=0, maximum=24
    )
    draft_model: str = _setting(
        "", "A small model here (name or id) with the same vocabulary, asked for guesses where that pays."
    )
    prefix_cache_tokens: int = _setting(
        1 << 15,
        "Tokens of earlier prompts and answers kept, so that a user's next prompt that begins the same starts behind "
        "them; 0: none.",
        minimum=0,
        maximum=1 << 32,
    )
    fused: bool = _setting(False, 'Deprecated: write route = "fused".')
    route: str = _setting(
        "auto",
        "How models answer. experts: attention here, experts wherever they are. stages: whole layers at other nodes. "
        "local, fused: all of it here (fused: one graph, faster, without the swarm's roundings). auto: whichever the "
        "planner expects to be best (rios plan MODEL shows why).",
        choices=("auto", "experts", "stages", "local", "fused"),
    )
    stage_hosts: tuple[str, ...] = _setting((), "Peer ids that may hold stages of answers made here; empty: any.")
    stage_forwarding: bool = _setting(
        True,
        "Hosts of stages give activations on to the next one; false: every one answers here, a round trip each.",
    )
    stage_sequences_max: int = _setting(
        256, "Key/value caches of stages here, one per sequence and stage.", minimum=1, maximum=1 << 20
    )
    stage_kv_bytes_max: int = _setting(
        0,
        "Memory for key/value caches of stages, out of ram_bytes_max; 0: a quarter of it.",
        minimum=0,
        maximum=1 << 60,
    )
    stage_idle_seconds: int = _setting(
        300, "A cache of a stage that was not used for so long is given up.", minimum=1, maximum=7 * 24 * 3600
    )
    trusted_peers: tuple[str, ...] = _setting(
        (), "Peer ids that may see private prompts: hosts of hidden states can reconstruct them (docs/privacy.md)."
    )
    trusted_peers_only: bool = _setting(
        False, "Send hidden states to dmoe.trusted_peers only; this node is always trusted."
    )
    local_layers: tuple[int, ...] = _setting(
        (0, 0),
        "How many of a model's first and of its last layers never leave this node, as [first, last].",
        minimum=0,
        maximum=4096,
        length=2,
    )
    plan_pins: tuple[str, ...] = _setting(
        (),
        "Who runs which layers, as layers=who: 0-9=here, 10-19=experts (attention here, experts anywhere), "
        "20-29=<peer id> (a stage there). Layers that are not named: as the planner likes.",
    )
    plan_price_weight: int = _setting(
        1,
        "Microseconds of an answer that a microcredit is worth to the planner; 0: only speed counts.",
        minimum=0,
        maximum=1_000_000,
    )
    sandbox: str = _setting(
        "auto",
        "Where shards that this node serves, and models that it answers with, run. auto: those of other publishers in "
        "cells (processes without network and files), this node's own here. required: all of them in cells, and no "
        "tokenizer, grammar or import without walls either. off: no cells. Where no cell can be had, what belongs in "
        "one is refused (rios doctor says why).",
        choices=("auto", "required", "off"),
    )
    allow_unsandboxed: bool = _setting(
        False, 'With sandbox = "auto": run shards of other publishers without a cell where none can be had.'
    )
    gvisor: bool = _setting(
        False,
        "Run cells in gVisor's sandbox, too (runsc must be installed): another kernel around each, slower calls.",
    )
    on_missing: str = _setting(
        "fail",
        "If nobody has an expert that a sparse router chose. fail: the answer ends with an error. renormalise: the "
        "weights of the other experts chosen are rescaled, and the answer is marked degraded.",
        choices=("fail", "renormalise"),
    )
    audit_share: float = _setting(
        0.02,
        "Share of the answers of peers that is asked for again elsewhere, or computed again here, to find those who "
        "answer wrongly (they are banned, and no longer paid); 0: none, and replicas are not tried out.",
        minimum=0.0,
        maximum=1.0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerSettings:
    """``[ledger]``"""

    genesis_file: str = _setting("", "The network's genesis file. Empty: <data dir>/genesis.json.")
    witness: bool = _setting(
        False,
        "Vote as a witness in every epoch whose committee names a key of this node: its own, or one made by "
        "rios ledger epoch-key.",
    )
    archive: bool = _setting(
        False,
        "Keep every entry since the genesis. Off: a new node starts from its peers' newest checkpoint where two of "
        "them prove one, and rios ledger checkpoint --prune drops what lies below.",
    )
    checkpoint_entries: int = _setting(
        100_000,
        "A witness makes a checkpoint after so many entries since the newest one; the newest two are kept. 0: only "
        "rios ledger checkpoint --new makes them.",
        minimum=0,
        maximum=1 << 40,
    )
    payout_account: str = _setting(
        "",
        "The peer id of the account that is paid for this node's work, e.g. one whose key is kept offline. "
        "Empty: this node's own.",
    )
    microcredits_per_tflop: int = _setting(
        1_000_000, "Price of 1 TFLOP of expert work here.", minimum=0, maximum=1 << 40
    )
    microcredits_per_kv_unit: int = _setting(
        0, "Price of a unit of KV cache memory (position-seconds).", minimum=0, maximum=1 << 40
    )
    channel_lock: int = _setting(5_000_000, "Microcredits locked when a channel is opened.", minimum=1, maximum=1 << 60)
    channel_hours: int = _setting(72, "Life of a channel.", minimum=2, maximum=24 * 365)
    prepay: int = _setting(
        50_000, "Voucher given at once to a new worker (W0), microcredits.", minimum=0, maximum=1 << 60
    )
    credit: int = _setting(50_000, "Unpaid work tolerated per channel (W), microcredits.", minimum=1, maximum=1 << 60)
    lag_calls: int = _setting(
        100,
        "Vouchers to a worker that lends stay behind by its last calls, so many, until these had time to be audited: "
        "a worker that answers wrongly is not paid for them. 0: nothing is held back, and workers are paid ahead.",
        minimum=0,
        maximum=10_000,
    )
    claim_seconds: int = _setting(
        3600, "Time between settlements of a channel's voucher.", minimum=1, maximum=24 * 3600
    )
    sync_seconds: int = _setting(10, "Time between anti-entropy rounds.", minimum=1, maximum=3600)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """``[gateway]``"""

    enabled: bool = _setting(False, "Serve the HTTP API.")
    host: str = _setting("127.0.0.1", "Address to listen on.")
    port: int = _setting(8080, "Port to listen on; 0 picks a free one.", minimum=0, maximum=65535)
    database: str = _setting(
        "",
        "Accounts database DSN (postgresql://... without a password: PGPASSWORD or a "
        "passfile). Empty: SQLite in the data dir.",
    )
    database_replica: str = _setting(
        "",
        "DSN of a read replica of the accounts database, for lists and reports; the accounts database itself is asked "
        "while it is away. Empty: none.",
    )
    require_key: bool = _setting(
        True,
        "Refuse requests without an API key. false: whoever reaches it may use it, by an address, as localhost or by "
        "the host of identity_public_url; by other names only with a key, as pages of any site can take such a name.",
    )
    requests_per_minute: int = _setting(600, "Per key.", minimum=1, maximum=1 << 30)
    tokens_per_minute: int = _setting(200_000, "Per key.", minimum=1, maximum=1 << 40)
    concurrent_per_key: int = _setting(32, "Requests of one key at the same time.", minimum=1, maximum=1 << 20)
    user_requests_per_minute: int = _setting(0, "Per user, all keys together. 0: no limit.", minimum=0, maximum=1 << 30)
    user_tokens_per_minute: int = _setting(0, "Per user, all keys together. 0: no limit.", minimum=0, maximum=1 << 40)
    user_concurrent: int = _setting(
        0, "Requests of one user at the same time, all keys together. 0: no limit.", minimum=0, maximum=1 << 20
    )
    address_requests_per_minute: int = _setting(
        0, "Per client address (a /64 of IPv6). 0: no limit.", minimum=0, maximum=1 << 30
    )
    redis: str = _setting(
        "",
        "Redis that several gateways count these limits in, e.g. redis://host:6379/0 (rediss:// for TLS; without a "
        "password: REDISCLI_AUTH). While it is away, and if this is empty, each gateway counts alone.",
    )
    queue_max: int = _setting(
        256, "Requests that may wait while the engine works at as many as it can.", minimum=0, maximum=65536
    )
    queue_per_user: int = _setting(64, "Of these, one user's.", minimum=1, maximum=65536)
    queue_seconds: int = _setting(
        60, "Time that a request waits for its turn at most; then it is told to come back.", minimum=1, maximum=3600
    )
    cache_bytes_max: int = _setting(
        16 << 20,
        "Memory for answers that are given again to who sends x-rios-cache: use, or has a key with cache (temperature "
        "0 only). 0: none.",
        minimum=0,
        maximum=1 << 34,
    )
    cache_seconds: int = _setting(3600, "How long such an answer is kept.", minimum=1, maximum=30 * 24 * 3600)
    trusted_proxies: tuple[str, ...] = _setting(
        (),
        "Addresses of reverse proxies whose X-Forwarded-For and X-Forwarded-Proto are believed: limits and attempts to "
        "sign in are counted by the first, cookies are for TLS alone by the second, and connections_per_second does "
        "not apply to them.",
    )
    connections_per_second: int = _setting(
        100,
        "New connections of one client address; more are closed at once, and who goes on is not listened to for some "
        "seconds. One whose client is refused what it asks counts fivefold; 64 requests of an address may be on their "
        "way, and 250 of the 1000 connections be its own. 0: no limit. A reverse proxy, whose clients all have its "
        "address, belongs into trusted_proxies.",
        minimum=0,
        maximum=1 << 20,
    )
    tls_certificate: str = _setting(
        "",
        "File with the certificate chain (PEM) for TLS 1.3 on the gateway itself; read again on SIGHUP. "
        "Empty: plain HTTP.",
    )
    tls_key: str = _setting("", "File with the certificate's key (PEM, mode 0600, no password).")
    body_bytes_max: int = _setting(4 << 20, "Largest request body.", minimum=1024, maximum=1 << 30)
    file_bytes_max: int = _setting(100 << 20, "Largest file that users may upload.", minimum=1024, maximum=1 << 34)
    batch_lines_at_once: int = _setting(
        4, "Lines of batches that this gateway answers at the same time.", minimum=1, maximum=1024
    )
    webhook_http: bool = _setting(False, "Let webhooks be http:// addresses, without TLS.")
    webhook_allow_networks: tuple[str, ...] = _setting(
        (), "Networks that webhooks may reach although they are not public, e.g. 10.1.0.0/16."
    )
    microcredits_per_million_input_tokens: int = _setting(200_000, "What users pay.", minimum=0, maximum=1 << 40)
    microcredits_per_million_output_tokens: int = _setting(800_000, "What users pay.", minimum=0, maximum=1 << 40)
    starting_balance: int = _setting(0, "Microcredits a new user starts with.", minimum=0, maximum=1 << 60)
    billing_payment_secret_file: str = _setting(
        "",
        "File with the secret that signs reports of payments (mode 0600; or RIOS_PAYMENT_SECRET in the environment). "
        "Empty: none are taken.",
    )
    identity_sign_up: bool = _setting(
        False, "Let anybody make a user with e-mail and password; false: an admin makes users and invites them."
    )
    identity_public_url: str = _setting(
        "",
        "The gateway's address as browsers see it, e.g. https://gateway.example (the same on all gateways of a "
        "database): for sign-ins by another provider, secure cookies behind a TLS proxy, and the issuer of tokens.",
    )
    identity_key_file: str = _setting(
        "",
        "The key that seals secrets in the accounts database (mode 0600; the same on all gateways of a database). "
        "Empty: <data dir>/gateway.key, made when it is missing.",
    )
    identity_access_minutes: int = _setting(15, "Life of an access token.", minimum=1, maximum=60)
    identity_session_hours: int = _setting(
        14 * 24, "Life of a session: then one signs in again.", minimum=1, maximum=24 * 366
    )
    oidc_issuer: str = _setting("", "OpenID Connect provider that users may sign in with, https://... Empty: none.")
    oidc_client_id: str = _setting("", "This gateway's name at the provider.")
    oidc_credentials_file: str = _setting(
        "", "File with the client secret that the provider gave (mode 0600). Empty: a public client, with PKCE only."
    )
    oidc_scopes: str = _setting("openid email profile", "What is asked of the provider.")
    oidc_sign_up: bool = _setting(
        False, "Make a user of whoever the provider vouches for; false: only identities that a user linked may sign in."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All sections."""

    node: NodeSettings = field(default_factory=NodeSettings)
    p2p: P2pSettings = field(default_factory=P2pSettings)
    dmoe: DmoeSettings = field(default_factory=DmoeSettings)
    ledger: LedgerSettings = field(default_factory=LedgerSettings)
    gateway: GatewaySettings = field(default_factory=GatewaySettings)


def chosen_route(dmoe: DmoeSettings) -> RouteWish:
    """The route in force: ``fused = true`` of version 0.2.0 still means ``route = "fused"``."""
    return "fused" if dmoe.fused and dmoe.route == "auto" else dmoe.route  # type: ignore[return-value]


def sections() -> dict[str, type[Any]]:
    """Section name -> its dataclass, in file order."""
    return {f.name: f.default_factory for f in fields(Settings) if is_dataclass(f.default_factory)}  # type: ignore[misc]

"""Writes ``wire.json``: what every implementation of docs/protocol.md has to produce, to read and to refuse.

``python tests/vectors/make_wire.py`` writes the file anew; the same code always writes the same bytes. A change of the
file is a change of the protocol. What is refused names the rule of docs/protocol.md that it breaks.
"""

import json
import warnings
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import numpy as np
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from noise.connection import Keypair, NoiseConnection

from dmoe.core import calls, wire
from p2p import handshake
from p2p.core import advert as adverts
from p2p.core import frames, headers, heartbeat, payload, providing, records
from p2p.core.advert import Advert, Gpu, Hardware, ModelOffer
from p2p.core.heartbeat import Heartbeat
from p2p.core.identity import Identity

FILE = Path(__file__).with_name("wire.json")
NOW_MS = 1_700_000_000_000
FRAME_BYTES_MAX = 1 << 16
ALICE, BOB = Identity.from_seed(b"\x01" * 32), Identity.from_seed(b"\x02" * 32)
MODEL = sha256(b"a model").hexdigest()
GROUP_ORDER = (1 << 252) + 27742317777372353535851937790883648493
LATER_ADDRESS = "/ip4/192.0.2.1/udp/4701/quic-v1"


def make() -> dict[str, Any]:
    """All vectors."""
    return {
        "about": "Test vectors of docs/protocol.md. Bytes are hex. Written by make_wire.py.",
        "now_ms": NOW_MS,
        "frame_bytes_max": FRAME_BYTES_MAX,
        "identities": [_identity(identity) for identity in (ALICE, BOB)],
        "not_peer_ids": _not_peer_ids(),
        "signatures": _signatures(),
        "adverts": _adverts(),
        "heartbeats": _heartbeats(),
        "provider_keys": _provider_keys(),
        "headers": _headers(),
        "frames": _frames(),
        "lanes": _lanes(),
        "tensors": _tensors(),
        "expert_calls": _expert_calls(),
    }


def _identity(identity: Identity) -> dict[str, str]:
    return {"seed": identity.seed.hex(), "public_key": identity.public_key.hex(), "peer_id": identity.peer_id}


def _not_peer_ids() -> list[dict[str, str]]:
    return [
        {"peer_id": "", "why": "empty"},
        {"peer_id": "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N", "why": "a hash of an RSA key"},
        {"peer_id": ALICE.peer_id[:-1], "why": "too short"},
        {"peer_id": "0" + ALICE.peer_id[1:], "why": "not base58"},
        {"peer_id": ALICE.peer_id + "\n", "why": "white space behind it"},
    ]


def _signatures() -> list[dict[str, Any]]:
    tag, body = b"rios/example/1\0", b"what is signed"
    good = ALICE.sign(tag, body)
    scalar = int.from_bytes(good[32:], "little") + GROUP_ORDER
    cases = [
        ("valid", ALICE.public_key, tag, good, True),
        ("another tag", ALICE.public_key, b"rios/other/1\0", good, False),
        ("another key", BOB.public_key, tag, good, False),
        ("one bit changed", ALICE.public_key, tag, bytes([good[0] ^ 1]) + good[1:], False),
        ("63 bytes", ALICE.public_key, tag, good[:-1], False),
        ("scalar not below the group order", ALICE.public_key, tag, good[:32] + scalar.to_bytes(32, "little"), False),
        # R = A = the neutral element and S = 0 fulfil the equation for every message
        ("key of small order", b"\1" + bytes(31), tag, b"\1" + bytes(63), False),
        ("key that is no point", b"\2" + bytes(31), tag, good, False),
    ]
    return [
        {"name": name, "public_key": key.hex(), "tag": t.hex(), "body": body.hex(), "signature": s.hex(), "valid": ok}
        for name, key, t, s, ok in cases
    ]


# -- adverts


def _example() -> Advert:
    return Advert(
        peer_id=ALICE.peer_id,
        seq=NOW_MS - 1000,
        expires_ms=NOW_MS + 60_000,
        addresses=(f"/ip4/192.0.2.1/tcp/4701/p2p/{ALICE.peer_id}", "/dns4/node.example/tcp/443"),
        lane="/rios/lane/1.0.0",
        version="1.2.3",
        region="eu-north",
        hardware=Hardware(
            "an example CPU", 8, 16 << 30, (Gpu("an example GPU", 24 << 30),), 50_000_000, 40_000_000_000
        ),
        disk_bytes=1 << 40,
        offered_bytes=1 << 35,
        load=17,
        roles=("worker",),
        models=(ModelOffer(MODEL, adverts.bitmap({0, 3, 9}), 4, 120, 3),),
        net=b"\x0a" * 16,
    )


def _sealed(body: bytes, identity: Identity = ALICE) -> bytes:
    return msgpack.packb([body, identity.sign(adverts.TAG, body)])


def _adverts() -> list[dict[str, Any]]:
    example = _example()
    fields = list(msgspec.msgpack.decode(msgspec.msgpack.encode(example)))
    names = [field.name for field in msgspec.structs.fields(Advert)]
    body = msgspec.msgpack.encode(example)
    signature = ALICE.sign(adverts.TAG, body)

    def with_(**changes: Any) -> bytes:
        changed = [changes.get(name, value) for name, value in zip(names, fields, strict=True)]
        return _sealed(msgspec.msgpack.encode(changed))

    offer = fields[names.index("models")][0]
    bad_signature = signature[:-1] + bytes([signature[-1] ^ 1])
    refused = [
        ("not msgpack", "malformed", b"\xc1"),
        ("an envelope of three", "malformed", msgpack.packb([body, signature, 0])),
        ("an envelope in another encoding", "malformed", b"\xdc\x00\x02" + msgpack.packb([body, signature])[1:]),
        ("bytes behind the envelope", "malformed", _sealed(body) + b"\0"),
        ("bytes behind the body", "malformed", _sealed(body + b"\0")),
        ("a body that is a map", "malformed", _sealed(msgpack.packb({"peer_id": ALICE.peer_id}))),
        ("a body of two fields", "malformed", _sealed(msgpack.packb([ALICE.peer_id, NOW_MS]))),
        ("a peer id that is none", "malformed", with_(peer_id="12D3KooW")),
        ("a peer id with white space behind it", "malformed", with_(peer_id=ALICE.peer_id + "\n")),
        ("a sequence number below zero", "malformed", with_(seq=-1)),
        ("a sequence number above 2**62", "malformed", with_(seq=(1 << 62) + 1)),
        ("17 addresses", "malformed", with_(addresses=["/ip4/192.0.2.1/tcp/1"] * 17)),
        ("a text of 257 characters", "malformed", with_(region="x" * 257)),
        ("a model id of 63 digits", "malformed", with_(models=[[MODEL[:-1], *offer[1:]]])),
        ("a price above 2**40", "malformed", with_(models=[[*offer[:3], (1 << 40) + 1, 3]])),
        ("an offer that lacks its price", "malformed", with_(models=[offer[:3]])),
        ("a flag that is a number", "malformed", with_(full=1)),
        ("a changed signature", "signature", msgpack.packb([body, bad_signature])),
        ("somebody else's signature", "signature", _sealed(body, BOB)),
        ("a short signature", "signature", msgpack.packb([body, signature[:63]])),
        ("an address that is none", "absurd", with_(addresses=["192.0.2.1:4701"])),
        ("a number that is none", "absurd", with_(addresses=["/ip4/192.0.2.400/tcp/1"])),
        ("a name with an empty label", "absurd", with_(addresses=["/dns4/a..b/tcp/1"])),
        ("port 0", "absurd", with_(addresses=["/ip4/192.0.2.1/tcp/0"])),
        ("another peer's address", "absurd", with_(addresses=[f"/ip4/192.0.2.1/tcp/1/p2p/{BOB.peer_id}"])),
        ("one model twice", "absurd", with_(models=[offer, offer])),
        ("a region with a line feed", "absurd", with_(region="a\nb")),
        ("an end of life that is now", "expired", with_(expires_ms=NOW_MS)),
        ("a life too long", "future", with_(expires_ms=NOW_MS + adverts.LIFE_MS_MAX + adverts.CLOCK_SKEW_MS_MAX + 1)),
        ("made too far in the future", "future", with_(seq=NOW_MS + adverts.CLOCK_SKEW_MS_MAX + 1)),
    ]
    later = [*fields, "a field of a later version", {"with": [1, 2]}]
    later[names.index("hardware")] = [*fields[names.index("hardware")], 7]
    later[names.index("models")] = [[*offer, "more"]]
    minimal = [ALICE.peer_id, NOW_MS, NOW_MS + 1]
    valid = [
        ("every field", _sealed(body)),
        ("fields appended by a later version", _sealed(msgspec.msgpack.encode(later))),
        (
            "values appended that this version cannot read",
            _sealed(_appended(body, len(fields), b"\xd4\x05\x00", b"\xa1\xff")),
        ),
        ("addresses of a later kind", _sealed(msgspec.msgpack.encode([*fields[:3], [*fields[3], LATER_ADDRESS]]))),
        ("three fields, the rest defaults", _sealed(msgspec.msgpack.encode(minimal))),
        ("a body in a longer encoding", _sealed(b"\xdc" + len(fields).to_bytes(2, "big") + _tail(body))),
    ]
    zeros = adverts.ADVERT_BYTES_MAX + 1 - len(_sealed(body))
    too_large = {"name": "65,537 bytes", "data": _sealed(body).hex(), "then_zeros": zeros, "refused": "too_large"}
    shown: list[dict[str, Any]] = [too_large]
    for name, data in valid:
        value = adverts.open_advert(data, now_ms=NOW_MS).advert
        shown.append(
            {"name": name, "data": data.hex(), "advert": _plain(msgspec.to_builtins(value, builtin_types=(bytes,)))}
        )
    return shown + [{"name": name, "data": data.hex(), "refused": kind} for name, kind, data in refused]


def _heartbeats() -> list[dict[str, Any]]:
    body = msgspec.msgpack.encode(Heartbeat(ALICE.peer_id, NOW_MS, 42, True, (5, 200, 4)))
    fields = msgspec.msgpack.decode(body)

    def sealed(changed: object, identity: Identity = ALICE) -> bytes:
        data = msgspec.msgpack.encode(changed)
        return msgpack.packb([data, identity.sign(heartbeat.TAG, data)])

    valid = [
        ("every field", sealed(fields)),
        ("prices as advertised", sealed([*fields[:4], None])),
        ("two fields, the rest defaults", sealed(fields[:2])),
        ("fields appended by a later version", sealed([*fields, "more"])),
    ]
    early, late = NOW_MS - heartbeat.AGE_MS_MAX - 1, NOW_MS + adverts.CLOCK_SKEW_MS_MAX + 1
    refused = [
        ("an advert's tag", "signature", msgpack.packb([body, ALICE.sign(adverts.TAG, body)])),
        ("somebody else's signature", "signature", sealed(fields, BOB)),
        ("one field", "malformed", sealed(fields[:1])),
        ("a price of two", "malformed", sealed([*fields[:4], [5, 200]])),
        ("a price above 2**40", "malformed", sealed([*fields[:4], [5, (1 << 40) + 1, 4]])),
        ("4,097 bytes", "too_large", sealed([*fields, "x" * 4096])[: heartbeat.HEARTBEAT_BYTES_MAX + 1]),
        ("ten minutes old", "expired", sealed([fields[0], early])),
        ("ten minutes ahead", "future", sealed([fields[0], late])),
    ]
    shown: list[dict[str, Any]] = []
    for name, data in valid:
        beat = heartbeat.open_heartbeat(data, now_ms=NOW_MS)
        shown.append({"name": name, "data": data.hex(), "heartbeat": msgspec.to_builtins(beat)})
    return shown + [{"name": name, "data": data.hex(), "refused": kind} for name, kind, data in refused]


def _provider_keys() -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = [{"model": MODEL, "key": providing.model_key(MODEL).hex()}]
    for index in (0, 300):
        shown.append({"model": MODEL, "shard": index, "key": providing.shard_key(MODEL, index).hex()})
    return shown


def _appended(body: bytes, fields: int, *values: bytes) -> bytes:
    return b"\xdc" + (fields + len(values)).to_bytes(2, "big") + _tail(body) + b"".join(values)


def _tail(body: bytes) -> bytes:
    """An array's elements: what follows its head."""
    return body[1:] if body[0] & 0xF0 == 0x90 else body[3:]


def _plain(value: Any) -> Any:
    if isinstance(value, bytes | memoryview):
        return {"hex": bytes(value).hex()}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


# -- headers and frames


def _headers() -> list[dict[str, Any]]:
    valid = [
        {},
        {"known": {ALICE.peer_id: NOW_MS}},
        {"a": None, "b": True, "c": -33, "d": 1.5, "e": "é", "f": b"\x00\xff", "g": [1, [2, {"h": 3}]]},
        {"n": [0, 127, 128, 255, 256, 65535, 65536, (1 << 32) - 1, -1, -32, -33, -128, -129, -(1 << 31)]},
    ]
    refused = [
        ("an array", msgpack.packb([1])),
        ("nothing", b""),
        ("cut off", msgpack.packb({"key": "value"})[:-1]),
        ("bytes behind it", msgpack.packb({}) + b"\0"),
        ("a key that is a number", msgpack.packb({1: 2})),
        ("an extension type", b"\x81\xa1a\xd4\x05\x00"),
        ("a timestamp", b"\x81\xa1a\xd6\xff\x00\x00\x00\x00"),
        ("text that is not UTF-8", b"\x81\xa1a\xa1\xff"),
        ("the unused byte", b"\x81\xa1a\xc1"),
    ]
    shown = [{"data": headers.pack(value).hex(), "header": _plain(value)} for value in valid]
    return shown + [{"name": name, "data": data.hex(), "refused": "header"} for name, data in refused]


def _frame(kind: int, call: int = 0, number: int = 0, name: bytes = b"", header: bytes = b"", *buffers: bytes) -> bytes:
    sizes = b"".join(len(buffer).to_bytes(4, "big") for buffer in buffers)
    body = sizes + name + header + b"".join(buffers)
    return frames.HEAD.pack(len(body), kind, len(name), len(buffers), call, number, len(header)) + body


def _frames() -> list[dict[str, Any]]:
    empty, some = headers.pack({}), headers.pack({"n": 1})
    request = _frame(frames.REQUEST, 1, 5000, b"echo", some, b"\x01\x02\x03", b"")
    response = _frame(frames.RESPONSE, 1, 0, b"", some, b"\xaa")
    item, end = _frame(frames.ITEM, 1, 0, b"", empty, b"\xbb"), _frame(frames.END, 1, 0, b"", empty)
    goodbye = _frame(frames.GOODBYE, 0, 0, b"", headers.pack({"reason": "shutting down"}))
    cancel, credit = _frame(frames.CANCEL, 1), _frame(frames.CREDIT, 1, 2)
    failure = headers.pack({"code": "busy", "message": "later", "hint": "", "retry_after_ms": 50})
    big = FRAME_BYTES_MAX + 1
    # name, calls the receiver has made before, bytes
    valid = [
        ("request", 0, request),
        ("request without buffers", 0, _frame(frames.REQUEST, 7, 1, "müsli".encode(), empty)),
        ("response", 1, response),
        ("error", 1, _frame(frames.ERROR, 1, 0, b"", failure)),
        ("a stream", 1, item + item + end),
        ("ping and pong", 0, _frame(frames.PING, 0, 77) + _frame(frames.PONG, 0, 78)),
        ("cancel", 0, request + cancel),
        ("credit", 0, request + credit),
        ("goodbye", 0, goodbye),
        ("a late second answer is skipped", 1, response + response),
        ("a second cancel is skipped", 0, request + cancel + cancel),
    ]
    refused = [
        ("kind", 0, _frame(0)),
        ("kind", 0, _frame(11)),
        ("size", 0, frames.HEAD.pack(big, frames.REQUEST, 4, 0, 1, 5000, big - 4)),
        ("size", 0, frames.HEAD.pack(4 * 257 + 5, frames.REQUEST, 4, 257, 1, 5000, 1)),
        ("parts", 0, _frame(frames.REQUEST, 1, 5000, b"", some)),
        ("parts", 0, _frame(frames.REQUEST, 1, 5000, b"echo", b"")),
        ("parts", 1, _frame(frames.RESPONSE, 1, 0, b"x", some)),
        ("parts", 1, _frame(frames.END, 1, 0, b"", empty, b"\xbb")),
        ("parts", 0, _frame(frames.PING, 0, 1, b"", empty)),
        ("fill", 0, frames.HEAD.pack(6, frames.REQUEST, 4, 0, 1, 5000, 1) + b"echo\x80\x00"),
        ("fill", 0, frames.HEAD.pack(4, frames.REQUEST, 4, 0, 1, 5000, 1) + b"echo"),
        ("fill", 0, frames.HEAD.pack(10, frames.REQUEST, 4, 1, 1, 5000, 1) + b"\0\0\0\2echo\x80\x00"),
        ("fill", 0, frames.HEAD.pack(14, frames.REQUEST, 4, 2, 1, 5000, 1) + b"\0\0\0\1\xff\xff\xff\xffecho\x80\x00"),
        ("header", 0, _frame(frames.REQUEST, 1, 5000, b"echo", b"\x90")),
        ("method", 0, _frame(frames.REQUEST, 1, 5000, b"\xff\xfe", empty)),
        ("deadline", 0, _frame(frames.REQUEST, 1, 0, b"echo", empty)),
        ("deadline", 0, _frame(frames.REQUEST, 1, frames.DEADLINE_MS_MAX + 1, b"echo", empty)),
        ("sequence", 0, request + request),
        ("sequence", 0, _frame(frames.REQUEST, 0, 5000, b"echo", empty)),
        ("sequence", 0, goodbye + request),
        ("sequence", 0, response),
        ("sequence", 1, _frame(frames.RESPONSE, 2, 0, b"", empty)),
        ("sequence", 0, cancel),
        ("sequence", 1, item + response),
        ("credit", 1, item * (frames.STREAM_CREDIT + 1)),
        ("credit", 0, request + _frame(frames.CREDIT, 1, 0)),
        ("credit", 0, request + _frame(frames.CREDIT, 1, (1 << 20) - frames.STREAM_CREDIT + 1)),
    ]
    shown = [
        {"name": name, "made": made, "data": data.hex(), "events": [_event(e) for e in feed(made, data)]}
        for name, made, data in valid
    ]
    return shown + [{"made": made, "data": data.hex(), "refused": rule} for rule, made, data in refused]


def feed(made: int, data: bytes) -> list[frames.Event]:
    """What a side that has made so many calls reads in these bytes."""
    machine = frames.Machine(frame_bytes_max=FRAME_BYTES_MAX)
    for _ in range(made):
        machine.request("echo", {}, (), 1000)
    return machine.feed(data)


def _event(event: frames.Event) -> dict[str, Any]:
    fields = {name: getattr(event, name) for name in event.__struct_fields__ if name != "size_bytes"}
    return {"event": type(event).__name__.lower(), **_plain(fields)}


# -- the lane


def _lanes() -> list[dict[str, Any]]:
    return [_lane(psk, aes) for psk in (None, b"\x77" * 32) for aes in (False, True)]


def _lane(psk: bytes | None, aes: bool) -> dict[str, Any]:
    """A whole handshake with fixed keys, and the records that follow it."""
    statics, ephemerals = (b"\x11" * 32, b"\x21" * 32), (b"\x12" * 32, b"\x22" * 32)
    dialler, listener = (_side(psk, statics[i], ephemerals[i], initiator=not i) for i in range(2))
    payloads = [
        payload.encode(identity, _x25519(secret), {"aes": offer})
        for identity, secret, offer in ((ALICE, statics[0], True), (BOB, statics[1], aes))
    ]
    messages = [bytes(dialler.write_message())]
    assert not listener.read_message(messages[0])
    messages.append(bytes(listener.write_message(payloads[1])))
    assert dialler.read_message(messages[1]) == payloads[1]
    messages.append(bytes(dialler.write_message(payloads[0])))
    assert listener.read_message(messages[2]) == payloads[0]
    state = dialler.noise_protocol
    keys = (state.cipher_state_encrypt.k, state.cipher_state_decrypt.k)
    make = AESGCM if aes else ChaCha20Poly1305
    refusal = b"" if psk is None else b"this node is full"
    sealing = records.Key(make(keys[0]))
    plain = [
        (records.DATA + records.MAIN, b"\x01\x02"),
        (records.DATA + records.BULK, bytes(40)),
        (records.WINDOW, bytes(4)),
        (200, b""),
    ]
    shown = [_record(sealing, kind, data) for kind, data in plain]
    sealing.renew()
    rekeyed = _record(sealing, 0, b"\x03")
    return {
        "name": f"{'public' if psk is None else 'private'} swarm, {'AES-256-GCM' if aes else 'ChaCha20-Poly1305'}",
        "psk": psk.hex() if psk else None,
        "identities": [ALICE.seed.hex(), BOB.seed.hex()],
        "static_keys": [secret.hex() for secret in statics],
        "ephemeral_keys": [secret.hex() for secret in ephemerals],
        "aes": [True, aes],
        "payloads": [data.hex() for data in payloads],
        "messages": [message.hex() for message in messages],
        "keys": [key.hex() for key in keys],
        "welcome": make(keys[1]).encrypt(handshake._WELCOME_NONCE, refusal, handshake.PROLOGUE).hex(),
        "refusal": refusal.decode(),
        "records_of_dialler": shown,
        "after_the_next_key": rekeyed,
    }


def _record(sealing: records.Key, kind: int, data: bytes) -> dict[str, Any]:
    record = sealing.seal(kind, data, memoryview(bytearray(1024)))
    return {"kind": kind, "plain": data.hex(), "record": bytes(record).hex()}


def _side(psk: bytes | None, static: bytes, ephemeral: bytes, *, initiator: bool) -> NoiseConnection:
    noise = NoiseConnection.from_name(handshake.XX if psk is None else handshake.XX_PSK)
    noise.set_prologue(handshake.PROLOGUE)
    if psk:
        noise.set_psks(psk)
    noise.set_keypair_from_private_bytes(Keypair.STATIC, static)
    noise.set_keypair_from_private_bytes(Keypair.EPHEMERAL, ephemeral)
    (noise.set_as_initiator if initiator else noise.set_as_responder)()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # a fixed ephemeral key is meant for vectors only, and these are some
        noise.start_handshake()
    return noise


def _x25519(secret: bytes) -> bytes:
    public = X25519PrivateKey.from_private_bytes(secret).public_key()
    return public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


# -- tensors and expert calls


def _tensors() -> list[dict[str, Any]]:
    ordinary = np.array([[0.0, -0.0, 1.0, -2.5], [65504.0, 6e-8, 1 / 3, 2049.0]], np.float32)
    mixed = np.array([[1.0, 2.0, 3.0, 4.0], [65505.0, -1e30, 3.4e38, 1.00390625], [0.1, 0.2, 0.3, 0.4]], np.float32)
    shown = []
    cases: list[tuple[str, np.ndarray, wire.Dtype]] = [
        ("fp16", ordinary, "fp16"),
        ("one row in bf16", mixed, "fp16"),
        ("no rows", ordinary[:0], "fp16"),
        ("fp32", mixed, "fp32"),
    ]
    for name, rows, dtype in cases:
        header, buffer = wire.encode(rows, dtype)
        read = wire.decode(header, buffer)
        shown.append(
            {
                "name": name,
                "rows": rows.astype("<f4").tobytes().hex(),
                "header": _plain(header),
                "buffer": bytes(buffer).hex(),
                "read": read.astype("<f4").tobytes().hex(),
            }
        )
    refused = [
        ("no shape", {}, b""),
        ("a shape of three", {"shape": [1, 1, 1]}, bytes(2)),
        ("a shape with a fraction", {"shape": [1.5, 1]}, bytes(2)),
        ("rows below zero", {"shape": [-1, 1]}, b""),
        ("more rows than allowed", {"shape": [(1 << 20) + 1, 1]}, b""),
        ("a buffer too short", {"shape": [2, 2]}, bytes(6)),
        ("a bitmap too short", {"shape": [9, 1], "bf16": b"\0"}, bytes(18)),
        ("fp32 in a buffer for fp16", {"shape": [1, 1], "dtype": "fp32"}, bytes(2)),
        ("a dtype that nobody knows", {"shape": [1, 1], "dtype": "fp8"}, bytes(1)),
        ("infinity in fp32", {"shape": [1, 1], "dtype": "fp32"}, b"\x00\x00\x80\x7f"),
        ("infinity in fp16", {"shape": [1, 1]}, b"\x00\x7c"),
        ("not a number in bf16", {"shape": [1, 1], "bf16": b"\x01"}, b"\xc0\x7f"),
    ]
    return shown + [
        {"name": name, "header": _plain(header), "buffer": buffer.hex(), "refused": "tensor"}
        for name, header, buffer in refused
    ]


def _expert_calls() -> list[dict[str, Any]]:
    shape, rows = wire.encode(np.array([[1.0, 2.0], [3.0, 4.0], [-1.0, 0.5]], np.float32))
    experts = np.array([[0, 3], [1, 2], [5, 0]], "<i4")
    weights = np.array([[0.75, 0.25], [0.5, 0.5], [1.0, 0.0]], "<f4")
    header = calls.build(MODEL, 7, [2, 0], 4, b"\x0c" * 32, shape, 2)
    request = [bytes(rows), experts.tobytes(), weights.tobytes()]
    answer = bytes(wire.encode(np.arange(12, dtype=np.float32).reshape(6, 2))[1])
    members, costs = [(4, 5), (0, 1)], [1_000_000, 3_001_000]
    return [
        {
            "header": _plain(header),
            "header_bytes": headers.pack(header).hex(),
            "buffers": [buffer.hex() for buffer in request],
            "answer": answer.hex(),
            "device": "x86_64-cpu",
            "leaf": calls.leaf(MODEL, 7, [2, 0], 3, "x86_64-cpu", calls.Bytes(request), calls.Bytes((answer,))).hex(),
            "experts_of_groups": members,
            "flops_per_row": costs,
            "kflop": calls.kflop(members, costs, 3, experts.astype(np.int32)),
        }
    ]


if __name__ == "__main__":
    FILE.write_text(json.dumps(make(), indent=1, ensure_ascii=False) + "\n")

"""docs/protocol.md says what the code does: every method, topic, protocol id, tag, frame kind, field and limit."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from config.errors import CODES
from config.settings import P2pSettings
from dmoe.core import calls, wire
from dmoe.core.deployment import REPLICAS_MAX
from p2p import handshake, lanechannel
from p2p.core import advert, failures, frames, headers, heartbeat, payload, providing, records, view
from p2p.core.chunks import CHUNK_BYTES
from p2p.core.identity import Identity
from p2p.network import open_network

REPOSITORY = Path(__file__).parents[3]
PAGE = (REPOSITORY / "docs" / "protocol.md").read_text()
PACKAGES = ("p2p", "dmoe", "ledger", "node")
NOT_ON_THE_WIRE = {
    *("config", "usage", "context_length_exceeded", "unauthenticated", "no_replica", "port_taken", "not_running"),
}
LOCAL_TAGS = {"p2p/core/invite.py"}


def _sources() -> Iterator[tuple[Path, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            yield path, ast.parse(path.read_text())


def _first_arguments(*names: str) -> Iterator[tuple[str, str]]:
    """Where a method of this name is called with which text first. What is not a text is resolved in its module."""
    for path, tree in _sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names:
                text = _text(path, node.args[0]) if node.args else None
                if text is not None:
                    yield text, f"{path.relative_to(REPOSITORY)}:{node.lineno}"


def _text(path: Path, node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if not isinstance(node, ast.Name | ast.Attribute):
        return None
    module = importlib.import_module(".".join(path.relative_to(REPOSITORY).with_suffix("").parts))
    value: object = module
    for name in ast.unparse(node).split("."):
        value = getattr(value, name, None)
    return value if isinstance(value, str) else None


SERVED = dict(_first_arguments("serve", "serve_stream"))


def test_there_are_methods_to_check():
    assert {"advert.exchange", "blob.get", "expert.run", "ledger.submit", "model.have"} <= SERVED.keys()


@pytest.mark.parametrize("method", SERVED)
def test_every_method_stands_in_a_table(method):
    assert f"\n| `{method}` |" in PAGE, f"{SERVED[method]} serves it: describe it in the table of docs/protocol.md"


async def test_the_page_lists_what_a_running_network_serves_and_no_method_that_nobody_does(tmp_path):
    settings = P2pSettings(listen=("/ip4/127.0.0.1/tcp/0",))
    async with open_network(Identity.from_seed(b"p" * 32), settings, data_dir=tmp_path, version="test") as network:
        served = SERVED.keys() | network._services.keys()
    assert set(re.findall(r"^\| `([a-z]+\.[a-z]+)` \|", PAGE, re.MULTILINE)) == served


def test_every_topic_stands_on_the_page():
    topics = dict(_first_arguments("subscribe", "publish"))
    assert {"rios/advert/1", "dmoe/deployments"} <= topics.keys()
    for topic, place in topics.items():
        assert f"\n| `{topic}` |" in PAGE, place
    assert "\n| `ledger.<net>` |" in PAGE


def _literals() -> Iterator[tuple[str, str]]:
    for path, tree in _sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
                value = node.value if isinstance(node.value, str) else node.value.decode("latin-1")
                yield value, str(path.relative_to(REPOSITORY))


def test_every_protocol_id_stands_on_the_page():
    found = {(text, place) for text, place in _literals() if re.fullmatch(r"/[a-z/-]+/\d+\.\d+\.\d+", text)}
    assert any(text == "/rios/rpc/1.0.0" for text, _ in found)
    for text, place in found:
        assert f"`{text}`" in PAGE, place


def test_every_tag_of_p2p_and_dmoe_stands_on_the_page():
    found = {(text, place) for text, place in _literals() if re.fullmatch(r"rios/[a-z]+/\d+\x00", text)}
    found = {(text, place) for text, place in found if not place.startswith("ledger") and place not in LOCAL_TAGS}
    assert any(text == "rios/advert/1\0" for text, _ in found)
    for text, place in found:
        assert text[:-1] in PAGE, place


def test_every_frame_kind_stands_on_the_page():
    kinds = ["REQUEST", "RESPONSE", "ITEM", "END", "ERROR", "CANCEL", "PING", "PONG", "CREDIT", "GOODBYE"]
    assert [getattr(frames, kind) for kind in kinds] == sorted(frames._SHAPES)
    for kind in kinds:
        assert f"\n| {getattr(frames, kind)} | `{kind}` |" in PAGE


def test_every_error_code_stands_on_the_page():
    section = PAGE.partition("### Errors")[2].partition("\n## ")[0]
    for code in CODES.keys() - NOT_ON_THE_WIRE:
        assert f"`{code}`" in section
    for code in NOT_ON_THE_WIRE:
        assert f"`{code}`" not in section


def test_every_field_of_an_advert_stands_at_its_place():
    for place, field in enumerate(msgspec.structs.fields(advert.Advert)):
        assert f"\n| {place} | `{field.name}` |" in PAGE
    for record in (advert.Gpu, advert.Hardware, advert.ModelOffer, heartbeat.Heartbeat):
        for field in msgspec.structs.fields(record):
            assert re.search(rf"\b{field.name}\b", PAGE), field.name


@pytest.mark.parametrize(
    "limit",
    [
        frames.DEADLINE_MS_MAX,
        headers.HEADER_BYTES_MAX,
        failures.TEXT_MAX,
        advert.ADVERT_BYTES_MAX,
        heartbeat.HEARTBEAT_BYTES_MAX,
        advert.COORDINATE_US_MAX,
        CHUNK_BYTES,
        calls.LAYERS_MAX,
        calls.GROUPS_MAX,
        wire.ROWS_MAX,
        frames.BUFFERS_MAX,
        frames.STREAM_CREDIT,
        providing.SHARD_KEYS_MAX,
        REPLICAS_MAX,
        handshake.MESSAGE_BYTES_MAX,
        payload.PAYLOAD_BYTES_MAX,
        records.RECORD_BYTES_MAX,
        lanechannel.WINDOW_BYTES,
        lanechannel.URGENT_BYTES,
        view.VIEW_MAX,
    ],
)
def test_limits_are_those_of_the_code(limit):
    assert re.search(rf"(?<![\d,]){limit:,}(?![\d,]\d)", PAGE)


def test_the_example_frames_are_right():
    example = re.search(r"^(00000013 01 .*)$", PAGE, re.MULTILINE)
    assert example is not None
    (request,) = frames.Machine(frame_bytes_max=1 << 16).feed(bytes.fromhex(example[1]))
    assert isinstance(request, frames.Request)
    assert (request.method, request.header, [bytes(b) for b in request.buffers]) == ("echo", {"n": 1}, [b"\1\2\3", b""])

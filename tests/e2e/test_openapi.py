"""Generated requests over the OpenAPI document: no answer is a fault of the server's, and none is undocumented.

Events have no end, so those that listen for them read only what comes at first.

``EXAMPLES`` in the environment asks for more than the few of every test run (``make fuzz-api`` does).
"""

import http.client
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema_rs
import pytest
import requests
import schemathesis
import trio
from fake_swarm import FakeLedger, FakeSwarm
from gateway_rig import serving
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from test_rights import key_of

from gateway.roles import ROLES

EXAMPLES = int(os.environ.get("EXAMPLES", "4"))
WHO = ROLES if EXAMPLES > 4 else (ROLES[0], ROLES[-1])
"""Of every test run those who may do least and most; ``test_rights.py`` has what each role may."""
EVENTS = "/v1/events"
BYTES_MAX, SILENCE_SECONDS = 16 << 10, 0.3
"""So much of a stream without end is read, or up to so long a silence."""
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)


@pytest.mark.parametrize("role", WHO)
async def test_generated_requests_get_documented_answers(tmp_path: Path, role: str) -> None:
    generous = {"requests_per_minute": 1 << 24, "tokens_per_minute": 1 << 34, "connections_per_second": 0}
    async with serving(tmp_path, swarm=FakeSwarm(count=4, layers=2), ledger_view=FakeLedger(), **generous) as rig:
        key = await key_of(rig, f"a {role}", role)
        command = [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{rig.gateway.url}/openapi.json"),
            *("--header", f"Authorization: Bearer {key}", "--checks", ",".join(CHECKS)),
            *(
                "--max-examples",
                str(EXAMPLES),
                "--seed",
                "1",
                "--request-timeout",
                "20",
                "--suppress-health-check",
                "all",
            ),
            *("--exclude-path", EVENTS),  # it has no end to wait for: see below
            *("--phases", "fuzzing", "--no-color", "--generation-database", "none"),
        ]
        said = await trio.run_process(
            command, capture_stdout=True, stderr=subprocess.STDOUT, check=False, cwd=tmp_path, env=os.environ
        )
        assert said.returncode == 0, said.stdout.decode()[-8000:]


@pytest.mark.parametrize("role", ROLES)
async def test_generated_listeners_get_documented_events(tmp_path: Path, role: str) -> None:
    async with serving(tmp_path, connections_per_second=0, requests_per_minute=1 << 24) as rig:
        key = await key_of(rig, f"a {role}", role)
        for number in range(3):  # something of their own to go on behind
            async with rig.http() as client:
                made = await client.post(
                    "/v1/api-keys", json={"name": f"{number}"}, headers={"authorization": f"Bearer {key}"}
                )
                assert made.status_code == 201
        await trio.to_thread.run_sync(listen, rig.gateway.url, key)


def listen(url: str, key: str) -> None:
    """Generated listeners, well and badly formed; then one who surely hears something, one who is surely refused."""
    document = requests.get(f"{url}/openapi.json", timeout=20).json()
    operation = schemathesis.openapi.from_dict(document)[EVENTS]["GET"]
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]

    @settings(max_examples=3 * EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @seed(1)
    @given(case=st.one_of(*[operation.as_strategy(generation_mode=mode) for mode in modes]))
    def generated(case: schemathesis.Case) -> None:
        hear(document, requests.Request(**case.as_transport_kwargs(base_url=url)), key)

    generated()
    assert hear(document, requests.Request("GET", f"{url}{EVENTS}?after=0"), key, 3.0) == (200, 3)
    assert hear(document, requests.Request("GET", f"{url}{EVENTS}?after=x"), key) == (400, 0)


def hear(
    document: dict[str, Any], asked: requests.Request, key: str, silence: float = SILENCE_SECONDS
) -> tuple[int, int]:
    """The status, and how many events came; all of it as documented."""
    responses = document["paths"][EVENTS]["get"]["responses"]
    status, media, body = read_first(asked, key, silence)
    assert status < 500
    assert str(status) in responses, f"{status} is not documented"
    schema = responses[str(status)]["content"][media]["schema"]
    if status != 200:
        fits(document, schema, json.loads(body))
        return status, 0
    events = events_of(body)
    for event in events:
        fits(document, schema, event)
        fits(document, schema["properties"]["data"]["contentSchema"], json.loads(event["data"]))
    return status, len(events)


def read_first(asked: requests.Request, key: str, silence: float) -> tuple[int, str, str]:
    """Status, content type, and what comes of the body before it falls silent."""
    prepared = asked.prepare()
    parts = urlsplit(prepared.url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=20)
    try:
        headers = {**dict(prepared.headers), "Authorization": f"Bearer {key}"}
        connection.request("GET", prepared.path_url, headers=headers)
        answer, body = connection.getresponse(), b""
        connection.sock.settimeout(silence)
        try:
            while len(body) < BYTES_MAX and (part := answer.read1(BYTES_MAX)):
                body += part
        except TimeoutError:
            pass
        return answer.status, answer.headers["content-type"].split(";")[0], body.decode()
    finally:
        connection.close()


def events_of(text: str) -> list[dict[str, str]]:
    """The whole events of a stream, without its comments."""
    blocks = [block for block in text.split("\n\n")[:-1] if not block.startswith(":")]
    return [dict(line.split(": ", 1) for line in block.split("\n")) for block in blocks]


def fits(document: dict[str, Any], shape: dict[str, Any], value: object) -> None:
    whole = {"$schema": "https://json-schema.org/draft/2020-12/schema", "components": document["components"], **shape}
    jsonschema_rs.validator_for(whole).validate(value)

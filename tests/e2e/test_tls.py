"""TLS on the gateway itself: 1.3 only, a new certificate without a restart, clients that speak nonsense."""

import shutil
import signal
import socket
import ssl
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import trio
from gateway_rig import Rig, serving

from config.errors import ConfigError
from config.settings import GatewaySettings
from gateway.certificate import certificate_of
from node.rig import Swarm, wait_for
from tests.tls import make_certificate

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
PATH = "/v1/chat/completions"


def trusting(chain: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(chain))


def client(rig: Rig, chain: Path) -> httpx.AsyncClient:
    headers = {"authorization": f"Bearer {rig.key}"}
    return httpx.AsyncClient(base_url=rig.gateway.url, headers=headers, timeout=10, verify=trusting(chain))


async def test_answers_and_streams(tmp_path: Path) -> None:
    chain, key = make_certificate(tmp_path)
    async with serving(tmp_path, tls_certificate=str(chain), tls_key=str(key)) as rig, client(rig, chain) as http:
        assert rig.gateway.url.startswith("https://")
        answer = await http.post(PATH, json=BODY)
        assert answer.status_code == 200
        assert answer.headers["strict-transport-security"] == "max-age=31536000"
        assert answer.extensions["network_stream"].get_extra_info("ssl_object").version() == "TLSv1.3"
        async with http.stream("POST", PATH, json={**BODY, "stream": True}) as stream:
            assert "[DONE]" in (await stream.aread()).decode()
        closing = await http.get("/healthz", headers={"connection": "close"})
        assert closing.status_code == 200


async def test_nothing_older_and_nothing_plain(tmp_path: Path) -> None:
    chain, key = make_certificate(tmp_path)
    async with serving(tmp_path, tls_certificate=str(chain), tls_key=str(key)) as rig:
        old = trusting(chain)
        old.maximum_version = ssl.TLSVersion.TLSv1_2

        def shake() -> None:
            with socket.create_connection((rig.gateway.host, rig.gateway.port), 5) as plain:
                old.wrap_socket(plain, server_hostname="localhost")

        with pytest.raises(ssl.SSLError):
            await trio.to_thread.run_sync(shake)
        for said in (b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", b"", b"\x16\x03\x01\xff\xff" + bytes(500)):
            heard = b""
            async with await trio.open_tcp_stream(rig.gateway.host, rig.gateway.port) as stream:
                await stream.send_all(said)
                await stream.send_eof()
                with trio.fail_after(5), suppress(trio.BrokenResourceError):
                    async for part in stream:
                        heard += part
            assert b"HTTP/1.1" not in heard
        async with client(rig, chain) as http:
            assert (await http.get("/healthz")).status_code == 200


async def test_a_client_that_never_finishes_its_handshake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.certificate._HANDSHAKE_SECONDS", 0.2)
    chain, key = make_certificate(tmp_path)
    async with (
        serving(tmp_path, tls_certificate=str(chain), tls_key=str(key)) as rig,
        await trio.open_tcp_stream(rig.gateway.host, rig.gateway.port) as stream,
    ):
        with trio.fail_after(5):
            assert await stream.receive_some() == b""


async def test_a_new_certificate_is_for_those_that_come(tmp_path: Path) -> None:
    (old, old_key), (new, new_key) = make_certificate(tmp_path, "old"), make_certificate(tmp_path, "new")
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    shutil.copy(old, chain)
    shutil.copy(old_key, key)
    async with serving(tmp_path, tls_certificate=str(chain), tls_key=str(key)) as rig:
        assert rig.gateway.certificate is not None
        async with client(rig, old) as before:
            assert (await before.get("/healthz")).status_code == 200
            shutil.copy(new, chain)
            await trio.to_thread.run_sync(rig.gateway.certificate.reload)
            async with client(rig, old) as still:  # the key is not the new one's yet
                assert (await still.get("/healthz")).status_code == 200
            shutil.copy(new_key, key)
            await trio.to_thread.run_sync(rig.gateway.certificate.reload)
            assert (await before.get("/healthz")).status_code == 200
        async with client(rig, new) as after:
            assert (await after.get("/healthz")).status_code == 200
        with pytest.raises(httpx.ConnectError):
            async with client(rig, old) as gone:
                await gone.get("/healthz")


def test_what_cannot_be_used(tmp_path: Path) -> None:
    chain, key = make_certificate(tmp_path)
    other, other_key = make_certificate(tmp_path, "other")
    locked = tmp_path / "locked.key"
    locked.write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n")
    open_key = tmp_path / "open.key"
    shutil.copy(key, open_key)
    open_key.chmod(0o644)
    locked.chmod(0o600)
    wrong = [(chain, ""), ("", key), (chain, other_key), (key, key), (tmp_path / "no", key), (chain, tmp_path / "no")]
    for certificate, its_key in (*wrong, (chain, locked), (chain, open_key), (other, key)):
        with pytest.raises(ConfigError):
            certificate_of(GatewaySettings(tls_certificate=str(certificate), tls_key=str(its_key)))
    assert certificate_of(GatewaySettings()) is None
    assert certificate_of(GatewaySettings(tls_certificate=str(chain), tls_key=str(key))) is not None


def test_a_running_node_takes_a_new_certificate_on_sighup(tmp_path: Path) -> None:
    (old, old_key), (new, new_key) = make_certificate(tmp_path, "old"), make_certificate(tmp_path, "new")
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    shutil.copy(old, chain)
    shutil.copy(old_key, key)
    edge = {"gateway.enabled": True, "gateway.port": 0, "gateway.tls_certificate": str(chain)}
    with Swarm(tmp_path / "swarm") as swarm:
        node = swarm.add("one", {**edge, "gateway.tls_key": str(key)}, ("--new-network",))
        swarm.start(node)
        url = node.ask("status")["gateway"]["url"]
        assert httpx.get(f"{url}/healthz", verify=trusting(old)).status_code == 200
        shutil.copy(new, chain)
        shutil.copy(new_key, key)
        assert node.process is not None
        node.process.send_signal(signal.SIGHUP)
        wait_for(lambda: "in use for new connections" in node.log_file.read_text(), "the new certificate", 10)
        assert httpx.get(f"{url}/healthz", verify=trusting(new)).status_code == 200
        assert node.stop() == 0

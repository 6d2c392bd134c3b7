"""Two gateways on one PostgreSQL and one Redis behind a real nginx with the configuration that is shipped."""

import itertools
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from postgresql import new_database

from tests.ports import free_port
from tests.redis_server import running_redis
from tests.tls import make_certificate

ROOT = Path(__file__).resolve().parents[2]
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 7}
PATH = "/v1/chat/completions"
LIMIT = 30


@dataclass
class Gateway:
    process: subprocess.Popen[str]
    port: int
    key: str


@dataclass
class Cluster:
    url: str
    certificate: Path
    gateways: list[Gateway]

    def client(self, which: int = 0) -> httpx.Client:
        """Through nginx, with a key that one of the gateways made."""
        headers = {"authorization": f"Bearer {self.gateways[which].key}"}
        context = ssl.create_default_context(cafile=self.certificate)
        return httpx.Client(base_url=self.url, headers=headers, timeout=20, verify=context)

    def direct(self, which: int, key: int) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.gateways[key].key}"}
        return httpx.Client(base_url=f"http://127.0.0.1:{self.gateways[which].port}", headers=headers, timeout=20)


@contextmanager
def gateway(folder: Path, **settings: object) -> Iterator[Gateway]:
    command = [sys.executable, str(Path(__file__).with_name("scaled_gateway.py")), str(folder), json.dumps(settings)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen(command, **pipes) as process:  # type: ignore[call-overload]
        try:
            port, key = process.stdout.readline().split()
            yield Gateway(process, int(port), key)
        finally:
            process.kill()


@contextmanager
def nginx(folder: Path, ports: list[int]) -> Iterator[tuple[str, Path]]:
    """The shipped configuration with this test's addresses and paths."""
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("nginx is not installed")
    port = free_port()
    certificate, key = make_certificate(folder)
    text = (ROOT / "config" / "deploy" / "nginx.conf").read_text()
    text = text.replace("/etc/rios/tls/cert.pem", str(certificate)).replace("/etc/rios/tls/key.pem", str(key))
    text = text.replace("listen 8443", f"listen 127.0.0.1:{port}")
    text = re.sub("127.0.0.1:808([12])", lambda found: f"127.0.0.1:{ports[int(found[1]) - 1]}", text)
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "scgi", "uwsgi")
    )
    text = text.replace("http {", "http {\n" + temporary, 1).replace("worker_processes auto", "worker_processes 1")
    file = folder / "nginx.conf"
    file.write_text(f"daemon off;\nuser {'root' if os.geteuid() == 0 else 'nobody'};\npid {folder}/pid;\n{text}")
    command = [program, "-e", str(folder / "error.log"), "-c", str(file), "-p", str(folder)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            _wait(port, process, folder / "error.log")
            yield f"https://localhost:{port}", certificate
        finally:
            workers = psutil.Process(process.pid).children()
            process.kill()  # first: it would replace a worker that ends
            for worker in workers:
                worker.kill()


def _wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    ends = time.monotonic() + 10
    while not any(one.laddr.port == port for one in psutil.net_connections("tcp") if one.status == "LISTEN"):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < ends
        time.sleep(0.02)


@pytest.fixture
def cluster(tmp_path: Path, postgresql: str) -> Iterator[Cluster]:
    with ExitStack() as stack:
        redis = stack.enter_context(running_redis())
        settings = {
            "database": new_database(postgresql),
            "redis": f"redis://127.0.0.1:{redis}",
            "trusted_proxies": ["127.0.0.1"],
            "requests_per_minute": LIMIT,
            "connections_per_second": 1,
            "identity_sign_up": True,
        }
        one = stack.enter_context(gateway(tmp_path / "one", **settings))
        settings["identity_key_file"] = str(tmp_path / "one" / "gateway.key")
        both = [one, stack.enter_context(gateway(tmp_path / "two", **settings))]
        url, certificate = stack.enter_context(nginx(tmp_path, [each.port for each in both]))
        yield Cluster(url, certificate, both)


def test_several_gateways_are_one(cluster: Cluster) -> None:
    _a_key_made_on_one_works_on_the_other(cluster)
    _browsers_sign_in_with_a_secure_cookie(cluster)
    _streams_pass_unbuffered(cluster)
    _no_request_hides_in_another(cluster)
    _limits_are_shared(cluster)
    _one_is_killed(cluster)


def _a_key_made_on_one_works_on_the_other(cluster: Cluster) -> None:
    for which in (0, 1):
        with cluster.direct(which, 1 - which) as http:
            assert http.get("/v1/models").status_code == 200
    with cluster.client() as http:
        answer = http.get("/v1/models")
        assert answer.status_code == 200
        assert len(answer.headers.get_list("strict-transport-security")) == 1
        assert http.get("/healthz").status_code == 200


def _browsers_sign_in_with_a_secure_cookie(cluster: Cluster) -> None:
    """They speak TLS with nginx; the gateways behind it hear of it."""
    person = {"email": "grace@example.com", "password": "correct horse battery staple"}
    with cluster.client() as http:
        del http.headers["authorization"]
        assert http.post("/v1/auth/register", json={**person, "name": "grace"}).status_code == 201
        made = http.post("/v1/auth/login", json={**person, "cookie": True})
        assert made.headers["set-cookie"].startswith("__Host-rios_session=")
        assert http.get("/v1/auth/me").json()["name"] == "grace"


def _streams_pass_unbuffered(cluster: Cluster) -> None:
    came = []
    with cluster.client() as http, http.stream("POST", PATH, json={**BODY, "stream": True}) as answer:
        for line in answer.iter_lines():
            if '"content":"' in line and '"content":""' not in line:
                came.append(time.monotonic())
    assert len(came) >= 7
    gaps = [after - before for before, after in itertools.pairwise(came)]
    assert sorted(gaps)[len(gaps) // 2] > 0.1, gaps


def _no_request_hides_in_another(cluster: Cluster) -> None:
    """nginx passes the wish for another protocol on to this route; the body is one all the same."""
    hidden = b"GET /v1/nowhere HTTP/1.1\r\nhost: x\r\nx-forwarded-for: 6.6.6.6\r\ncontent-length: 5000\r\n\r\n"
    with cluster.client() as http:
        for _ in range(4):  # whichever connections nginx keeps to them
            http.post("/v1/events", headers={"upgrade": "x"}, content=hidden)
            for path in ("/v1/models", "/healthz"):
                answer = http.get(path)
                assert answer.status_code == 200, answer.text


def _limits_are_shared(cluster: Cluster) -> None:
    """A key of its own, asked in turns at both: together they let the limit in, not twice that."""
    with cluster.direct(0, 0) as http:
        secret = http.post("/v1/api-keys", json={"name": "shared"}).json()["secret"]
    codes = []
    with cluster.direct(0, 0) as one, cluster.direct(1, 0) as two:
        for _ in range(LIMIT):
            for http in (one, two):
                answer = http.get("/v1/models", headers={"authorization": f"Bearer {secret}"})
                codes.append(answer.status_code)
    granted = codes.count(200)
    assert LIMIT <= granted <= LIMIT + 5, codes
    assert set(codes) == {200, 429}


def _one_is_killed(cluster: Cluster) -> None:
    """What it was saying ends; what is asked from then on is answered by the other."""
    with cluster.client(1) as http:
        with http.stream("POST", PATH, json={**BODY, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            victim = _serving(cluster)
            victim.process.kill()
            victim.process.wait()
            with pytest.raises(httpx.HTTPError):
                list(lines)
        for _ in range(5):
            assert http.post(PATH, json=BODY).status_code == 200


def _serving(cluster: Cluster) -> Gateway:
    """The one that answers now."""
    for each in cluster.gateways:
        text = httpx.get(f"http://127.0.0.1:{each.port}/metrics", headers={"authorization": f"Bearer {each.key}"}).text
        found = re.search(r"^rios_gateway_running_requests (\d+)", text, re.M)
        if found is None:
            raise AssertionError(text[:300])
        if int(found[1]) > 1:
            return each
    raise AssertionError("nobody is answering")

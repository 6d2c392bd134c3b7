"""A provider to sign in with elsewhere, in a process of its own, and gateways that know it."""

import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx
from gateway_rig import Rig, serving

CLIENT_ID, SECRET = "rios-test", "s3cret with spaces & signs"


class Provider:
    def __init__(self, port: int) -> None:
        self.issuer = f"http://127.0.0.1:{port}"

    def lie(self, **lies: object) -> None:
        httpx.post(f"{self.issuer}/lie", json=lies).raise_for_status()

    def asked(self) -> dict[str, str]:
        return httpx.get(f"{self.issuer}/asked").json()


@contextmanager
def running_provider() -> Iterator[Provider]:
    command = [sys.executable, str(Path(__file__).with_name("oidc_server.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Provider(int(process.stdout.readline()))
        process.stdin.close()


@asynccontextmanager
async def served(tmp_path: Path, provider: Provider, **settings: object) -> AsyncIterator[Rig]:
    """A gateway where people sign in with the provider."""
    secret = tmp_path / "secret"
    secret.write_text(f"{SECRET}\n")
    secret.chmod(0o600)
    known = {"oidc_issuer": provider.issuer, "oidc_client_id": CLIENT_ID, "oidc_credentials_file": str(secret)}
    async with serving(tmp_path, **{**known, "oidc_sign_up": True, **settings}) as rig:
        yield rig

"""A node process for ``test_blob_resume``: offers a file or fetches it, and reports on stdout. Not a test.

Arguments: ``offer FOLDER MEBIBYTES UPLOAD_MAX`` or ``fetch FOLDER MEBIBYTES TARGET ADDRESS...``. The file's
bytes follow from its size. Every line on stdout is JSON.
"""

import json
import random
import sys
from hashlib import sha256
from pathlib import Path

import trio

from config.settings import P2pSettings
from p2p import keyfile
from p2p.core.chunks import CHUNK_BYTES
from p2p.core.identity import Identity
from p2p.face import ContentFile
from p2p.network import PeerNetwork, open_network


def chunks(mebibytes: int) -> list[bytes]:
    made = [random.Random(number).randbytes(CHUNK_BYTES) for number in range(mebibytes)]
    return [*made, b"the end"]


def file_of(parts: list[bytes]) -> ContentFile:
    data = b"".join(parts)
    return ContentFile(sha256(data).hexdigest(), len(data), tuple(sha256(part).digest() for part in parts))


class Source:
    def __init__(self, parts: list[bytes]) -> None:
        self.parts = {sha256(part).digest(): part for part in parts}
        self.given: list[str] = []

    def read_chunk(self, digest: bytes) -> bytes | None:
        self.given.append(digest.hex())
        return self.parts.get(digest)


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)


async def offer(network: PeerNetwork, mebibytes: int) -> None:
    source = Source(chunks(mebibytes))
    network.blobs.offer(source)
    say(address=network.addresses[0])
    async for _ in trio.lowlevel.FdStream(0):  # each line asks for the count so far
        say(given=len(source.given), different=len(set(source.given)))


async def fetch(network: PeerNetwork, mebibytes: int, target: Path, addresses: list[str]) -> None:
    providers = [address.rpartition("/")[2] for address in addresses]
    for peer_id, address in zip(providers, addresses, strict=True):
        network._host.learn(peer_id, [address])
    file = file_of(chunks(mebibytes))
    await network.blobs.fetch(file, target, lambda: providers, lambda done: say(done=done))
    data = await trio.Path(target).read_bytes()
    say(whole=sha256(data).hexdigest() == file.sha256, fetched=network.blobs.fetched_bytes)


async def main() -> None:
    what, folder, mebibytes, *rest = sys.argv[1:]
    path = Path(folder) / "key"
    identity: Identity = keyfile.load(path) if path.exists() else keyfile.create(path)
    limit = int(rest[0]) if what == "offer" else 0
    settings = P2pSettings(listen=("/ip4/127.0.0.1/tcp/0",), blob_upload_bytes_per_second_max=limit)
    async with open_network(identity, settings, data_dir=Path(folder), version="test") as network:
        if what == "offer":
            await offer(network, int(mebibytes))
        else:
            await fetch(network, int(mebibytes), Path(rest[0]), rest[1:])


if __name__ == "__main__":
    trio.run(main)

"""Two live gateways with one PostgreSQL: whichever a client's retry comes to, one key is one answer and one bill."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from postgresql import new_database
from test_gateway_accounts import books_balance
from test_idempotency import COMPLETIONS, gateway_process, said

from config.settings import GatewaySettings
from dmoe.importer.build import import_gguf
from dmoe.store import ModelStore
from gateway.accounts import open_accounts
from p2p.core.identity import Identity
from tests.unit.dmoe.model_kit import write_gguf

TOKENS = 80
BODY = {"model": "tiny", "prompt": "hello there", "max_tokens": TOKENS, "min_tokens": TOKENS, "stream": True}
SECONDS_MAX = 60.0
ABANDONED_MS = "4000"
"""Of silence, after which the second takes the first for dead once that is killed: sooner than usual."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_gguf(folder / "tiny.gguf")
    import_gguf(folder / "tiny.gguf", ModelStore(folder / "store"), Identity.from_seed(b"p" * 32), name="tiny")
    return folder / "store"


class Pair:
    """Both gateways; ada's key at the first is good at the second."""

    def __init__(self, first: tuple, second: tuple) -> None:
        self.processes, self.urls, (key, _) = zip(first, second, strict=True)
        self.headers = {"authorization": f"Bearer {key}"}

    def ask(self, gateway: int, key: str, refused: list[httpx.Response] | None = None) -> httpx.Response:
        """What a patient client gets: it comes again when it is told to."""
        ends = time.monotonic() + SECONDS_MAX
        while True:
            answer = self.once(gateway, key)
            if answer.status_code != 409 or time.monotonic() > ends:
                return answer
            if refused is not None:
                refused.append(answer)
            time.sleep(0.2)

    def once(self, gateway: int, key: str) -> httpx.Response:
        headers = {**self.headers, "idempotency-key": key}
        return httpx.post(self.urls[gateway] + COMPLETIONS, json=BODY, headers=headers, timeout=SECONDS_MAX)

    @contextmanager
    def begun(self, gateway: int, key: str) -> Iterator[tuple[Iterator[str], str]]:
        """An answer that has begun: the rest of it, and what came."""
        headers = {**self.headers, "idempotency-key": key}
        url = self.urls[gateway] + COMPLETIONS
        with httpx.stream("POST", url, json=BODY, headers=headers, timeout=SECONDS_MAX) as answer:
            pieces, heard = answer.iter_text(), ""
            while heard.count('"text"') < 4:
                heard += next(pieces)
            yield pieces, heard


@pytest.fixture(scope="module")
def database(postgresql: str) -> str:
    return new_database(postgresql)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, database: str, store: Path) -> Iterator[Pair]:
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    with (
        gateway_process(folders[0], database, str(store), ABANDONED_MS) as first,
        gateway_process(folders[1], database, str(store), ABANDONED_MS) as second,
    ):
        yield Pair(first, second)


def bills(folder: Path, database: str) -> int:
    """How many answers ada paid for, each once and in full."""
    with open_accounts(GatewaySettings(database=database), folder) as accounts:
        paid = [row for row in accounts.usage("ada") if row.microcredits]
        assert {row.completion_tokens for row in paid} <= {TOKENS}
        balance = accounts.balance("ada")
        assert balance.reserved == 0
        assert balance.balance == 1_000_000 - sum(row.microcredits for row in paid)
        books_balance(accounts)
        return len(paid)


def test_a_retry_at_the_other_gateway_waits_for_the_answer_and_gets_the_same_bytes(
    tmp_path: Path, database: str, pair: Pair
) -> None:
    with pair.begun(0, "order-66") as (pieces, heard):
        refused = pair.once(1, "order-66")
        assert refused.status_code == 409
        assert refused.json()["error"]["code"] == "idempotency_key_in_use"
        assert int(refused.headers["retry-after"]) >= 1
        heard += "".join(pieces)
    again = [pair.ask(gateway, "order-66") for gateway in (1, 0)]
    assert [answer.text for answer in again] == [heard, heard]
    assert {answer.headers["idempotency-replayed"] for answer in again} == {"true"}
    assert bills(tmp_path, database) == 1


def test_both_are_asked_at_the_same_moment(tmp_path: Path, database: str, pair: Pair) -> None:
    before = bills(tmp_path, database)
    found: dict[tuple[int, str], str] = {}
    refused: list[httpx.Response] = []
    together = threading.Barrier(2)

    def ask(gateway: int) -> None:
        for key in ("one", "two"):
            together.wait(SECONDS_MAX)
            answer = pair.ask(gateway, key, refused)
            found[gateway, key] = f"{answer.status_code} {answer.text}"

    threads = [threading.Thread(target=ask, args=(gateway,)) for gateway in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[0, key] == found[1, key] for key in ("one", "two"))
    assert all(answer.startswith("200 ") for answer in found.values())
    assert len(set(found.values())) == 2, "each key has a seed of its own"
    assert refused, "the one that came second was told to come again"
    assert {answer.json()["error"]["code"] for answer in refused} == {"idempotency_key_in_use"}
    assert bills(tmp_path, database) == before + 2


def test_the_other_takes_over_from_a_killed_one_with_the_same_text_and_one_bill(
    tmp_path: Path, database: str, pair: Pair
) -> None:
    before = bills(tmp_path, database)
    with pair.begun(0, "order-67") as (_, heard):
        pair.processes[0].kill()
        pair.processes[0].wait()
    pair.processes[1].send_signal(signal.SIGUSR1)
    refused: list[httpx.Response] = []
    whole = pair.ask(1, "order-67", refused)
    assert whole.status_code == 200
    assert refused, "until the first has been silent for a while, it may only be slow"
    head = said(heard.rpartition("\n\n")[0] + "\n\n")
    assert head
    assert said(whole.text).startswith(head)
    assert len(said(whole.text)) > len(head)
    assert pair.once(1, "order-67").text == whole.text
    assert bills(tmp_path, database) == before + 1

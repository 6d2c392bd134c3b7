"""Gateway and PostgreSQL are killed (-9) while clients ask and ask again: nobody is charged twice or for nothing.

``make money`` does the same with 10,000 requests.
"""

from pathlib import Path

import pytest

from tests.soak.money import money

REQUESTS = 200


# a request whose gateway dies leaves the client's own generator half read, for the collector to find
@pytest.mark.filterwarnings("ignore:Async generator 'httpx:ResourceWarning")
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_every_answer_is_charged_once_whatever_dies(tmp_path: Path, kind: str) -> None:
    if kind == "sqlite":
        told = money(tmp_path, "", requests=REQUESTS, kills=2, seed=1)
    else:
        from postgresql import running_cluster

        try:
            cluster = running_cluster()
            dsn = cluster.__enter__()
        except RuntimeError as error:
            pytest.skip(str(error))
        try:
            told = money(tmp_path, dsn, requests=REQUESTS, kills=2, seed=1)
        finally:
            cluster.__exit__(None, None, None)
    assert told["kills"] == 2
    assert told["wrong"] == []
    assert told["answers"]["200"] >= REQUESTS

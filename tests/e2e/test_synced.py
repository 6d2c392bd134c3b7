"""Which commits wait for the disk: all but the reservations of answers that are told at their end."""

from pathlib import Path

import pytest
import sqlalchemy as sa
from gateway_rig import listening, serving

from gateway.db.session import Kept, open_database

CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi there"}]}


@pytest.mark.parametrize(
    ("more", "headers", "synced"),
    [
        ({}, {}, [False, True]),
        ({"stream": True}, {}, [True, True]),
        ({}, {"idempotency-key": "k"}, [True, True]),
    ],
)
async def test_a_reservation_waits_for_the_disk_only_if_something_is_told_before_it_is_settled(
    tmp_path: Path, database: str, more: dict, headers: dict, synced: list[bool]
) -> None:
    seen: list[bool] = []

    def look(connection: sa.Connection, cursor: object, statement: str, *rest: object) -> None:
        """How the transaction stands that a reservation or a usage row is written in."""
        if not statement.startswith(("INSERT INTO reservations", "INSERT INTO usages")) or "VALUES" not in statement:
            return
        raw = connection.connection.cursor()
        raw.execute("SHOW synchronous_commit" if database else "PRAGMA synchronous")
        seen.append(raw.fetchone()[0] in (2, "on"))
        raw.close()

    with listening("before_cursor_execute", look):
        async with serving(tmp_path, database=database) as rig, rig.http() as http:
            answer = await http.post(CHAT, json={**BODY, **more}, headers=headers)
            assert answer.status_code == 200
    assert seen == synced


def test_a_kept_connection_syncs_whoever_had_it_before(tmp_path: Path) -> None:
    database = open_database("", tmp_path)
    with database.write(synced=False):
        pass
    with database.engine.connect() as connection:
        connection.info.clear()  # as the pool does between two who have it
    kept = Kept(database.engine)
    with database.write(kept=kept) as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar_one() == 2
    kept.close()
    database.close()

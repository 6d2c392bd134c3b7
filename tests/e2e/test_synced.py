"""Which commits wait for the disk: all but the reservations of answers that are told at their end."""

from pathlib import Path

import pytest
import sqlalchemy as sa
from gateway_rig import listening, serving

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
        if not statement.startswith(("INSERT INTO reservations", "INSERT INTO usages")):
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

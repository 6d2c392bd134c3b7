"""Many streams at the same time: none is lost, nobody gets less than others (for a minute of 500: bench_gateway)."""

from pathlib import Path

import trio
from fake_engine import ANSWER, FakeEngine
from gateway_rig import serving

STREAMS, ROUNDS = 150, 3
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi there"}], "stream": True, "max_tokens": 7}


async def test_none_is_lost_and_nobody_waits_for_others(tmp_path: Path) -> None:
    pieces = [0] * STREAMS
    engine = FakeEngine(pause_seconds=0.05)
    plenty = {"requests_per_minute": 1 << 20, "tokens_per_minute": 1 << 30, "concurrent_per_key": STREAMS}
    async with serving(tmp_path, engine=engine, connections_per_second=0, **plenty) as rig:

        async def one(number: int) -> None:
            stream = await rig.raw("/v1/chat/completions", BODY, connection="close")
            async with stream:
                with trio.fail_after(60):
                    data = b"".join([part async for part in stream])
            assert data.rstrip(b"\r\n0").endswith(b"data: [DONE]"), data[-200:]
            pieces[number] += data.count(b'"content":"') - 1  # the role's is empty

        for _ in range(ROUNDS):
            async with trio.open_nursery() as nursery:
                for number in range(STREAMS):
                    nursery.start_soon(one, number)
        assert pieces == [ROUNDS * len(ANSWER)] * STREAMS
        balance = await rig.balance()
        assert balance.reserved == 0
        prompt, answer = 2, len(ANSWER)
        assert balance.balance == 1_000_000 - STREAMS * ROUNDS * (prompt + 2 * answer)

"""The control socket: commands, events, errors, and clients that go away."""

import json
import socket
import threading
from functools import partial

import pytest
import trio

from config.errors import RequestError, RiosError
from node import control


async def _echo(args, send):
    for number in range(args.get("events", 0)):
        await send({"number": number})
    return {"echo": args.get("value")}


async def _refuse(_args, _send):
    raise RequestError("not_found", "there is no such thing", "look elsewhere")


async def _bug(_args, _send):
    raise ZeroDivisionError


@pytest.fixture
async def path(tmp_path, nursery):
    cancelled = trio.Event()

    async def wait_for_ever(_args, _send):
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    commands = {"echo": _echo, "refuse": _refuse, "bug": _bug, "wait": wait_for_ever}
    where = tmp_path / "control.sock"
    await nursery.start(control.serve, where, commands)
    where_and_event = (where, cancelled)
    yield where_and_event
    nursery.cancel_scope.cancel()


async def _ask(path, command, **args):
    return await trio.to_thread.run_sync(partial(control.ask, path, command, args))


async def test_a_command_returns_its_result(path):
    assert await _ask(path[0], "echo", value=7) == {"echo": 7}


async def test_events_come_before_the_result(path):
    def run():
        return list(control.request(path[0], "echo", {"events": 2}))

    kinds = await trio.to_thread.run_sync(run)
    assert kinds == [("event", {"number": 0}), ("event", {"number": 1}), ("result", {"echo": None})]


async def test_an_error_keeps_code_message_and_hint(path):
    with pytest.raises(RiosError) as caught:
        await _ask(path[0], "refuse")
    assert (caught.value.code, caught.value.hint) == ("not_found", "look elsewhere")


async def test_a_bug_is_reported_and_the_socket_goes_on(path, caplog):
    with pytest.raises(RiosError, match="ZeroDivisionError"):
        await _ask(path[0], "bug")
    assert await _ask(path[0], "echo", value=1) == {"echo": 1}


async def test_an_unknown_command_is_named(path):
    with pytest.raises(RiosError, match="frobnicate"):
        await _ask(path[0], "frobnicate")


@pytest.mark.parametrize(
    "line",
    [b"no json\n", b"[]\n", b"{}\n", b"\xff\xfe\n", b'{"command": []}\n', b'{"command": "echo", "args": 1}\n'],
)
async def test_nonsense_is_answered_with_an_error(path, line):
    async with await trio.open_unix_socket(str(path[0])) as stream:
        await stream.send_all(line)
        assert b"error" in await stream.receive_some()


async def test_a_client_that_goes_away_cancels_its_command(path):
    where, cancelled = path
    stream = await trio.open_unix_socket(str(where))
    await stream.send_all(json.dumps({"command": "wait"}).encode() + b"\n")
    await trio.testing.wait_all_tasks_blocked()
    await stream.aclose()
    with trio.fail_after(5):
        await cancelled.wait()


async def test_only_the_owner_may_connect(path):
    assert control.socket_path(path[0]).stat().st_mode & 0o077 == 0


def test_nobody_listening_is_said_clearly(tmp_path):
    with pytest.raises(RiosError) as caught:
        control.ask(tmp_path / "control.sock", "status")
    assert caught.value.code == "not_running"


def test_a_stale_socket_counts_as_not_running(tmp_path):
    where = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(control.socket_path(where)))
    with pytest.raises(RiosError) as caught:
        control.ask(where, "status")
    assert caught.value.code == "not_running"
    control.socket_path(where).unlink(missing_ok=True)


def test_a_long_path_gets_a_short_stand_in(tmp_path):
    deep = tmp_path / ("x" * 120) / "control.sock"
    assert len(str(control.socket_path(deep))) <= 100
    assert control.socket_path(deep) == control.socket_path(deep)


def _dying_daemon(where, answer):
    """A fake: takes one connection, says ``answer`` and is gone, or is silent if there is none."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(control.socket_path(where)))
    listener.listen()

    def serve():
        connection, _ = listener.accept()
        with listener, connection:
            connection.recv(10)  # not all of it: the client sees a reset
            if answer is None:
                over.wait(10)
            else:
                connection.sendall(answer)

    over = threading.Event()
    thread = threading.Thread(target=serve)
    thread.start()
    return thread, over


@pytest.mark.parametrize("answer", [b"", b'{"event": {"te', b'{"event": 1}\n'])
def test_a_daemon_that_dies_while_it_answers_is_named(tmp_path, answer):
    thread, _ = _dying_daemon(tmp_path / "control.sock", answer)
    with pytest.raises(RiosError, match="stopped while it was answering") as caught:
        list(control.request(tmp_path / "control.sock", "chat"))
    thread.join()
    assert caught.value.code == "not_running"


def test_a_silent_daemon_is_not_waited_for_for_ever(tmp_path):
    thread, over = _dying_daemon(tmp_path / "control.sock", None)
    with pytest.raises(RiosError) as caught:
        control.ask(tmp_path / "control.sock", "health", seconds=0.2)
    over.set()
    thread.join()
    assert caught.value.code == "deadline"


async def test_a_request_that_is_too_long_is_refused_before_it_is_sent(path):
    with pytest.raises(RiosError) as caught:
        await _ask(path[0], "echo", value="x" * control.LINE_BYTES_MAX)
    assert caught.value.code == "too_large"

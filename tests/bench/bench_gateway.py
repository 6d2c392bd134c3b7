"""What the gateway adds to an answer, beside LiteLLM's proxy: same load, same run, in turns.

Our gateway runs over an engine that costs nothing (``gateway_node.py``), LiteLLM's proxy (one worker, in an
environment of its own under ``.bench/litellm``, made on the first run) in front of a model server that costs nothing
(``gateway_upstream.py``). Both know one key. Ours also counts limits, reserves, settles durably before an answer ends
and writes its log; the proxy keeps no accounts. Load by ``wrk`` and ``gateway_load.py``. Prints one JSON line:

- ``rps_vs_litellm``, ``streams_vs_litellm``: requests/s at 16 connections, streams/s of 50 pieces with 20 callers
- ``added_ms_p50``, ``added_ms_p99``: one connection, over the bare model server
- ``resident_mb``: the gateway's memory after all of it
- ``--parts streams``: 500 streams at the same time for a minute: lost ones, growth of memory, the least and the most
  that a caller got
"""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
PROXY = HERE.parents[1] / ".bench" / "litellm"
CLIENTS = HERE.parents[1] / "config" / "deploy" / "clients.sh"
CHUNKS, CALLERS, STREAMS = 50, 20, 400
BOUNDS = {"rps_vs_litellm": 10, "streams_vs_litellm": 10, "added_ms_p50": 1.5, "added_ms_p99": 10, "resident_mb": 120}
PARTS = ("litellm", "postgresql", "streams")
QUESTION = json.dumps({"model": "whole", "messages": [{"role": "user", "content": "hello there"}]})


def proxy_python() -> Path | None:
    """LiteLLM's environment, made if it can be."""
    try:
        subprocess.run([CLIENTS, "litellm"], check=True, env={**os.environ, "PYTHON": sys.executable})
    except subprocess.CalledProcessError:
        print("# LiteLLM cannot be installed here", file=sys.stderr)
        return None
    return PROXY / "bin" / "python"


@contextmanager
def process(command: list[str], **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Runs during the block."""
    started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, **more)
    try:
        yield started
    finally:
        started.kill()
        started.wait()


@contextmanager
def gateway(database: str, pause_ms: float = 0.0) -> Iterator[tuple[int, str, int]]:
    """Ours: port, key, process id."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE / "gateway_node.py"), folder, database, str(CHUNKS), str(pause_ms)]
        with process(command, env=environment) as node:
            assert node.stdout is not None
            said = json.loads(node.stdout.readline())
            yield said["port"], said["key"], node.pid


@contextmanager
def upstream(python: Path, port: int) -> Iterator[int]:
    """The bare model server."""
    with process([str(python), str(HERE / "gateway_upstream.py"), str(port), str(CHUNKS)]):
        wait_for(port)
        yield port


@contextmanager
def litellm(python: Path, port: int, behind: int) -> Iterator[tuple[int, str, int]]:
    """The proxy: port, key, process id."""
    model = {"model": "openai/m", "api_base": f"http://127.0.0.1:{behind}/v1", "api_key": "none"}
    config = {
        "model_list": [{"model_name": name, "litellm_params": model} for name in ("whole", "stream")],
        "litellm_settings": {"callbacks": [], "num_retries": 0, "request_timeout": 30, "telemetry": False},
        "general_settings": {"master_key": "sk-good"},
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(json.dumps(config))  # JSON is YAML
        command = [str(python.with_name("litellm")), "--config", str(file), "--port", str(port), "--num_workers", "1"]
        quiet = {"stderr": subprocess.DEVNULL, "env": {**os.environ, "LITELLM_LOG": "ERROR"}}
        with process(command, cwd=folder, **quiet) as proxy:
            wait_for(port)
            yield port, "sk-good", proxy.pid


def wait_for(port: int, seconds: float = 90) -> None:
    """Until something listens."""
    ends = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.1)


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def wrk(port: int, key: str, connections: int, seconds: int) -> dict[str, float]:
    """Requests per second and milliseconds; every answer must be a good one."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(
            f'wrk.method="POST"; wrk.headers["Content-Type"]="application/json"; '
            f'wrk.headers["Authorization"]="Bearer {key}"; wrk.body={json.dumps(QUESTION)}\n'
            "function done(s, l, r) io.write(string.format('RIOS %d %d %d %d %d %d\\n', s.requests, s.duration, "
            "l:percentile(50), l:percentile(99), s.errors.status, "
            "s.errors.read + s.errors.write + s.errors.timeout)) end\n"
        )
        script.flush()
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s", "-s", script.name, url]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"RIOS (\d+) (\d+) (\d+) (\d+) (\d+) (\d+)", said)
    assert found, said
    requests, spent_us, p50, p99, bad, broken = map(int, found.groups())
    assert bad + broken == 0, f"{bad} bad and {broken} broken answers of {requests}"
    return {"rps": round(requests / spent_us * 1e6, 1), "p50_ms": p50 / 1000, "p99_ms": p99 / 1000}


def streams(port: int, key: str, callers: int, total: int, seconds: float = 0.0) -> dict[str, Any]:
    """What ``gateway_load.py`` saw."""
    command = [sys.executable, str(HERE / "gateway_load.py"), str(port), key, str(callers), str(total), str(seconds)]
    if not seconds:
        command.pop()
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def one_side(port: int, key: str, share: int) -> dict[str, Any]:
    """Requests, single requests and streams; the slow side gets a ``share`` of the streams."""
    return {
        "sixteen": wrk(port, key, 16, 6),
        "one": wrk(port, key, 1, 5),
        "streams": streams(port, key, CALLERS, STREAMS // share),
    }


def resident_mb(pid: int) -> float:
    """Of a process and its children."""
    process_ = psutil.Process(pid)
    family = [process_, *process_.children(recursive=True)]
    return round(sum(each.memory_info().rss for each in family) / 1e6, 1)


def beside(python: Path | None, turns: int) -> dict[str, Any]:
    """Both sides in turns; the best of each."""
    with ExitStack() as stack:
        ours = stack.enter_context(gateway(""))
        theirs, bare = None, None
        if python is not None:
            bare = stack.enter_context(upstream(python, free_port()))
            theirs = stack.enter_context(litellm(python, free_port(), bare))
            wrk(theirs[0], theirs[1], 4, 2)
        wrk(ours[0], ours[1], 4, 2)
        rounds: list[dict[str, Any]] = []
        for turn in range(turns):
            found = {"ours": one_side(ours[0], ours[1], 1)}
            if theirs is not None and bare is not None:
                found["litellm"] = one_side(theirs[0], theirs[1], 4)
                found["bare"] = {"one": wrk(bare, "none", 1, 2)}
            print(f"# {turn}: {json.dumps(found)}", file=sys.stderr)
            rounds.append(found)
        return {
            "rounds": rounds,
            "resident_mb": resident_mb(ours[2]),
            "litellm_resident_mb": resident_mb(theirs[2]) if theirs else None,
        }


def ratios_of(found: dict[str, Any]) -> dict[str, float]:
    """The bounded figures of all rounds together: medians, the best for what other work can only slow down."""
    rounds = found["rounds"]
    bare_p50 = min((each["bare"]["one"]["p50_ms"] for each in rounds if "bare" in each), default=0.0)
    ratios = {
        "added_ms_p50": round(min(each["ours"]["one"]["p50_ms"] for each in rounds) - bare_p50, 2),
        "added_ms_p99": round(min(each["ours"]["one"]["p99_ms"] for each in rounds) - bare_p50, 2),
        "resident_mb": found["resident_mb"],
    }
    if "litellm" in rounds[0]:

        def ratio(part: str, figure: str) -> float:
            pairs = [each["ours"][part][figure] / each["litellm"][part][figure] for each in rounds]
            return round(sorted(pairs)[len(pairs) // 2], 1)

        ratios["rps_vs_litellm"] = ratio("sixteen", "rps")
        ratios["streams_vs_litellm"] = ratio("streams", "streams_per_s")
    return ratios


def on_postgresql() -> dict[str, Any]:
    """The same load on PostgreSQL."""
    sys.path.insert(0, str(HERE.parent / "e2e"))
    from postgresql import new_database, running_cluster

    with running_cluster() as cluster, gateway(new_database(cluster)) as (port, key, pid):
        wrk(port, key, 4, 2)
        return {**one_side(port, key, 1), "resident_mb": resident_mb(pid)}


def many(seconds: float, callers: int = 500) -> dict[str, Any]:
    """500 streams at the same time, a piece every 40 ms."""
    with gateway("", pause_ms=40.0) as (port, key, pid):
        streams(port, key, callers, callers)
        before = resident_mb(pid)
        found = streams(port, key, callers, 0, seconds)
        return {**found, "resident_mb_before": before, "resident_mb_after": resident_mb(pid)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0, help="of the many streams")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    found: dict[str, Any] = {"benchmark": "gateway", "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    if "litellm" in parts:
        figures = beside(proxy_python(), arguments.turns)
        found |= {"ratios": ratios_of(figures), "bounds": BOUNDS, "figures": figures}
    if "postgresql" in parts:
        found["postgresql"] = on_postgresql()
    if "streams" in parts:
        found["streams"] = many(arguments.seconds)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

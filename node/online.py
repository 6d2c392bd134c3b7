"""Commands that ask the running daemon over its control socket, and how their answers look to people."""

import time
from collections.abc import Mapping
from typing import Any

from config.errors import EXIT_FAILED, EXIT_OK, RiosError
from config.files import write_whole
from config.paths import PAUSE_NOTE
from config.vocabulary import GIB, MIB, format_credits
from node import control, progress, walls
from node.cli import Context, Output
from node.table import table as _table

WATCH_SECONDS = 0.5
HEALTH_SECONDS_MAX = 4.0
"""A node that says nothing for so long is not healthy (less than the patience of whoever asks regularly)."""
SCORE_CLEAN = 100


def _ask(context: Context, command: str, *, seconds: float | None = None, **args: Any) -> Any:  # noqa: ANN401 - JSON
    return control.ask(context.paths().control, command, args, seconds=seconds)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f} GiB" if size_bytes >= GIB else f"{size_bytes / MIB:.0f} MiB"


def status(context: Context) -> Output:
    """``rios status``"""
    data = _ask(context, "status")
    node, network, work, ledger = data["node"], data["network"], data["work"], data["ledger"]
    models = ", ".join(f"{m['name']} ({_state(m)})" for m in work["models"]) or "none"
    rows = [
        ["Node", f"{node['name'] or node['peer_id'][:16]}  {node['peer_id']}"],
        ["", f"RiOS {node['version']}, up {_duration(node['uptime_s'])}, {_size(node['rss_bytes'])} resident"],
        [
            "Network",
            f"{_count(network['links'], 'link')}, {_count(network['known'], 'node')} known{_swarm(network['swarm'])}",
        ],
        *(["", address] for address in network["addresses"]),
        ["", f"{network['reach']}: {network['why']}"],
        *([["", f"to be dialled directly: {network['fix']}"]] if network["fix"] else []),
        ["Work", f"{work['shards']} shards served on {work['device']}, {work['expert_rows']} expert rows computed"],
        *(
            [["", f"paused by its operator, {work['worker']['active']} calls in flight; rios resume"]]
            if work["paused"]
            else []
        ),
        ["", _memory_line(work["hosting"])],
        ["", _sandbox_line(work["sandbox"])],
        *(["", _withdrawn_line(row)] for row in work["hosting"]["withdrawn"]),
        *([["", walled]] if (walled := walls.line(work["sandbox"]["kinds"])) else []),
        ["", f"answers with: {models}"],
        ["", _routes_line(work["planner"])],
        ["", f"{work['active']} answers in progress, {work['waiting']} waiting, {work['tokens']} tokens made"],
        ["Ledger", _ledger_line(ledger)],
        ["Gateway", data["gateway"]["url"] if data["gateway"] else "off"],
    ]
    return Output(data, _table(rows))


def _routes_line(planner: Mapping[str, Any]) -> str:
    taken = ", ".join(f"{count} {route}" for route, count in sorted(planner["chosen"].items()))
    return f"route {planner['route']}" + (f"; the planner took {taken}" if taken else "")


def _memory_line(hosting: Mapping[str, Any]) -> str:
    """What models take of the memory that is offered for them."""
    cells = hosting["ram_bytes_cells"]
    apart = f", {_size(cells)} of that for cells beside their shards" if cells else ""
    return f"{_size(hosting['ram_bytes'])} of {_size(hosting['ram_bytes_max'])} of memory taken by models{apart}"


def _withdrawn_line(row: Mapping[str, Any]) -> str:
    return f"withdrawn: {row['shard']} of {row['name']}, tried again in {_duration(row['again_s'])}: {row['why']}"


def _sandbox_line(sandbox: Mapping[str, Any]) -> str:
    """Where strangers' shards run, and what keeps them there."""
    line = f"sandbox {sandbox['mode']}"
    if sandbox["mode"] == "off":
        return f"{line}: every shard runs in the node's own process"
    if sandbox["refusal"]:
        what = "run without a cell" if sandbox["unsandboxed"] else "are refused"
        return f"{line}: shards that need a cell {what}: {sandbox['refusal']}"
    cells = sandbox["cells"]
    missing = sorted({why for cell in cells for why in cell["missing"]})
    available = ", ".join(wall["name"] for wall in sandbox["walls"] if wall["available"])
    line += f": {_count(sandbox['running'], 'cell')} with {sum(cell['shards'] for cell in cells)} shards; {available}"
    if sandbox["killed"] or sandbox["died"]:
        line += f"; {sandbox['killed']} killed, {sandbox['died']} died, {sandbox['restarts']} restarts"
    return line + (f"; not in force: {'; '.join(missing)}" if missing else "")


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _swarm(swarm: Mapping[str, str] | None) -> str:
    return f", private swarm {swarm['name'] and repr(swarm['name']) + ' '}({swarm['id']})" if swarm else ""


def _state(model: Mapping[str, Any]) -> str:
    return "ready" if model["ready"] else model["reason"].removeprefix(f"{model['name']}: ")


def _ledger_line(ledger: Mapping[str, Any] | None) -> str:
    if not ledger:
        return "off: no genesis file"
    tolerance = "one witness, no Byzantine tolerance" if not ledger["f"] else f"tolerates {ledger['f']} lying witnesses"
    return f"network {ledger['net'][:12]}, balance {format_credits(ledger['balance'])} credits, {tolerance}"


def peers(context: Context) -> Output:
    """``rios peers``"""
    data = _ask(context, "peers")
    rows = [
        [
            "PEER",
            "LINK",
            "RTT",
            "IN",
            "OUT",
            "REGION",
            "SCORE",
            "CORES",
            "RAM",
            "SPEED",
            "SHARDS",
            "PRICE/TFLOP",
            "VERSION",
        ]
    ]
    for peer in data:
        rows.append(
            [
                peer["peer_id"] + (" (this node)" if peer["self"] else ""),
                _link(peer),
                _distance(peer),
                _moved(peer, "bytes_in"),
                _moved(peer, "bytes_out"),
                _region(peer),
                _score(peer),
                str(peer["cores"]),
                _size(peer["ram_bytes"]),
                f"{peer['expert_kflop_per_s'] / 1e6:.1f} GFLOP/s",
                f"{peer['shards']}{' (paused)' if peer['paused'] else ''}",
                format_credits(peer["microcredits_per_tflop"]) if peer["shards"] else "-",
                peer["version"],
            ]
        )
    return Output(data, _table(rows))


def _link(peer: Mapping[str, Any]) -> str:
    link = peer["link"]
    if not link:
        return "-" if peer["self"] else "yes" if peer["linked"] else "no"
    return f"{'to' if link['outbound'] else 'from'} {link.get('carrier', 'it')}"


def _moved(peer: Mapping[str, Any], direction: str) -> str:
    """Bytes of calls over the link in use, bulk transfers included."""
    link = peer["link"]
    if not link or direction not in link:
        return "-"
    return f"{(link[direction] + (link['bulk'] or {}).get(direction, 0)) / MIB:.1f} MiB"


def _distance(peer: Mapping[str, Any]) -> str:
    """The round trip: measured on a link, or estimated (~)."""
    if peer["self"] or peer["distance_ms"] is None:
        return "-"
    return f"{'' if peer['linked'] else '~'}{peer['distance_ms']:.1f} ms"


def _region(peer: Mapping[str, Any]) -> str:
    """As configured there, or inferred from round trips (~)."""
    return f"{'~' if peer['region_inferred'] else ''}{peer['region']}" if peer["region"] else "-"


def _score(peer: Mapping[str, Any]) -> str:
    """The score, and what is held against the peer."""
    if peer["self"]:
        return "-"
    notes = []
    if peer["ban"]:
        notes.append(f"banned {_duration(peer['ban']['left_s'])}: {peer['ban']['reason']}")
    elif peer["fault"] and peer["score"] < SCORE_CLEAN:
        notes.append(peer["fault"])
    notes += [f"{limit} x{count}" for limit, count in peer["limits_hit"].items()]
    return f"{peer['score']}{' (' + ', '.join(notes) + ')' if notes else ''}"


def peers_bans(context: Context) -> Output:
    """``rios peers bans``"""
    data = _ask(context, "peers.bans")
    rows = [["SHUT OUT", "LEFT", "REASON", "TIMES"]]
    for ban in data["bans"]:
        rows.append([ban["subject"], _duration(ban["left_s"]), ban["reason"], str(ban["count"] or "-")])
    text = _table(rows) if data["bans"] else "nobody is shut out"
    refused = ", ".join(f"{limit} {count}" for limit, count in sorted(data["refused"].items())) or "nothing"
    return Output(data, f"{text}\n\nrefused so far, by limit: {refused}")


def peers_ban(context: Context) -> Output:
    """``rios peers ban``"""
    data = _ask(context, "peers.ban", subject=context.args.subject, minutes=context.args.minutes)
    return Output(data, f"{data['subject']} is shut out for {_duration(data['left_s'])}")


def peers_unban(context: Context) -> Output:
    """``rios peers unban``"""
    data = _ask(context, "peers.unban", subject=context.args.subject)
    return Output(data, f"{data['subject']} {'may come in again' if data['was_banned'] else 'was not shut out'}")


def pause(context: Context) -> Output:
    """``rios pause``"""
    try:
        data = _ask(context, "pause", wait=context.args.wait)
    except RiosError as error:
        if error.code != "not_running":
            raise
        paths = context.paths()
        paths.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(paths.paused, PAUSE_NOTE)
        return Output({"paused": True, "in_flight": 0}, "the node is not running; it will start paused")
    rest = f"{data['in_flight']} calls in flight are finished first" if data["in_flight"] else "nothing is in flight"
    return Output(data, f"paused: no new work is taken, also after a restart; {rest}\n  rios resume ends it")


def resume(context: Context) -> Output:
    """``rios resume``"""
    try:
        return Output(_ask(context, "resume"), "this node takes work again")
    except RiosError as error:
        if error.code != "not_running":
            raise
    context.paths().paused.unlink(missing_ok=True)
    return Output({"paused": False}, "the node is not running; it will take work once it runs")


def health(context: Context) -> Output:
    """``rios health``"""
    data = _ask(context, "health", seconds=HEALTH_SECONDS_MAX)
    text = "ok" if data["ok"] else "impaired: " + "; ".join(data["reasons"])
    return Output(data, text, EXIT_OK if data["ok"] else EXIT_FAILED)


# --- models


def model_ls(context: Context) -> Output:
    """``rios model ls``, and ``rios model ls MODEL`` with its shards one by one."""
    if context.args.model:
        return _model_shards(context)
    try:
        data = _ask(context, "model.list")
    except RiosError as error:
        if error.code != "not_running":
            raise
        from node import local  # noqa: PLC0415 - the daemon is stopped: look at the disk

        return local.model_ls(context)
    rows = [["NAME", "ID", "SHARDS HERE", "REPLICAS", "DEPLOYED", "STATE"]]
    for model in data:
        replicas = f"{model['replicas_min']}-{model['replicas_max']} of {model['replicas_wanted']}"
        rows.append(
            [
                model["name"],
                model["id"][:16],
                f"{model['shards_held']}/{model['shards']}",
                replicas,
                "yes" if model["deployed"] else "no",
                _state(model),
            ]
        )
    return Output(data, _table(rows) if data else "no models; try: rios model import bundled")


def _model_shards(context: Context) -> Output:
    data = _ask(context, "model.shards", model=context.args.model)
    rows = [["SHARD", "WANTED", "THERE", "HEALTHY", "QUEUE", "LAST ANSWER", "REMARKS"]]
    for shard in data["shards"]:
        holders = shard["replicas"]
        ages = [each["answered_s"] for each in holders if each["answered_s"] is not None]
        rows.append(
            [
                shard["id"],
                str(shard["wanted"]),
                str(shard["there"]),
                str(shard["healthy"]),
                str(sum(each["queue"] for each in holders)),
                f"{_duration(min(ages))} ago" if ages else "-",
                _remarks(shard),
            ]
        )
    return Output(data, f"{data['name']}  {data['model_id'][:16]}\n{_table(rows)}")


def _remarks(shard: Mapping[str, Any]) -> str:
    missing = shard["wanted"] - shard["there"]
    ill = [f"{each['peer_id'][-8:]} {each['state']}" for each in shard["replicas"] if each["state"]]
    here = [f"withdrawn here: {shard['withdrawn']}"] if shard["withdrawn"] else []
    return "; ".join([f"{missing} missing"] * (missing > 0) + ill + here)


def model_deploy(context: Context) -> Output:
    """``rios deploy``, ``rios model deploy``"""
    args = context.args
    data = _ask(context, "model.deploy", model=args.model, replicas=args.replicas, mode=args.mode)
    return _deployed(context, data, "deployed")


def model_scale(context: Context) -> Output:
    """``rios scale``, ``rios model scale``"""
    data = _ask(context, "model.scale", model=context.args.model, replicas=context.args.replicas)
    return _deployed(context, data, "scaled")


def _deployed(context: Context, data: Mapping[str, Any], verb: str) -> Output:
    if context.args.wait:
        _watch_replicas(context, data)
        return Output(data, f"{verb} {data['name']}: the swarm holds {data['replicas']} replicas of every shard")
    watch = f"rios model ls {data['name']}"
    return Output(data, f"{verb} {data['name']} to {data['replicas']} replicas of every shard; watch it: {watch}")


def _watch_replicas(context: Context, deployed: Mapping[str, Any]) -> None:
    """Return once every shard has its replicas; ask as often as they change."""
    with progress.bar("replicas") as show:
        while True:
            rows = [row for row in _ask(context, "model.list") if row["id"] == deployed["model_id"]]
            shards = rows[0]["detail"] if rows else []
            wanted = deployed["replicas"] * len(shards)
            there = sum(min(shard["replicas"], deployed["replicas"]) for shard in shards)
            show(there, wanted, deployed["name"])
            if wanted and there == wanted:
                return
            time.sleep(WATCH_SECONDS)


def model_fetch(context: Context) -> Output:
    """``rios model fetch``"""
    asked, result = {"model": context.args.model, "whole": context.args.whole}, None
    with progress.bar("bytes") as show:
        for kind, value in control.request(context.paths().control, "model.fetch", asked):
            if kind == "result":
                result = value
            else:
                show(value["done"], value["total"], value["error"] or value["name"] or f"looking for {asked['model']}")
    if result is None:
        raise RiosError("internal", "the node sent no answer")
    return Output(result, f"{result['name']} is here: {_size(result['bytes'])} ({result['model_id'][:16]})")


def model_undeploy(context: Context) -> Output:
    """``rios undeploy``, ``rios model undeploy``"""
    data = _ask(context, "model.undeploy", model=context.args.model)
    return Output(data, f"withdrew {data['name']}; nodes drop its shards when they notice")

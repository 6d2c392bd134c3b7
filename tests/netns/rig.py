"""Several hosts in network namespaces: a bridge for the internet, routers with real NAT, partitions, loss, delay.

Not a test. Needs root, iproute2 and nftables (:func:`missing` says what lacks). Nothing outside the namespaces it made
is touched, and traffic cannot leave them: no interface of theirs is connected to the machine's own network.

Invariants:
1. Names are unique to this process and rig; :meth:`Rig.close` removes every namespace and ends every process it
   started, by pid, also after a failure. Removing a namespace removes its interfaces, addresses and rules.
"""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
INTERNET = "203.0.113"
_NUMBERS = itertools.count()

NAT = """
table ip nat {{
  chain post {{
    type nat hook postrouting priority srcnat;
    oifname "e0" masquerade{how}
  }}
}}
table ip guard {{
  chain fw {{
    type filter hook forward priority 0; policy drop;
    ct state established,related accept
    ct status dnat accept
    iifname "e1" accept
  }}
  chain own {{
    type filter hook input priority 0; policy accept;
    iifname "e0" ct state new drop
  }}
}}
"""

UPNP = """
table inet filter {
  chain miniupnpd {
  }
  chain prerouting_miniupnpd {
  }
  chain postrouting_miniupnpd {
  }
  chain forward {
    type filter hook forward priority -1;
    jump miniupnpd
  }
  chain prerouting {
    type nat hook prerouting priority dstnat;
    jump prerouting_miniupnpd
  }
  chain postrouting {
    type nat hook postrouting priority srcnat;
    jump postrouting_miniupnpd
  }
}
"""
IGD = """
ext_ifname=e0
ext_ip=11.1.1.1
listening_ip=e1
enable_upnp=yes
enable_natpmp=no
secure_mode=yes
system_uptime=yes
uuid=401bce65-7fb4-46b5-bc54-5008c9b6cd2d
allow 1024-65535 10.0.0.0/8 1024-65535
"""

TABLE = """
table {table} {{
  chain only {{
    type filter hook {hook};
    {rules}
  }}
}}
"""


def missing() -> str:
    """Why the rig cannot run here; empty if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool, package in (("ip", "iproute2"), ("nft", "nftables")):
        if shutil.which(tool) is None:
            return f"{tool} is missing (apt-get install {package})"
    name = f"riostry{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode:
        return f"no network namespaces here: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return ""


def run(*command: str, stdin: str = "") -> str:
    """A command's output; its stderr in the exception if it fails."""
    done = subprocess.run(command, input=stdin, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


@dataclass(frozen=True)
class Host:
    """A host: its namespace and its address."""

    rig: "Rig"
    namespace: str
    address: str

    def run(self, *command: str, stdin: str = "") -> str:
        """Run a command to its end in here."""
        return run("ip", "netns", "exec", self.namespace, *command, stdin=stdin)

    def start(self, *command: str, **more: object) -> subprocess.Popen:
        """Start a process in here; the rig ends it at the latest."""
        process = subprocess.Popen(["ip", "netns", "exec", self.namespace, *command], **more)
        self.rig.processes.append(process)
        return process

    def lose(self, percent: int) -> None:
        """Drop this share of all packets that arrive (0: none)."""
        with contextlib.suppress(RuntimeError):
            self.run("nft", "delete", "table", "ip", "loss")
        if percent:
            rule = f'iifname != "lo" numgen random mod 100 < {percent} counter drop'
            self.run("nft", "-f", "-", stdin=TABLE.format(table="ip loss", hook="input priority -300", rules=rule))

    def lost(self) -> int:
        """Packets dropped since :meth:`lose`."""
        return _counted(self.run("nft", "-j", "list", "table", "ip", "loss"))[0]


class Rig:
    """A small internet; use as a context manager."""

    def __init__(self) -> None:
        self._prefix = f"rios{os.getpid()}x{next(_NUMBERS)}"
        self._namespaces: list[str] = []
        self._ports: dict[str, str] = {}
        self._last = 0
        self.processes: list[subprocess.Popen] = []
        self.folder = Path(tempfile.mkdtemp(prefix=self._prefix))

    def __enter__(self) -> "Rig":
        try:
            self._switch = self._namespace("sw")
            self._ip(self._switch, "link add br0 type bridge", "link set br0 up")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _namespace(self, name: str) -> str:
        namespace = f"{self._prefix}{name}"
        self._namespaces.append(namespace)
        run("ip", "netns", "add", namespace)
        self._ip(namespace, "link set lo up")
        return namespace

    def _ip(self, namespace: str, *lines: str) -> None:
        run("ip", "-n", namespace, "-batch", "-", stdin="\n".join(lines))

    def host(self, name: str) -> Host:
        """A host on the internet, with an address of its own and no NAT."""
        namespace = self._namespace(name)
        self._last += 1
        address, port = f"{INTERNET}.{self._last}", f"p{name}"
        self._ip(
            self._switch, f"link add {port} type veth peer name e0 netns {namespace}", f"link set {port} master br0 up"
        )
        self._ip(namespace, f"addr add {address}/24 dev e0", "link set e0 up")
        self._ports[namespace] = port
        return Host(self, namespace, address)

    def router(self, name: str, *, random_ports: bool = False) -> Host:
        """A host that others can be put behind: masquerade, and nothing comes in that was not asked for."""
        router = self.host(name)
        router.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        router.run("nft", "-f", "-", stdin=NAT.format(how=" random,fully-random" if random_ports else ""))
        return router

    def behind(self, router: Host, name: str, network: str = "10.9.0") -> Host:
        """A host behind a router (one per router)."""
        namespace = self._namespace(name)
        self._ip(router.namespace, f"link add e1 type veth peer name e0 netns {namespace}")
        self._ip(router.namespace, f"addr add {network}.1/24 dev e1", "link set e1 up")
        up = (f"addr add {network}.2/24 dev e0", "link set e0 up", f"route add default via {network}.1")
        self._ip(namespace, *up)
        return Host(self, namespace, f"{network}.2")

    def give_upnp(self, router: Host) -> None:
        """A UPnP daemon on a router that has a host behind it. It reports a made-up outer address, as routers behind a
        second router do (and because it refuses to work with an address of the documentation range)."""
        router.run("nft", "-f", "-", stdin=UPNP)
        config = self.folder / f"{router.namespace}.conf"
        config.write_text(IGD)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        router.start("miniupnpd", "-d", "-f", str(config), "-P", f"{config}.pid", **quiet)

    def part(self, these: Sequence[Host], those: Sequence[Host]) -> None:
        """Nothing passes between two groups of hosts of the internet until :meth:`heal`."""
        self._drop([(a, b) for one, other in ((these, those), (those, these)) for a in one for b in other])

    def mute(self, these: Sequence[Host], those: Sequence[Host]) -> None:
        """Nothing passes from one group to the other until :meth:`heal`; the other way everything does."""
        self._drop([(a, b) for a in these for b in those], [(b, a) for a in these for b in those])

    def counted(self) -> tuple[int, int]:
        """Packets dropped since :meth:`part` or :meth:`mute`, and packets that passed the other way."""
        table = run("ip", "netns", "exec", self._switch, "nft", "-j", "list", "table", "bridge", "part")
        return _counted(table)

    def _drop(self, pairs: Sequence[tuple[Host, Host]], passing: Sequence[tuple[Host, Host]] = ()) -> None:
        def rule(a: Host, b: Host, what: str) -> str:
            return f'iifname "{self._ports[a.namespace]}" oifname "{self._ports[b.namespace]}" counter {what}'

        rules = [rule(a, b, "drop") for a, b in pairs] + [rule(a, b, "accept") for a, b in passing]
        table = TABLE.format(table="bridge part", hook="forward priority 0", rules="\n    ".join(rules))
        run("ip", "netns", "exec", self._switch, "nft", "-f", "-", stdin=table)

    def heal(self) -> None:
        """End the partition."""
        run("ip", "netns", "exec", self._switch, "nft", "delete", "table", "bridge", "part")

    @contextlib.contextmanager
    def slow_line(self, hosts: Sequence[Host], *, delay_ms: int, loss_percent: int) -> Iterator[list[str]]:
        """A second network of these hosts, with delay and loss each way; yields their addresses on it."""
        addresses = [f"10.77.0.{number + 1}" for number in range(len(hosts))]
        lines = [f"{host.namespace}={address}" for host, address in zip(hosts, addresses, strict=True)]
        program = str(Path(__file__).with_name("slow_line.py"))
        command = [sys.executable, program, str(delay_ms), str(loss_percent), *lines]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.processes.append(process)
        assert process.stdout is not None
        if process.stdout.readline() != b"up\n":
            raise RuntimeError("the slow line did not start")
        try:
            yield addresses
        finally:
            _end(process)

    def close(self) -> None:
        """End and remove everything."""
        for process in self.processes:
            _end(process)
        for namespace in self._namespaces:
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def _counted(listed: str) -> tuple[int, int]:
    """Packets that the rules of a table dropped, and that they let through."""
    found = {"drop": 0, "accept": 0}
    for each in json.loads(listed)["nftables"]:
        *_, counter, verdict = each.get("rule", {}).get("expr", [{}, {}])
        for name in found:
            found[name] += counter.get("counter", {}).get("packets", 0) if name in verdict else 0
    return found["drop"], found["accept"]


def _end(process: subprocess.Popen) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None and not pipe.closed:
            with contextlib.suppress(OSError):
                pipe.close()
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


class Node:
    """A node of :mod:`p2p` in a process of its own on a host of the rig."""

    def __init__(self, host: Host, name: str, seeds: Sequence[str] = (), **settings: object) -> None:
        self.host = host
        self.name = name
        folder = host.rig.folder / name
        folder.mkdir(exist_ok=True)
        # the bridge is one LAN where it should be an internet: no mDNS
        settings = {"listen": ["/ip4/0.0.0.0/tcp/4701"], "seeds": list(seeds), "mdns": "off", **settings}
        self.log = folder / "stderr"
        with self.log.open("ab") as log:
            self.process = host.start(
                sys.executable,
                str(Path(__file__).with_name("node_process.py")),
                str(folder),
                json.dumps(settings),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            )
        hello = self._answer()
        self.peer_id, self.addresses = hello["peer_id"], hello["addresses"]

    @property
    def seed(self) -> str:
        """Its address on the internet."""
        return f"/ip4/{self.host.address}/tcp/4701/p2p/{self.peer_id}"

    def _answer(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended: {self.log.read_text()[-3000:]}")
        return json.loads(line)

    def tell(self, op: str, **arguments: object) -> None:
        """Give a command; :meth:`_answer` (or :meth:`hear`) takes its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
        self.process.stdin.flush()

    def hear(self) -> dict:
        """The answer to a command."""
        return self._answer()

    def ask(self, op: str, **arguments: object) -> dict:
        """A command and its answer."""
        self.tell(op, **arguments)
        return self._answer()

    def call(self, peer: "Node", deadline_ms: int = 10_000, **more: object) -> dict:
        """Call ``echo`` of another node."""
        return self.ask("call", peer=peer.peer_id, deadline_ms=deadline_ms, **more)

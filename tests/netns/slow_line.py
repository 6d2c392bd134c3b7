"""A line with delay and loss between hosts: one TUN device in each namespace, packets carried by this process.

Not a test. Arguments: delay each way in ms, loss in percent, then ``namespace=address`` for each host. Ends when its
standard input closes. (The kernel's own netem is not in every kernel.)
"""

import ctypes
import fcntl
import heapq
import os
import random
import select
import socket
import struct
import subprocess
import sys
import time

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
CLONE_NEWNET = 0x40000000
QUEUE_MAX = 10_000


def open_tun(namespace: str, address: str) -> int:
    """A TUN device made inside the namespace, with its address, up."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/self/ns/net") as home, open(f"/run/netns/{namespace}") as there:
        if libc.setns(there.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
        try:
            tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", b"slow0", IFF_TUN | IFF_NO_PI))
        finally:
            libc.setns(home.fileno(), CLONE_NEWNET)
    for command in (f"addr add {address}/24 dev slow0", "link set slow0 mtu 1400 up"):
        subprocess.run(["ip", "-n", namespace, *command.split()], check=True)
    return tun


def carry(tuns: dict[bytes, int], delay_s: float, loss: float) -> None:
    """Until standard input closes."""
    queue: list[tuple[float, int, int, bytes]] = []
    number = 0
    while True:
        wait_s = max(0.0, queue[0][0] - time.monotonic()) if queue else None
        ready, _, _ = select.select([0, *tuns.values()], [], [], wait_s)
        if 0 in ready:
            return
        for tun in ready:
            for _ in range(64):
                try:
                    packet = os.read(tun, 2048)
                except BlockingIOError:
                    break
                out = tuns.get(packet[16:20])
                if out is not None and len(queue) < QUEUE_MAX and random.random() >= loss:
                    number += 1
                    heapq.heappush(queue, (time.monotonic() + delay_s, number, out, packet))
        while queue and queue[0][0] <= time.monotonic():
            _, _, out, packet = heapq.heappop(queue)
            os.write(out, packet)


def main() -> None:
    delay_ms, loss_percent, *hosts = sys.argv[1:]
    tuns = {}
    for text in hosts:
        namespace, _, address = text.partition("=")
        tuns[socket.inet_aton(address)] = open_tun(namespace, address)
    print("up", flush=True)
    carry(tuns, int(delay_ms) / 1000, int(loss_percent) / 100)


if __name__ == "__main__":
    main()

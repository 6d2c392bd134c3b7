"""A small DNS server on loopback for tests: answers over UDP from a table of records that the test may change."""

from contextlib import asynccontextmanager

import dns.message
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset
import trio


class DnsServer:
    """``records[(name, type)]`` are texts in zone-file form; a missing name is NXDOMAIN; ``silent``: no answer."""

    def __init__(self) -> None:
        self.records: dict[tuple[str, str], list[str]] = {}
        self.asked: list[tuple[str, str]] = []
        self.silent = False
        self.ttl = 60
        self.address = ""

    async def serve(self, socket: trio.socket.SocketType) -> None:
        while True:
            data, sender = await socket.recvfrom(4096)
            query = dns.message.from_wire(data)
            question = query.question[0]
            name, kind = question.name.to_text(omit_final_dot=True).lower(), dns.rdatatype.to_text(question.rdtype)
            self.asked.append((name, kind))
            if self.silent:
                continue
            response = dns.message.make_response(query)
            texts = self.records.get((name, kind))
            if texts is None:
                response.set_rcode(dns.rcode.NXDOMAIN)
            else:
                response.answer.append(dns.rrset.from_text(question.name, self.ttl, "IN", kind, *texts))
            await socket.sendto(response.to_wire(), sender)


@asynccontextmanager
async def dns_server():
    server = DnsServer()
    socket = trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM)
    await socket.bind(("127.0.0.1", 0))
    server.address = f"127.0.0.1:{socket.getsockname()[1]}"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve, socket)
        try:
            yield server
        finally:
            nursery.cancel_scope.cancel()
    socket.close()

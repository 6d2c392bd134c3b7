"""Messages between a node and a walled process, by a stream socket: a length (u32, little endian) and that many bytes.

Descriptors go with the first byte. Whoever reads bounds the length before it takes any memory. Fails with EOFError for
an end and for what is no frame, OSError.
"""

import socket
import struct
from typing import Final

from config.vocabulary import MIB

FRAME_BYTES_MAX: Final = 320 * MIB
"""A tokenizer file may have 256 MiB."""
DESCRIPTORS_MAX: Final = 200
"""With one frame; the kernel takes 253."""
_HEAD = struct.Struct("<I")


def frame(data: bytes) -> bytes:
    """``data`` with its length in front."""
    return _HEAD.pack(len(data)) + data


def receive(line: socket.socket, most: int = FRAME_BYTES_MAX) -> tuple[bytes, list[int]]:
    """The next frame and the descriptors that came with it."""
    head, descriptors, _, _ = socket.recv_fds(line, _HEAD.size, DESCRIPTORS_MAX)
    if not head:
        raise EOFError
    head += exactly(line, _HEAD.size - len(head))
    (size,) = _HEAD.unpack(head)
    if size > most:
        raise EOFError
    return exactly(line, size), descriptors


def exactly(line: socket.socket, count: int) -> bytes:
    """So many bytes. Raises EOFError, OSError."""
    parts = []
    while count:
        part = line.recv(min(count, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)

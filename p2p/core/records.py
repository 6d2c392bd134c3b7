"""The lane's records: what is sealed, under which nonce, with which key.

A record is a 4-byte head (kind u8, length u24; big-endian) and that many bytes of ciphertext with its tag; the head is
authenticated with it, the nonce is the number of records sent before in this direction. The kinds:

====================  ==================================================================================
DATA + channel        the next bytes of the channel's stream of RPC frames
WINDOW + channel      u32: the peer may send that many bytes more on the channel
128 and above         nothing yet: decrypted, then ignored, so that a later version may send them
====================  ==================================================================================

Invariants:
1. A nonce is used once; records open in the order in which they were sealed, or not at all.
2. A key seals at most :data:`REKEY_BYTES`; both ends count, and go on with the next key.
"""

from struct import Struct

from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

Buffer = bytes | bytearray | memoryview
Cipher = AESGCM | ChaCha20Poly1305

RECORD_BYTES_MAX = (256 << 10) + 4096
"""Plaintext in a record: a frame with a tensor of 256 KiB fits one. Measured: fewer, larger records are faster than a
pipeline of small ones, since a record more is a wake-up more."""
IN_PLACE_BYTES = 8 << 10
"""Records from this size on are sealed into the shared buffer."""
REKEY_BYTES = 1 << 35
"""AES-GCM stays far from its limits below 2**36 bytes of large records: RFC 8446, section 5.5."""
HEAD_BYTES, TAG_BYTES = 4, 16
DATA, WINDOW = 0, 2
MAIN, BULK = 0, 1
IGNORED = 128
_HEAD = Struct("!I")
_NONCE = Struct("<4xQ")
U32 = Struct("!I")
_pack_head, unpack_head, _pack_nonce = _HEAD.pack, _HEAD.unpack_from, _NONCE.pack


class Key:
    """One direction's key: seals or opens record after record."""

    __slots__ = ("cipher", "number", "used")

    def __init__(self, cipher: Cipher) -> None:
        self.cipher = cipher
        self.number = 0
        self.used = 0

    def renew(self) -> None:
        """The next key, as in Noise's rekey: the first 32 bytes of zeros sealed with the last nonce but one."""
        made = self.cipher.encrypt(b"\xff" * 11 + b"\xfe", bytes(32), b"rekey")[:32]
        self.cipher, self.used = type(self.cipher)(made), 0

    def seal(self, kind: int, data: Buffer, room: memoryview) -> Buffer:
        """A record, head included; a large one lies in ``room`` and must be used before the next is made."""
        size = len(data)
        head = _pack_head(kind << 24 | size + TAG_BYTES)
        nonce = _pack_nonce(self.number)
        self.number += 1
        self.used += size
        if size < IN_PLACE_BYTES:
            record: Buffer = head + self.cipher.encrypt(nonce, data, head)
        else:
            end = HEAD_BYTES + size + TAG_BYTES
            room[:HEAD_BYTES] = head
            self.cipher.encrypt_into(nonce, data, head, room[HEAD_BYTES:end])
            record = room[:end]
        if self.used > REKEY_BYTES:
            self.renew()
        return record

    def open(self, record: memoryview) -> bytes:
        """The plaintext of a whole record. Raises InvalidTag."""
        plain = self.cipher.decrypt(_pack_nonce(self.number), record[HEAD_BYTES:], record[:HEAD_BYTES])
        self.number += 1
        self.used += len(plain)
        if self.used > REKEY_BYTES:
            self.renew()
        return plain

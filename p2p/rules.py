"""Which DHT records this node takes, by namespace.

Owns: the rules that packages register. Does not own: the records, the DHT.
"""

from libp2p.records.utils import InvalidRecordType
from libp2p.records.validator import Validator

from config.errors import RiosError
from p2p.face import RecordRule

RECORD_BYTES_MAX = 64 << 10


class Rules(Validator):
    """Our part of the DHT's key space."""

    def __init__(self) -> None:
        self.rules: dict[str, RecordRule] = {}

    def _rule(self, key: str) -> tuple[RecordRule, str]:
        _, _, rest = key.removeprefix("/").partition("/")
        namespace, _, name = rest.partition("/")
        rule = self.rules.get(namespace)
        if rule is None or not name:
            raise InvalidRecordType(f"no rule for the record {key[:100]!r}")
        return rule, name

    def validate(self, key: str, value: bytes) -> None:
        """Raise InvalidRecordType unless the record's rule accepts it."""
        rule, name = self._rule(key)
        if len(value) > RECORD_BYTES_MAX:
            raise InvalidRecordType(f"a record of {len(value)} bytes exceeds {RECORD_BYTES_MAX}")
        try:
            rule.check(name, value)
        except RiosError as error:
            raise InvalidRecordType(str(error)) from error

    def select(self, key: str, values: list[bytes]) -> int:
        """The index of the value that wins."""
        rule, name = self._rule(key)
        return rule.select(name, values)

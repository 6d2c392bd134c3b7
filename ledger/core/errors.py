"""The error a broken rule raises.

``rule`` names the rule for machines and tests; ``wait`` is true when the object may become valid once more final
objects are known (a gap in a chain, a credit that has not arrived), so that it is kept or sent again.
"""

from config.errors import IntegrityError


class RuleError(IntegrityError):
    """An object breaks rule ``rule``."""

    def __init__(self, rule: str, message: str, hint: str = "", *, wait: bool = False) -> None:
        super().__init__("conflict" if wait else "integrity", f"{rule}: {message}", hint)
        self.rule = rule
        self.wait = wait

"""A process for text that was taken over (tests/unit/dmoe/hostile_walled)."""

from dmoe import asidework
from tests.unit.dmoe import hostile_walled as deeds


class Work(asidework.Work):
    def __init__(self):
        super().__init__()
        self.questions = {
            "open": lambda: True,
            "honest": lambda value: value,
            "attempts": deeds.attempts,
            "spin": deeds.spin,
            "bomb": deeds.bomb,
            "exec": deeds.execute,
            "trace": deeds.trace,
        }


def main(arguments):
    asidework.Work = Work
    asidework.main(arguments)

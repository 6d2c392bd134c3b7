"""A process for grammars whose library is taken over by some of them: the text says what it does."""

import os
import signal

from dmoe import grammarwork
from dmoe.grammar import Grammars, Refused, State
from tests.unit.dmoe import hostile_walled as deeds


class Late(State):
    def __init__(self, deed):
        self.deed = deed

    def copy(self):
        return self

    done = False

    def mask(self):
        if self.deed == "late":
            deeds.spin()
        return b"x" * 7


def kill_host():
    os.kill(os.getppid(), signal.SIGKILL)


class Taken(Grammars):
    def compile(self, kind, text):
        if text == "attempts":
            raise Refused(deeds.report())
        if text in ("late", "nonsense"):
            return Late(text)
        deed = {"exec": deeds.execute, "spin": deeds.spin, "bomb": deeds.bomb, "kill host": kill_host}.get(text)
        if deed is not None:
            deed()
        return super().compile(kind, text)


def main(arguments):
    grammarwork.Grammars = Taken
    grammarwork.main(arguments)

"""A process for grammars on a system without seccomp."""

from dmoe import grammarwork
from dmoe.cells import sandbox


def main(arguments):
    sandbox.missing = lambda: "seccomp: this kernel has none"
    grammarwork.main(arguments)

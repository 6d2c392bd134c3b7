"""A process for text on a system without seccomp."""

from dmoe import asidework
from dmoe.cells import sandbox


def main(arguments):
    sandbox.missing = lambda: "seccomp: this kernel has none"
    asidework.main(arguments)

"""A process that imports and was taken over by the files: the model's name says what it does."""

import os
import time

from config.errors import IntegrityError
from dmoe.importer import walledwork
from tests.unit.dmoe import hostile_walled as deeds


def run(line, setup, given):
    deed = setup.wishes.name
    if deed == "attempts":
        raise IntegrityError("integrity", deeds.report())
    if deed == "leave":
        os._exit(3)
    if deed == "silent":
        time.sleep(1000)
    if deed == "nonsense":
        line.sendall(walledwork.frame(b"\xc1"))
        time.sleep(1000)
    if deed != "thief":
        walledwork._asked(line, {"need": 100})
    if deed == "escape":
        walledwork._asked(line, {"create": ["../../escaped", 10]})
    if deed == "more":
        walledwork._asked(line, {"create": ["a.safetensors", 101]})
    if deed == "other":
        walledwork._asked(line, {"written": "../one/config.json"})
    if deed == "twice":
        walledwork._asked(line, {"create": ["a.safetensors", 10]})
        walledwork._asked(line, {"create": ["a.safetensors", 10]})
    setup = walledwork.msgspec.structs.replace(setup, publisher="somebody else", wishes=walledwork.Wishes())
    return honest(line, setup, given)


honest = walledwork._run


def main(arguments):
    walledwork._run = run
    walledwork.main(arguments)

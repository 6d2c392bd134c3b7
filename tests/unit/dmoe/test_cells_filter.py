"""The seccomp filter as a program: run by a small interpreter here, for both architectures."""

import errno

import pytest

from dmoe.cells import kernel, seccomp

ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS


def verdict(machine, number, arguments=(), arch=None, more=()):
    """What the kernel would answer (the five kinds of instructions that the filter has)."""
    program = seccomp.program(machine, more)
    data = {0: number, 4: kernel.AUDIT_ARCH[machine] if arch is None else arch}
    data |= {16 + 8 * index: value & 0xFFFFFFFF for index, value in enumerate((*arguments, 0, 0, 0, 0, 0, 0)[:6])}
    at = value = 0
    while True:
        code, if_true, if_false, k = program[at]
        if code == 0x06:
            return k
        if code == 0x20:
            value = data[k]
            at += 1
            continue
        holds = {0x15: value == k, 0x35: value >= k, 0x45: bool(value & k)}[code]
        at += 1 + (if_true if holds else if_false)


@pytest.mark.parametrize("machine", sorted(seccomp.NUMBERS))
def test_every_call_on_the_list_gets_its_answer_and_no_other(machine):
    numbers = seccomp.NUMBERS[machine]
    assert len(set(numbers.values())) == len(numbers)
    for name, number in numbers.items():
        if name not in seccomp.CONDITIONAL:
            assert verdict(machine, number) == (KILL if name in seccomp.DEADLY else ALLOW), name
    for number in set(range(600)) - set(numbers.values()):
        assert verdict(machine, number) == EPERM, number


@pytest.mark.parametrize("machine", sorted(seccomp.NUMBERS))
def test_conditions(machine):
    numbers = seccomp.NUMBERS[machine]

    def ask(name, *arguments):
        return verdict(machine, numbers[name], arguments)

    read_write, executable = 3, 4
    private, shared, anonymous = 2, 1, 0x20
    assert ask("mmap", 0, 4096, read_write, private | anonymous) == ALLOW
    assert ask("mmap", 0, 4096, 1, shared) == ALLOW  # a file of its own
    assert ask("mmap", 0, 4096, read_write, shared | anonymous) == EPERM
    assert ask("mmap", 0, 4096, read_write | executable, private | anonymous) == EPERM
    assert ask("mmap", 0, 4096, executable, private) == EPERM
    assert ask("mprotect", 0, 4096, read_write) == ALLOW
    assert ask("mprotect", 0, 4096, 1 | executable) == EPERM
    thread = 0x003D0F00
    assert ask("clone", thread) == ALLOW
    assert ask("clone", 17) == EPERM  # fork
    assert ask("clone", 0x4111) == EPERM  # vfork
    for namespace in (kernel.CLONE_NEWUSER, kernel.CLONE_NEWNET, kernel.CLONE_NEWIPC, 0x00020000, 0x20000000, 0x80):
        assert ask("clone", thread | namespace) == EPERM
    assert ask("clone3", 0) == ENOSYS
    assert ask("fcntl", 3, 1030) == ALLOW
    assert ask("fcntl", 3, 1033) == EPERM  # F_ADD_SEALS
    assert ask("fcntl", 3, 8) == EPERM  # F_SETOWN: signals to others
    assert ask("prctl", 15) == ALLOW
    assert ask("prctl", 4) == EPERM  # PR_SET_DUMPABLE


@pytest.mark.parametrize("machine", sorted(seccomp.NUMBERS))
def test_calls_of_another_architecture_kill(machine):
    read = seccomp.NUMBERS[machine]["read"]
    for arch in (0, 0x40000003, *(kernel.AUDIT_ARCH[other] for other in seccomp.NUMBERS if other != machine)):
        assert verdict(machine, read, arch=arch) == KILL
    if machine == "x86_64":
        assert verdict(machine, read | 0x40000000) == KILL  # the x32 ABI


@pytest.mark.parametrize("machine", sorted(seccomp.NUMBERS))
def test_what_some_kinds_may_do_beside_is_theirs_alone(machine):
    numbers, more = seccomp.NUMBERS[machine], seccomp.MORE[machine]
    assert not set(more.values()) & set(numbers.values())
    for name, number in more.items():
        assert verdict(machine, number) == EPERM, name
        assert verdict(machine, number, more=(name,)) == ALLOW, name
    assert verdict(machine, more["prlimit64"], [4711], more=("prlimit64",)) == EPERM  # another's limits
    assert verdict(machine, numbers["clone"], [17], more=(seccomp.FORK,)) == ALLOW
    assert verdict(machine, numbers["clone"], [17 | kernel.CLONE_NEWUSER], more=(seccomp.FORK,)) == EPERM
    assert verdict(machine, numbers["execve"], more=tuple(more)) == KILL

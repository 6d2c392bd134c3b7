"""How the test files are shared among processes: each once, those with processes before the others."""

from tests.ports import free_port
from tests.shares import next_scope, scope_of, spread

FILES = [
    *[f"tests/e2e/test_{n}.py" for n in range(4)],
    *[f"tests/interop/test_{n}.py" for n in range(2)],
    "tests/soak/test_bank.py",
    *[f"tests/unit/p2p/test_{n}.py" for n in range(10)],
]
TESTS = [f"{file}::test_{n}" for file in FILES for n in range(3)]


def test_each_runs_once_and_in_the_order_of_its_file():
    ordered = [TESTS[index] for index in spread(TESTS)]
    assert sorted(ordered) == sorted(TESTS)
    for file in FILES:
        mine = [test for test in TESTS if test.startswith(f"{file}::")]
        assert [test for test in ordered if test in mine] == mine


def test_processes_come_before_the_others():
    scopes = list(dict.fromkeys(scope_of(TESTS[index]) for index in spread(TESTS)))
    assert scopes.count("tests/interop") == 1
    with_processes = ["/unit/" not in scope for scope in scopes]
    assert with_processes == sorted(with_processes, reverse=True)


def test_the_same_order_everywhere():
    assert spread(TESTS) == spread(list(TESTS))
    assert spread([]) == []


def test_ports_are_new_each_time_and_none_that_the_kernel_hands_out():
    ports = [free_port() for _ in range(20)]
    assert len(set(ports)) == 20
    assert all(10_000 <= port < 30_000 for port in ports)


def test_two_files_with_processes_are_under_way_and_no_third_beside_them():
    waiting = ["tests/e2e/test_3.py", "tests/faults/test_1.py", "tests/unit/p2p/test_1.py", "tests/e2e/test_4.py"]
    assert next_scope(waiting, 0) == waiting[0]
    assert next_scope(waiting, 1) == waiting[0]
    assert next_scope(waiting, 2) == "tests/unit/p2p/test_1.py"
    assert next_scope(waiting[:2], 2) is None, "nothing else is left"

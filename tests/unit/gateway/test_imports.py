"""What a node pays for a gateway it does not run, or that has nothing to migrate."""

import subprocess
import sys
from pathlib import Path


def _loaded(code: str, *arguments: str) -> set[str]:
    """The top-level packages that a fresh interpreter has loaded after ``code``."""
    program = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True, timeout=60
    )
    return set(result.stdout.split())


def test_a_node_without_gateway_loads_nothing_of_it() -> None:
    assert not _loaded("import gateway, gateway.ports") & {"sqlalchemy", "alembic", "starlette", "hypercorn", "msgspec"}


def test_what_signs_people_in_is_only_loaded_when_somebody_signs_in() -> None:
    assert not _loaded("import gateway.gateway") & {"jwt", "cryptography", "argon2", "pyotp", "httpx", "authlib"}


def test_alembic_is_only_loaded_to_migrate(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\n"
        "from config.settings import GatewaySettings\n"
        "from gateway.accounts import open_accounts\n"
        "with open_accounts(GatewaySettings(), Path(sys.argv[1])): pass\n"
    )
    assert "alembic" in _loaded(code, str(tmp_path))
    assert "alembic" not in _loaded(code, str(tmp_path))


def test_graphql_is_only_loaded_to_answer_it() -> None:
    assert "graphql" not in _loaded("import gateway.gateway, gateway.app")
    assert "graphql" in _loaded("import gateway.graphql.answering")

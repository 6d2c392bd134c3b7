"""Certificates for tests, signed by themselves."""

import subprocess
from pathlib import Path


def make_certificate(folder: Path, name: str = "cert") -> tuple[Path, Path]:
    """The files of a certificate for localhost and its key."""
    chain, key = folder / f"{name}.pem", folder / f"{name}.key"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    command += ["-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command += ["-keyout", str(key), "-out", str(chain)]
    subprocess.run(command, check=True, capture_output=True)
    key.chmod(0o600)
    return chain, key

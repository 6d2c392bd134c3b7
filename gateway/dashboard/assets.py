"""Style and scripts: read once, served with a strong ETag, and cached by the address's version for a year.

The address of an asset holds the digest of all of them, so a new release is seen at once and an old one never mixed in.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from gateway.errors import ApiError

_FOLDER = Path(__file__).parent / "static"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class Assets:
    """All of them by name."""

    version: str
    files: Mapping[str, bytes]


@cache
def assets() -> Assets:
    """Read from disk at the first use."""
    files = {path.name: path.read_bytes() for path in sorted(_FOLDER.iterdir()) if path.suffix in _TYPES}
    digest = hashlib.sha256(b"".join(name.encode() + data for name, data in files.items()))
    return Assets(digest.hexdigest()[:12], files)


async def asset(request: Request) -> Response:
    """``GET /dashboard/static/{version}/{name}``"""
    known, name = assets(), request.path_params["name"]
    data = known.files.get(name)
    if data is None:
        raise ApiError("not_found", f"there is no file {name!r:.60}", public_code="not_found")
    # an old page may ask for an old version: it gets the new file, and must not keep it under the old name
    current = request.path_params["version"] == known.version
    headers = {
        "cache-control": "public, max-age=31536000, immutable" if current else "no-store",
        "etag": f'"{known.version}"',
    }
    if request.headers.get("if-none-match") == headers["etag"]:
        return Response(status_code=304, headers=headers)
    return Response(data, headers={**headers, "content-type": _TYPES[Path(name).suffix]})

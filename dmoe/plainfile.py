"""Opening a file that a stranger may have had a hand in: a plain file of its folder, or nothing.

Owns: what a path may lead to. Does not own: what is in the file.

Invariants:
1. No link is followed below the folder, and a file has one name only: what was verified is what is read, and nothing
   outside of the folder is.
2. A device, a pipe or a socket is never opened for reading (a pipe would wait for ever).
3. What is checked is the open file, not its name: it cannot be exchanged in between.

Fails with IntegrityError naming the rule, LocalError if the system refuses.
"""

import errno
import os
import stat
from pathlib import Path

from config.errors import IntegrityError, LocalError

NAME_BYTES_MAX = 255
_HINT = "remove it; it will be fetched again"


def open_plain(path: Path, root: Path | None = None, *, links: bool = False) -> int:
    """A descriptor of the plain file at ``path``, for reading; the caller closes it. With ``root`` (a beginning of
    ``path``), no folder below it may be a link either. ``links``: other names of the file (hard links) are fine."""
    try:
        descriptor = _open(path, root)
    except FileNotFoundError as error:
        raise LocalError("not_found", f"{path} is missing", "fetch or import the model again") from error
    except ValueError as error:  # a NUL in its name
        raise IntegrityError("integrity", f"{str(path)[:80]!r} is no file name: {error}", _HINT) from error
    except OSError as error:
        raise _refused(path, error) from error
    try:
        _check(path, os.fstat(descriptor), links)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _open(path: Path, root: Path | None) -> int:
    # O_NONBLOCK: a pipe without a writer is opened at once, and refused by its kind
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    if root is None:
        return os.open(path, flags)
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        *between, name = path.relative_to(root).parts
        for part in between:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            os.close(folder)
            folder = inner
        return os.open(name, flags, dir_fd=folder)
    finally:
        os.close(folder)


def _refused(path: Path, error: OSError) -> IntegrityError | LocalError:
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        return IntegrityError("integrity", f"{path}: a symbolic link, or below one, is not followed", _HINT)
    if error.errno == errno.ENAMETOOLONG:
        return IntegrityError(
            "integrity", f"{str(path)[:80]}...: its name is longer than {NAME_BYTES_MAX} bytes", _HINT
        )
    if error.errno == errno.ENXIO:
        return IntegrityError("integrity", f"{path} is a socket or a device, not a plain file", _HINT)
    full = error.errno == errno.ENOMEM
    hint = "free some memory, or use another route" if full else ""
    return LocalError("local", f"cannot read {path}: {error.strerror}", hint)


def _check(path: Path, found: os.stat_result, links: bool) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for test, name in _KINDS if test(found.st_mode)), "something else")
        raise IntegrityError("integrity", f"{path} is {kind}, not a plain file", _HINT)
    if found.st_nlink > 1 and not links:
        raise IntegrityError(
            "integrity",
            f"{path} has {found.st_nlink} names (hard links): who has another one can alter it",
            "copy it to a file of its own, or remove it to fetch it again",
        )


_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)

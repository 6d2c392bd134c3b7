"""Models on a hub (``hf:owner/name``): which files an import needs, and bringing exactly these here.

Owns: what a repository's file list is good for, the folder they are kept in, resuming. Does not own: addresses, login
and transport (``huggingface_hub``: ``HF_ENDPOINT``, ``HF_TOKEN`` or its own login), or what is inside the files.

Invariants:
1. A file has its name only when it is whole: its size is right, and its sha256 where the hub tells it. Until then it is
   ``NAME.part``, from whose end the next attempt goes on.
2. A revision is resolved once, to a commit: all files are of that commit.
3. A name in the hub's list that would leave the folder is refused.

Fails with LocalError or IntegrityError naming repository and file; what was fetched so far stays.
"""

import io
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

# read by the library when it is imported: else it reports what runs it, and asks the hub for a list to tell that by
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import httpx2
import huggingface_hub as hub
from huggingface_hub import errors as faults
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers, disable_progress_bars  # type: ignore[attr-defined]

from config.errors import IntegrityError, LocalError
from dmoe.importer.hashing import hash_file
from dmoe.store import disk_errors

PREFIX = "hf:"
INDEX_BYTES_MAX = 64 << 20
_PLAIN = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^\s:@]+))?(:(?P<file>[^\s:]+\.gguf))?")
_INDEX = "model.safetensors.index.json"
_TEXT = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "chat_template.jinja",
)
_PREFERRED = ("Q4_K_M", "Q4_1", "Q4_0", "Q5_K_M", "Q6_K", "Q8_0", "MXFP4", "BF16", "F16", "F32")
"""Of a repository with many GGUF files: the first of these that there is."""
_PARTS = re.compile(r"(?P<stem>.*)-\d{5}-of-(?P<count>\d{5})\.gguf")

Show = Callable[[int, int, str], None]
"""``(bytes here, bytes in all, what is being fetched)``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A repository; ``revision`` a branch, tag or commit, empty for the main one; ``file`` a .gguf file of it."""

    repo: str
    revision: str = ""
    file: str = ""

    @property
    def name(self) -> str:
        """The repository without its owner."""
        return self.repo.partition("/")[2]

    def __str__(self) -> str:
        return (
            PREFIX + self.repo + (f"@{self.revision}" if self.revision else "") + (f":{self.file}" if self.file else "")
        )


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    size_bytes: int
    sha256: str


def parse(text: str) -> Wanted:
    """``hf:owner/name[@revision][:file.gguf]``. Raises LocalError for anything else."""
    found = _PLAIN.fullmatch(text)
    if found is None:
        hint = "write hf:owner/name, hf:owner/name@revision or hf:owner/name:file.gguf"
        raise LocalError("not_found", f"{text[:200]!r} names no repository", hint)
    return Wanted(repo=found["repo"], revision=found["revision"] or "", file=found["file"] or "")


def fetch(wanted: Wanted, cache: Path, show: Show, say: Callable[[str], None] = lambda text: None) -> Path:
    """The files that an import of ``wanted`` needs, in ``cache``: a folder, or a .gguf file. Blocking.

    ``say`` is told sizes and free space before anything large is fetched.
    """
    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every retry
    with _hub_errors(wanted):
        info = hub.HfApi().model_info(wanted.repo, revision=wanted.revision or None, files_metadata=True)
    commit = str(info.sha)
    listed = [
        _File(sibling.rfilename, sibling.size or 0, sibling.lfs.sha256 if sibling.lfs else "")
        for sibling in info.siblings or ()
    ]
    for file in listed:
        _check_name(wanted, file.name)
    folder = cache / "hub" / wanted.repo.replace("/", "--") / commit
    fetching = _Fetching(wanted, commit, folder, show)
    chosen = _choose(wanted, listed, fetching)
    missing = sum(file.size_bytes - fetching.here(file) for file in chosen)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    say(f"{wanted}: {len(chosen)} files, {missing / 1e6:.0f} MB to fetch into {folder} ({free / 1e6:.0f} MB free)")
    if missing > free:
        fault = f"{wanted} needs {missing >> 20} MiB in {folder}, {free >> 20} MiB are free"
        raise LocalError("disk_full", fault, "free some, or set XDG_CACHE_HOME to another disk")
    fetching.all(chosen)
    gguf = [file.name for file in chosen if file.name.endswith(".gguf")]
    return folder / gguf[0] if gguf else folder


class _Fetching:
    """One commit's files on their way here."""

    def __init__(self, wanted: Wanted, commit: str, folder: Path, show: Show) -> None:
        self.wanted, self.commit, self.folder, self.show = wanted, commit, folder, show

    def here(self, file: _File) -> int:
        """How many of a file's bytes are here."""
        for path in (self.folder / file.name, self._part(file)):
            if path.is_file():
                return min(path.stat().st_size, file.size_bytes)
        return 0

    def all(self, files: Sequence[_File]) -> None:
        """Fetch what is missing."""
        total = sum(file.size_bytes for file in files)
        done = 0
        for file in files:
            self.one(file, done, total)
            done += file.size_bytes
        self.show(total, total, "fetched")

    def one(self, file: _File, done: int = 0, total: int = 0) -> Path:
        """Fetch one file, unless it is here; ``done`` and ``total`` are for the progress shown."""
        target = self.folder / file.name
        if target.is_file() and target.stat().st_size == file.size_bytes:
            return target
        part = self._part(file)
        with disk_errors(self.folder):
            part.parent.mkdir(parents=True, exist_ok=True)
            with _Growing(part, lambda size: self.show(done + size, total, file.name)) as out:
                self._get(file, out)
        self._check(file, part)
        part.rename(target)
        return target

    def _get(self, file: _File, out: "_Growing") -> None:
        url = hub.hf_hub_url(self.wanted.repo, file.name, revision=self.commit)
        have = out.tell()
        if have > file.size_bytes:
            out.seek(0)
            out.truncate()
            have = 0
        with _hub_errors(self.wanted, file.name):
            http_get(url, out, resume_size=have, headers=build_hf_headers(), expected_size=file.size_bytes)

    def _check(self, file: _File, part: Path) -> None:
        if file.sha256 and hash_file(part).hexdigest() != file.sha256:
            part.unlink()
            fault = f"{self.wanted}: {file.name} came with another hash than the hub lists"
            raise IntegrityError("integrity", fault, "import it again: the file is fetched anew")

    def _part(self, file: _File) -> Path:
        return self.folder / f"{file.name}.part"


class _Growing(io.FileIO):
    """A file that is written on from its end and tells how long it is."""

    def __init__(self, path: Path, grown: Callable[[int], None]) -> None:
        super().__init__(path, "r+" if path.exists() else "x+")
        self._grown = grown
        self._grown(self.seek(0, io.SEEK_END))

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]
        """All of ``data``."""
        left = memoryview(data)
        while left:
            left = left[super().write(left) :]
        self._grown(self.tell())
        return len(data)


def _choose(wanted: Wanted, listed: Sequence[_File], fetching: _Fetching) -> list[_File]:
    """The files that an import needs."""
    by_name = {file.name: file for file in listed}
    ggufs = sorted(name for name in by_name if name.endswith(".gguf"))
    tensors = sorted(name for name in by_name if name.endswith(".safetensors") and "/" not in name)
    if wanted.file:
        if wanted.file not in by_name:
            hint = f"it has: {', '.join(ggufs[:20]) or 'no .gguf file'}"
            raise LocalError("not_found", f"{wanted}: there is no such file", hint)
        return [by_name[name] for name in _whole(wanted, wanted.file, ggufs)]
    if tensors:
        if _INDEX in by_name:
            tensors = _indexed(wanted, fetching.one(_small(wanted, by_name[_INDEX])), by_name)
        names = [name for name in (*_TEXT, _INDEX) if name in by_name]
        return [by_name[name] for name in (*names, *tensors)]
    if ggufs:
        return [by_name[name] for name in _whole(wanted, _best(ggufs), ggufs)]
    raise LocalError(
        "not_found",
        f"{wanted} has no .safetensors and no .gguf file",
        "other weight formats cannot be imported; look for a converted copy of the model",
    )


def _best(ggufs: Sequence[str]) -> str:
    for kind in _PREFERRED:
        for name in ggufs:
            if re.search(rf"[.-]{kind}[.-]", name, re.IGNORECASE):
                return name
    return ggufs[0]


def _whole(wanted: Wanted, name: str, ggufs: Sequence[str]) -> list[str]:
    """All parts of a GGUF file that was split, the first one first."""
    found = _PARTS.fullmatch(name)
    if found is None:
        return [name]
    count = int(found["count"])
    parts = [f"{found['stem']}-{index + 1:05d}-of-{count:05d}.gguf" for index in range(count)]
    for part in parts:
        if part not in ggufs:
            raise LocalError("not_found", f"{wanted} lacks {part}", "choose another file of the repository")
    return parts


def _indexed(wanted: Wanted, index: Path, by_name: dict[str, _File]) -> list[str]:
    """The weight files that the index names."""
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        missing = [name for name in names if name not in by_name or "/" in name]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError("integrity", f"{wanted}: {_INDEX} has no weight_map of texts") from error
    if missing:
        raise IntegrityError("integrity", f"{wanted}: {_INDEX} names {str(missing[0])[:80]!r}, which is not there")
    return names


def _small(wanted: Wanted, file: _File) -> _File:
    if file.size_bytes > INDEX_BYTES_MAX:
        raise IntegrityError("integrity", f"{wanted}: {file.name} has {file.size_bytes} bytes")
    return file


def _check_name(wanted: Wanted, name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or name != str(path):
        raise IntegrityError("integrity", f"{wanted} lists a file called {name[:80]!r}", "do not import it")


@contextmanager
def _hub_errors(wanted: Wanted, file: str = "") -> Iterator[None]:
    """Maps what hub and network say to errors that name the repository."""
    what = f"{wanted}: {file}" if file else str(wanted)
    login = "set HF_TOKEN, or log in with: hf auth login"
    try:
        yield
    except faults.GatedRepoError as error:
        hint = f"accept its terms on the hub's page of {wanted.repo}, then {login}"
        raise LocalError("forbidden", f"{what} is open only to those who accepted its terms", hint) from error
    except faults.RepositoryNotFoundError as error:
        hint = f"check owner and name; if it is private: {login}"
        raise LocalError("not_found", f"{what}: there is no such repository, or it is private", hint) from error
    except faults.RevisionNotFoundError as error:
        raise LocalError("not_found", f"{what}: there is no such revision", "give a branch, tag or commit") from error
    except faults.RemoteEntryNotFoundError as error:
        raise LocalError("not_found", f"{what} is not there any more", "import it again") from error
    except faults.HFValidationError as error:
        raise LocalError("not_found", f"{what} names no repository: {str(error)[:200]}") from error
    except faults.OfflineModeIsEnabled as error:
        raise LocalError("unavailable", f"{what}: HF_HUB_OFFLINE is set", "unset it, or import a folder") from error
    except faults.HfHubHTTPError as error:
        status = error.response.status_code
        code, hint = ("unauthenticated", login) if status in (401, 403) else ("unavailable", "try again later")
        raise LocalError(code, f"{what}: the hub answered {status}", hint) from error
    except httpx2.HTTPError as error:
        hint = "check the network and import again: what came so far is kept"
        raise LocalError("unavailable", f"{what}: the connection failed: {str(error)[:200]}", hint) from error
    except OSError as error:
        if error.errno is not None:
            raise
        hint = "import again: what came so far is kept"
        raise LocalError("unavailable", f"{what}: it ended early: {str(error)[:200]}", hint) from error
    except ValueError as error:
        raise LocalError("unavailable", f"{what}: {str(error)[:200]}", "fetch the file by other means") from error

"""What the system says about a file that is whole is not said of the file."""

import errno
import mmap

import pytest

from config.errors import LocalError
from dmoe.shardfile import ShardFile


def test_memory_that_is_missing_is_not_blamed_on_the_file(tmp_path, monkeypatch):
    (tmp_path / "l00.safetensors").write_bytes(bytes(16))

    def full(*_arguments, **_options):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", full)
    with pytest.raises(LocalError, match="Cannot allocate memory") as raised:
        ShardFile(tmp_path / "l00.safetensors")
    assert "free some memory" in raised.value.hint

"""Small files are written whole or not at all."""

import pytest

from config.files import write_whole


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path):
    path = tmp_path / "file"
    write_whole(path, "before")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "\udcff")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_the_error_names_the_file(tmp_path):
    with pytest.raises(OSError, match="nowhere") as caught:
        write_whole(tmp_path / "nowhere" / "file", "x")
    assert caught.value.filename == str(tmp_path / "nowhere" / "file")

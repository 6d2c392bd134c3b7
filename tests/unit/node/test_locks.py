"""One daemon per data folder, one per key."""

import pytest

from config.errors import LocalError
from node import locks


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


def test_a_data_folder_has_one_daemon(home):
    with locks.data_folder(home / "data" / "daemon.lock"):
        again = locks.data_folder(home / "data" / "daemon.lock")
        with pytest.raises(LocalError, match="already running with the data folder") as refused, again:
            pass
        assert "stop it" in refused.value.hint
    with locks.data_folder(home / "data" / "daemon.lock"):
        pass


def test_a_copied_folder_does_not_run_beside_the_original(home):
    with locks.key("12D3KooWone"):
        what = "12D3KooWone is already running from another data folder"
        with pytest.raises(LocalError, match=what), locks.key("12D3KooWone"):
            pass
        with locks.key("12D3KooWtwo"):
            pass
    with locks.key("12D3KooWone"):
        pass


def test_a_user_without_a_home_is_let_through(home, monkeypatch):
    (home / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "file"))
    with locks.key("12D3KooWone"):
        pass

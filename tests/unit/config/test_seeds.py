"""Seed lists."""

import pytest

from config.errors import ConfigError
from config.seeds import collect, read_file

PEER = "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"
SEED = f"/ip4/127.0.0.1/tcp/4701/p2p/{PEER}"
DNS = f"/dns4/seed.example.org/tcp/4701/p2p/{PEER}"


def test_comments_blanks_and_duplicates(tmp_path):
    file = tmp_path / "seeds.txt"
    file.write_text(f"# ours\n\n{SEED}  # the first\n{DNS}\n{SEED}\n")
    assert read_file(file) == (SEED, DNS)


def test_config_and_file_are_joined(tmp_path):
    (tmp_path / "seeds.txt").write_text(f"{SEED}\n{DNS}\n")
    assert collect([DNS], "seeds.txt", tmp_path) == (DNS, SEED)


@pytest.mark.parametrize(
    "line",
    [
        "127.0.0.1:4701",
        "/ip4/127.0.0.1/tcp/4701",
        f"/ip4/127.0.0.1/udp/1/p2p/{PEER}",
        f"/ip4/127.0.0.1/tcp/99999/p2p/{PEER}",
        f"/ip4/127.0.0.256/tcp/1/p2p/{PEER}",
        f"/ip6/localhost/tcp/1/p2p/{PEER}",
    ],
)
def test_a_wrong_line_is_named(tmp_path, line):
    file = tmp_path / "seeds.txt"
    file.write_text(f"{SEED}\n{line}\n")
    with pytest.raises(ConfigError, match="line 2"):
        read_file(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="seeds_file"):
        collect([], "nowhere.txt", tmp_path)

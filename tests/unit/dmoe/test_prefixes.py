"""Which kept sequences begin like a prompt, and which are let go."""

from dmoe.core.prefixes import PREFIX_TOKENS_MIN, Prefixes, common, tokens_of


def text(*parts):
    """Tokens: 20 of each letter."""
    return tokens_of([ord(letter) for part in parts for letter in part for _ in range(20)])


def test_common_beginnings():
    assert common(tokens_of([1, 2, 3]), tokens_of([1, 2, 4, 5])) == 2
    assert common(tokens_of([1, 2]), tokens_of([1, 2, 4])) == 2
    assert common(tokens_of([]), tokens_of([1])) == 0


def test_the_longest_beginning_is_found_within_the_scope():
    kept = Prefixes(1000)
    assert kept.add("a", "u", text("abc")) == []
    assert kept.add("b", "u", text("abd")) == []
    assert kept.add("c", "v", text("abde")) == []
    assert kept.find("u", text("abdx")) == ("b", 60)
    assert kept.find("v", text("abdx")) == ("c", 60)
    assert kept.find("w", text("abdx")) is None
    assert kept.find("u", text("xyz")) is None
    assert kept.find("u", text("abc")[: PREFIX_TOKENS_MIN - 1]) is None


def test_a_longer_one_takes_the_place_of_its_beginning():
    kept = Prefixes(1000)
    kept.add("a", "u", text("ab"))
    assert kept.add("b", "u", text("abc")) == ["a"]
    assert kept.add("c", "u", text("a")) == ["c"]
    assert kept.add("d", "v", text("a")) == []
    assert kept.positions == 80


def test_the_least_recently_used_goes_first():
    kept = Prefixes(100)
    kept.add("a", "u", text("ab"))
    kept.add("b", "u", text("cd"))
    kept.find("u", text("ab"))
    assert kept.add("c", "u", text("ef")) == ["b"]
    assert kept.add("d", "u", text("ghijkl")) == ["d"], "larger than all there is room for"
    assert kept.clear() == ["a", "c"]
    assert kept.positions == 0

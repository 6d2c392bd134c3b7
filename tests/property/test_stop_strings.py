"""Stop strings: whatever the pieces, no stop string is shown, nothing else is lost, nothing comes twice."""

from hypothesis import given
from hypothesis import strategies as st

from dmoe.core.sampling import StopMatcher

TEXT = st.text(alphabet="ab\n", max_size=12)
STOPS = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3).map(tuple)


@given(STOPS, st.lists(TEXT, max_size=8))
def test_shown_text_is_the_text_up_to_the_first_completed_stop_string(stops, pieces):
    matcher = StopMatcher(stops)
    shown, taken = "", ""
    for piece in pieces:
        taken += piece
        shown += matcher.push(piece)
        assert taken.startswith(shown)
        assert not any(stop in shown for stop in stops)
        if matcher.stopped:
            break
    held = matcher.finish()
    if matcher.stopped:
        assert held == ""
        assert any(taken.startswith(stop, len(shown)) for stop in stops)
    else:
        assert shown + held == taken
        assert not any(stop in taken for stop in stops)
        assert len(held) < max(map(len, stops), default=1)


@given(STOPS, TEXT)
def test_pieces_of_one_character_stop_at_the_earliest_completion(stops, text):
    matcher = StopMatcher(stops)
    for character in text:
        matcher.push(character)
        if matcher.stopped:
            break
    assert matcher.stopped is any(stop in text for stop in stops)

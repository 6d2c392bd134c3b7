"""What the ledger's messages hold fits into the frames that carry them."""

from ledger import notes, replicate
from p2p.core import frames


def test_answers_have_no_more_buffers_than_a_frame():
    assert replicate.ANSWER_OBJECTS_MAX <= frames.BUFFERS_MAX
    assert notes.ANSWER_NOTES_MAX <= frames.BUFFERS_MAX

"""What ``rios chat`` says below an answer."""

from node import asking

ANSWER = {"completion_tokens": 3, "tokens_per_s": 1.5, "missing": []}


def test_an_answer_that_did_without_experts_says_which(capsys):
    asking._show_end({**ANSWER, "missing": [(0, 4), (2, 5)]}, echo=True)
    told = capsys.readouterr().err
    assert "degraded: nobody had layer 0 expert 4, layer 2 expert 5;" in told
    asking._show_end({**ANSWER, "missing": [(layer, 1) for layer in range(20)]}, echo=True)
    assert "and 12 more" in capsys.readouterr().err


def test_a_whole_answer_does_not(capsys):
    asking._show_end(ANSWER, echo=True)
    assert "degraded" not in capsys.readouterr().err

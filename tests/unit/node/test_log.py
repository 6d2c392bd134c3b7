"""Logs: where they go and of what kind they are."""

import json
import logging

import pytest

from node import log


@pytest.fixture
def restored():
    root, rios = logging.getLogger(), logging.getLogger("rios")
    before = root.handlers[:], root.level, rios.level
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    rios.setLevel(before[2])


@pytest.mark.parametrize(
    ("logger", "level", "kind"),
    [
        ("rios.gateway.access", logging.INFO, "access"),
        ("rios.audit", logging.INFO, "audit"),
        ("rios.node", logging.INFO, "application"),
        ("rios.node", logging.ERROR, "error"),
    ],
)
def test_every_line_has_a_kind_and_goes_to_stderr(restored, capsys, logger, level, kind):
    log.setup("info", "json", node="n")
    logging.getLogger(logger).log(level, "hello %s", "there")
    captured = capsys.readouterr()
    line = json.loads(captured.err)
    assert (line["kind"], line["event"], line["node"]) == (kind, "hello there", "n")
    assert captured.out == ""


def test_a_fault_is_logged_without_local_variables(restored, capsys):
    log.setup("info", "text")
    secret = "hunter2"
    try:
        raise ValueError(len(secret))
    except ValueError:
        logging.getLogger("rios.node").exception("failed")
    shown = capsys.readouterr().err
    assert "ValueError: 7" in shown
    assert "hunter2" not in shown

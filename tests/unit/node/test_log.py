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


def test_what_strangers_sent_makes_no_lines_and_moves_no_cursor(restored, capsys):
    log.setup("info", "text")
    logger = logging.getLogger("rios.security")
    logger.warning("refused %s", "a\n2026-01-01 [info] all is well\r\x1b[2J\x07\x9b1m\u2028é")
    try:
        raise ValueError("\x1b]0;title\x07")
    except ValueError:
        logger.exception("failed")
    shown = capsys.readouterr().err
    assert r"refused a\n2026-01-01 [info] all is well\r\x1b[2J\x07\x9b1m\u2028é" in shown.splitlines()[0]
    assert r"ValueError: \x1b]0;title\x07" in shown
    assert "\x1b" not in shown

"""The flags of ``rios chat`` and ``rios embed``; what they mean stands in ``node/asking.py``."""

from argparse import ArgumentParser

ROUTES = ("auto", "experts", "stages", "local", "fused")


def chat(parser: ArgumentParser) -> None:
    """``rios chat``"""
    parser.add_argument("question", nargs="*", help="the question (else read from a pipe or the terminal)")
    _who(parser)
    parser.add_argument(
        "--max-tokens", type=int, default=None, help="longest answer (default: what the context leaves)"
    )
    parser.add_argument("--min-tokens", type=int, default=0, help="shortest answer (default: 0)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default: 0.7)")
    parser.add_argument("--top-k", type=int, default=0, help="choose among the k likeliest tokens; 0: all")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="choose among the likeliest tokens of this probability"
    )
    parser.add_argument(
        "--min-p", type=float, default=0.0, help="drop tokens under this share of the likeliest one's chance"
    )
    parser.add_argument("--frequency-penalty", type=float, default=0.0, help="per time that a token was said (-2 to 2)")
    parser.add_argument("--presence-penalty", type=float, default=0.0, help="once a token was said (-2 to 2)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="divides what was read or said; 1: off")
    parser.add_argument(
        "--logit-bias", action="append", default=[], metavar="ID=NUMBER", help="add to a token's logit (-100 to 100)"
    )
    parser.add_argument("--seed", type=int, default=None, help="the same seed gives the same answer")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text")
    parser.add_argument(
        "--logprobs", type=int, default=None, metavar="N", help="tell each token's log probability, and N likeliest"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json-schema", metavar="FILE", help="the answer is JSON that fits this schema")
    form.add_argument("--regex", help="the answer matches this regular expression")
    form.add_argument("--choice", action="append", metavar="TEXT", help="the answer is one of these texts")
    form.add_argument("--grammar", metavar="FILE", help="the answer fits this grammar (Lark or GBNF)")


def embed(parser: ArgumentParser) -> None:
    """``rios embed``"""
    parser.add_argument("text", nargs="*", help="the texts (else one per line from a pipe)")
    _who(parser)


def privacy(parser: ArgumentParser) -> None:
    """Who may see the hidden states (docs/privacy.md)."""
    parser.add_argument(
        "--privacy",
        choices=("trusted", "local"),
        help="trusted: only this node and dmoe.trusted_peers compute; local: only this node",
    )


def _who(parser: ArgumentParser) -> None:
    parser.add_argument("--model", default="", help="model name or id (default: the only one)")
    parser.add_argument("--local", action="store_true", help="no daemon, no network: load the model into this process")
    parser.add_argument("--route", choices=ROUTES, help="who computes (default: dmoe.route)")
    privacy(parser)

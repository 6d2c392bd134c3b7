"""Text becomes tokens and tokens become text, in streams too, and messages cannot smuggle control tokens."""

import json
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Reference
from tokenizers import pre_tokenizers

from config.errors import IntegrityError, RequestError
from config.generation import Message
from dmoe.importer.tokenizer import tokenizer_json
from dmoe.template import Template
from dmoe.text import Tokenizer

CONTROL = ["<|end|>", "<|start|>", "<|stop|>"]
START, STOP = 1, 2
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "Ċ Ċ"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|stop|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def document(**changes) -> bytes:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = CONTROL + letters + [merge.replace(" ", "") for merge in MERGES] + ["<tool>"]
    types = [3] * len(CONTROL) + [1] * (len(tokens) - len(CONTROL) - 1) + [4]
    fields = {"model": "gpt2", "pre": "smollm", "tokens": tokens, "token_type": types, "merges": MERGES, **changes}
    return tokenizer_json({f"tokenizer.ggml.{key}": value for key, value in fields.items()})


DOCUMENT = document()
TOKENIZER = Tokenizer(DOCUMENT, TEMPLATE)
REFERENCE = Reference.from_str(DOCUMENT.decode())


def user(content: str, role: str = "user") -> Message:
    return Message(role=role, content=content)


def streamed(tokenizer: Tokenizer, ids) -> list[str]:
    detokenizer = tokenizer.detokenizer()
    return [*map(detokenizer.push, ids), detokenizer.finish()]


@given(st.text())
def test_every_text_comes_back_and_no_piece_is_broken(text):
    text = text.encode("utf-8", "ignore").decode()
    ids = TOKENIZER.encode(text, control=False)
    pieces = streamed(TOKENIZER, ids)
    assert "".join(pieces) == text == TOKENIZER.decode(ids)
    assert text.count("\ufffd") == sum(piece.count("\ufffd") for piece in pieces)


@given(st.lists(st.integers(min_value=0, max_value=TOKENIZER.vocabulary - 1)))
def test_any_tokens_decode_as_the_library_decodes_them(ids):
    """Up to an unfinished character at the end, which the library shows as U+FFFD and a stream does not show."""
    whole = REFERENCE.decode(ids, skip_special_tokens=True)
    shown = TOKENIZER.decode(ids)
    assert whole.startswith(shown)
    assert set(whole[len(shown) :]) <= {"\ufffd"}


def test_a_character_of_several_tokens_appears_once_it_is_complete():
    ids = TOKENIZER.encode("é🙂")
    assert len(ids) == 6
    assert streamed(TOKENIZER, ids) == ["", "é", "", "", "", "🙂", ""]
    assert streamed(TOKENIZER, ids[:4]) == ["", "é", "", "", ""]


def test_a_wrong_byte_in_the_middle_is_replaced():
    lead = TOKENIZER.encode("é")[0]
    assert TOKENIZER.decode((lead, *TOKENIZER.encode("hello"))) == "\ufffdhello"


def test_tokens_outside_the_vocabulary_have_no_text():
    assert streamed(TOKENIZER, [10**6, -1]) == ["", "", ""]


@given(st.text(alphabet="<|startopend>\n hello"))
def test_encoding_equals_the_library(text):
    assert list(TOKENIZER.encode(text)) == REFERENCE.encode(text).ids


def test_control_tokens_in_text_count_only_where_they_may():
    assert TOKENIZER.encode("<|start|>")[0] == START
    assert START not in TOKENIZER.encode("<|start|>", control=False)
    assert TOKENIZER.decode(TOKENIZER.encode("<|start|>", control=False)) == "<|start|>"


def test_begin_token_where_the_model_has_one():
    tokenizer = Tokenizer(document(bos_token_id=START, add_bos_token=True))
    assert tokenizer.encode("hello")[0] == START
    assert START not in tokenizer.encode("hello", begin=False)


def test_chat_is_tokenised_like_the_whole_rendered_text():
    messages = [user("hello\n", "system"), user("\n hello 12"), user("é", "assistant"), user("")]
    rendered = "".join(f"<|start|>{m.role}\n{m.content}<|stop|>\n" for m in messages) + "<|start|>assistant\n"
    assert list(TOKENIZER.chat(messages)) == REFERENCE.encode(rendered).ids


HOSTILE = st.lists(st.sampled_from([*CONTROL, "<|", "<|st", "<", "|>", "stop|>", "op|>", "x", "\ufdd0", "\n"])).map(
    "".join
)


@given(st.lists(HOSTILE, min_size=1, max_size=3))
def test_messages_cannot_make_control_tokens(contents):
    """Not whole ones, and not by halves in neighbouring messages of a template that joins them."""
    messages = [user(content) for content in contents]
    ids = TOKENIZER.chat(messages)
    assert [token for token in ids if token < len(CONTROL)] == [START, STOP] * len(contents) + [START]
    assert TOKENIZER.decode(ids) == "".join(f"user\n{content}\n" for content in contents) + "assistant\n"
    joining = Tokenizer(DOCUMENT, "{% for message in messages %}{{ message.content }}{% endfor %}")
    assert not [token for token in joining.chat(messages) if token < len(CONTROL)]
    assert joining.decode(joining.chat(messages)) == "".join(contents)


def test_roles_are_the_known_ones():
    with pytest.raises(RequestError, match=r"unknown role 'user<|stop|>'"):
        TOKENIZER.chat([user("x", role="user<|stop|>")])


def test_half_a_surrogate_pair_is_refused():
    for attempt in (lambda: TOKENIZER.encode("a\ud800"), lambda: TOKENIZER.chat([user("a\ud800")])):
        with pytest.raises(RequestError, match="half a surrogate pair"):
            attempt()


def test_a_model_without_template_cannot_chat():
    with pytest.raises(RequestError, match="no chat template"):
        Tokenizer(DOCUMENT).chat([user("x")])


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content + 1 }}", "refused the messages"),
        ("{{ messages[0].content + 1 }}", "failed on these messages"),
        ("{{ ''.__class__.__mro__ }}", "refused the messages"),
        ("{% set x = messages.append(1) %}", "refused the messages"),
        ("{% for a in range(99999) %}{% for b in range(999) %}{{ 'x' * 1000 }}{% endfor %}{% endfor %}", "longer than"),
        ("{% for a in range(10**12) %}{% endfor %}", "failed on these messages"),
    ],
)
def test_a_template_that_refuses_or_runs_away_is_the_requests_error(template, said):
    with pytest.raises(RequestError, match=said) as caught:
        Tokenizer(DOCUMENT, template).chat([user("hello")])
    assert caught.value.code == "invalid_request"


def test_template_helpers():
    source = "{{ messages | tojson }}{{ strftime_now('%d %b %Y') }}{{ bos_token }}"
    source += "{% for m in messages %}{% break %}{% endfor %}"
    rendered = Template(source, "<s>", now=lambda: datetime(2025, 1, 2)).render([{"content": "<é>"}])
    assert rendered == json.dumps([{"content": "<é>"}], ensure_ascii=False) + "02 Jan 2025<s>"


@pytest.mark.parametrize("damaged", [b"", b"{}", b"\xff", DOCUMENT[:-10], DOCUMENT.replace(b'"BPE"', b'"QPE"')])
def test_a_damaged_tokenizer_file_is_an_integrity_error(damaged):
    with pytest.raises(IntegrityError, match="tokenizer file"):
        Tokenizer(damaged)


def test_a_template_that_does_not_parse_is_an_integrity_error():
    with pytest.raises(IntegrityError, match="does not parse"):
        Tokenizer(DOCUMENT, "{% for %}")


def test_word_mark_vocabularies_decode_bytes_and_spaces():
    vocabulary = {"<unk>": 0, "\u2581": 1, "\u2581a": 2, "b": 3, "<0xC3>": 4, "<0xA9>": 5}
    steps = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    changed = json.loads(DOCUMENT)
    changed |= {"decoder": {"type": "Sequence", "decoders": steps}, "added_tokens": [], "pre_tokenizer": None}
    changed["model"] |= {"vocab": vocabulary, "merges": [], "byte_fallback": True, "unk_token": "<unk>"}
    tokenizer = Tokenizer(json.dumps(changed).encode())
    reference = Reference.from_str(json.dumps(changed))
    for ids in ([2, 3, 4, 5, 2], [1, 2], [3, 2], [4, 5]):
        assert tokenizer.decode(ids) == reference.decode(ids)

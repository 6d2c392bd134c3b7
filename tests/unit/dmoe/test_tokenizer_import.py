"""GGUF metadata becomes a tokenizer.json that ``tokenizers`` loads and that cuts text as the original does."""

import pytest
from tokenizers import Tokenizer, pre_tokenizers

from config.errors import IntegrityError
from dmoe.importer.pretokenizers import PRE_TOKENIZERS
from dmoe.importer.tokenizer import bos_token, chat_template, stop_tokens, tokenizer_json

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ t", "1 2"]


def metadata(**changes):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = CONTROL + letters + [merge.replace(" ", "") for merge in MERGES] + ["<tool>"]
    base = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(CONTROL) + [1] * (len(tokens) - len(CONTROL) - 1) + [4],
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }
    return {**base, **{f"tokenizer.{key}": value for key, value in changes.items()}}


def load(**changes) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_json(metadata(**changes)).decode())


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
@pytest.mark.parametrize("text", ["hello there 1234 it's  fine\n\n\tdéjà vu 日本語 🙂", " x = y**2 # 10%", ""])
def test_text_survives_a_round_trip(pre, text):
    tokenizer = load(**{"ggml.pre": pre})
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_merges_apply_and_digits_stay_single_where_the_family_splits_them():
    assert load().encode("hello").tokens == ["hello"]
    assert load().encode("12").tokens == ["1", "2"]
    assert load(**{"ggml.pre": "gpt-2"}).encode("12").tokens == ["12"]


def test_control_tokens_are_special_and_user_defined_ones_are_text():
    tokenizer = load()
    ids = tokenizer.encode("<|im_start|>hello<tool>").ids
    assert ids[0] == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello<tool>"


def test_begin_token_is_added_where_the_file_says_so():
    assert load(**{"ggml.add_bos_token": True}).encode("hello").ids[0] == 1
    assert load(**{"ggml.add_bos_token": True}).encode("hello", add_special_tokens=False).tokens == ["hello"]
    assert load().encode("hello").tokens == ["hello"]


def test_stop_tokens_begin_with_eos_and_hold_every_known_end():
    assert stop_tokens(metadata()) == (2, 0)
    assert bos_token(metadata()) == 1


def test_what_ends_a_message_of_gpt_oss_does_not_end_its_answer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    for control, ends in ((["<|return|>", "<|end|>", "<|call|>"], (0, 2)), (["<|endoftext|>", "<|end|>"], (0, 1))):
        types = [3] * len(control) + [1] * len(letters)
        changes = {"tokens": control + letters, "token_type": types, "eos_token_id": 0}
        assert stop_tokens(metadata(**{f"ggml.{key}": value for key, value in changes.items()})) == ends


def test_chat_template_is_complete_in_itself():
    text = "{{ bos_token }}{{ messages[0].content }}"
    assert chat_template(metadata(chat_template=text)) == '{%- set bos_token = "<|im_start|>" +%}' + text
    assert chat_template(metadata()) == ""


def test_output_is_canonical():
    assert tokenizer_json(metadata()) == tokenizer_json(dict(reversed(metadata().items())))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"ggml.model": "bert"}, "'bert'"),
        ({"ggml.model": "llama"}, "counts 0 bytes and 0 unknown tokens"),
        ({"ggml.pre": "kimi-k2"}, "'kimi-k2'"),
        ({"ggml.tokens": ["a", "a"]}, "tokenizer.ggml.tokens"),
        ({"ggml.tokens": None}, "tokenizer.ggml.tokens"),
        ({"ggml.merges": ["q q"]}, "merges[0]"),
        ({"ggml.token_type": [1]}, "token_type"),
        ({"ggml.bos_token_id": 10**6, "ggml.add_bos_token": True}, "bos_token_id"),
    ],
)
def test_what_cannot_be_imported_is_named(changes, named):
    with pytest.raises(IntegrityError) as caught:
        tokenizer_json(metadata(**changes))
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "in 2024", ["in", " ", "2", "0", "2", "4"]),
        ("llama-bpe", "It'S 12345!\n\n x", ["It", "'S", " ", "123", "45", "!\n\n", " x"]),
        ("qwen2", "a 12", ["a", " ", "1", "2"]),
        ("gpt-4o", "HTTPServer's camelCase/\n 1234", ["HTTPServer's", " camel", "Case", "/\n", " ", "123", "4"]),
        ("tekken", "HTTPServer's 12", ["HTTPServer", "'s", " ", "1", "2"]),
        ("deepseek-llm", "foo_bar 12 日本 x \n", ["foo", "_", "bar", " ", "1", "2", " ", "日本", " x", " ", "\n"]),
        ("deepseek-coder", "if(x) 12", ["if", "(", "x", ")", " ", "1", "2"]),
        ("deepseek-v3", "12345 日本x, .foo", ["123", "45", " ", "日本", "x", ",", " .", "foo"]),
        ("default", "a=1234, b", ["a", "=", "123", "4", ",", " b"]),
    ],
)
def test_text_is_cut_as_the_original_does(pre, text, pieces):
    cut = load(**{"ggml.pre": pre}).pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in cut] == pieces


WORDS = ["▁", "t", "h", "e", "▁t", "he", "▁the", "th", "▁th", "at", "a", "r", "▁a", "er", "ther", "▁at", "the", "▁ther"]
SCORES = [
    -10.0,
    -11.0,
    -12.0,
    -13.0,
    -1.0,
    -2.0,
    -3.0,
    -1.5,
    -4.0,
    -5.0,
    -14.0,
    -15.0,
    -6.0,
    -2.5,
    -7.0,
    -8.0,
    -2.2,
    -9.0,
]


def pieces_metadata(**changes):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS, "<tool>"]
    base = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + SCORES + [0.0],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(WORDS) + [4],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return {**base, **{f"tokenizer.{key}": value for key, value in changes.items()}}


def load_pieces(**changes) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_json(pieces_metadata(**changes)).decode())


def joined(text):
    """What SentencePiece does, in the plainest way: join the two neighbours of the best score until none is left."""
    scores, parts = dict(zip(WORDS, SCORES, strict=True)), list(text)
    while True:
        pairs = [(scores.get(parts[i] + parts[i + 1]), -i) for i in range(len(parts) - 1)]
        known = [pair for pair in pairs if pair[0] is not None]
        if not known:
            return parts
        at = -max(known)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@pytest.mark.parametrize("text", ["the that there at", "therathet", "eh that", "a", "hatter  the"])
def test_pieces_are_joined_by_score(text):
    assert load_pieces().encode(text, add_special_tokens=False).tokens == joined("▁" + text.replace(" ", "▁"))


@pytest.mark.parametrize("text", ["the that", " the  é 日本\n🙂", "the<tool>", ""])
def test_text_survives_pieces_and_what_is_no_piece_is_bytes(text):
    tokenizer = load_pieces()
    encoded = tokenizer.encode(text)
    assert encoded.ids[:1] == [1]
    assert "<unk>" not in encoded.tokens
    assert tokenizer.decode(encoded.ids).removeprefix(" ") == text.removeprefix(" ")


def test_a_file_may_ask_for_no_space_and_no_begin():
    tokenizer = load_pieces(**{"ggml.add_space_prefix": False, "ggml.add_bos_token": False})
    assert tokenizer.encode("the a").tokens == ["the", "▁a"]
    assert tokenizer.decode(tokenizer.encode("the a").ids) == "the a"


def test_pieces_without_scores_are_refused():
    with pytest.raises(IntegrityError, match=r"tokenizer\.ggml\.scores is not a list of \d+ numbers"):
        tokenizer_json(pieces_metadata(**{"ggml.scores": [0.0]}))

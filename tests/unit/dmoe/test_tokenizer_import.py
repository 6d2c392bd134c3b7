"""GGUF metadata becomes a tokenizer.json that ``tokenizers`` loads and that cuts text as the original does."""

import pytest
from tokenizers import Tokenizer, pre_tokenizers

from config.errors import IntegrityError
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


@pytest.mark.parametrize("pre", ["smollm", "starcoder", "gpt-2", "llama-bpe", "qwen2"])
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


def test_chat_template_is_complete_in_itself():
    text = "{{ bos_token }}{{ messages[0].content }}"
    assert chat_template(metadata(chat_template=text)) == '{%- set bos_token = "<|im_start|>" +%}' + text
    assert chat_template(metadata()) == ""


def test_output_is_canonical():
    assert tokenizer_json(metadata()) == tokenizer_json(dict(reversed(metadata().items())))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"ggml.model": "llama"}, "'llama'"),
        ({"ggml.pre": "tekken"}, "'tekken'"),
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

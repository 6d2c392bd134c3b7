"""Text to tokens and back: encoding, chat templates, and decoding token by token.

Owns: what of a prompt may become a control token, and which characters of an unfinished answer may be shown.
Does not own: making ``tokenizer.json`` (``dmoe/importer/tokenizer.py``), chat templates (``dmoe/template.py``) or stop
strings (``dmoe/core/sampling.py``).

Invariants:

1. Control tokens in a chat prompt come from the template alone: the same characters inside a message, a tool or its
   result are plain text.
2. A stream of tokens gives the same text as decoding them at once, and no piece ever holds half a character.

Fails with IntegrityError for a tokenizer that cannot be used, RequestError for messages that its template refuses.
"""

import codecs
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any, Final, Protocol

from tokenizers import Tokenizer as BpeTokenizer

from config.errors import IntegrityError, RequestError
from config.generation import Message, Tool
from dmoe.template import Arguments, Template

if TYPE_CHECKING:
    import trio  # the process aside does without it

ROLES: Final = ("system", "developer", "user", "assistant", "tool")
_BREAKERS: Final = "".join(map(chr, range(0xFDD0, 0xFDF0)))  # noncharacters: never in text meant for exchange


class Described(Protocol):
    """What is known of a chat template without rendering it (:class:`dmoe.template.Template`)."""

    source: str
    knows_tools: bool


class Tokenizer:
    """The tokenizer of one model. Immutable once made; safe to use from several threads. ``is_quick``: short texts are
    encoded in less time than a thread takes."""

    is_quick = True
    limiter: "trio.CapacityLimiter | None" = None
    """For the threads that texts are encoded in; None: the usual one."""
    source: bytes
    """The tokenizer file."""

    def __init__(self, tokenizer_json: bytes, chat_template: str = "", *, bos: int | None = None) -> None:
        try:
            self._plain = BpeTokenizer.from_str(tokenizer_json.decode())
            document = json.loads(tokenizer_json)
        except Exception as error:  # the library raises nothing narrower than Exception
            raise IntegrityError(
                "integrity", f"the tokenizer file cannot be read: {error}", "fetch it again"
            ) from error
        self.source = tokenizer_json
        self._plain.encode_special_tokens = True  # "<|im_end|>" in text is ten characters, not the control token
        self._plain.no_truncation()
        added = {number: token for number, token in self._plain.get_added_tokens_decoder().items()}
        control = {token.content: number for number, token in added.items() if token.special}
        # A control token of one character could not be told from text, so it only counts as an id.
        longest_first = sorted((text for text in control if len(text) > 1), key=len, reverse=True)
        self._control_regex = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        pieces, strip = _pieces(document, self._plain, set(control.values()))
        self._begin = tuple(self._plain.encode("", add_special_tokens=True).ids)
        self._renders = Template(chat_template, _text_of(self._plain, bos)) if chat_template else None
        names = {number: _text_of(self._plain, number) for number in control.values()}
        self._use({"pieces": pieces, "control": control, "names": names, "strip": strip}, self._renders)

    def _use(self, tables: Mapping[str, Any], template: "Described | None") -> None:
        """Decode by these tables; ``template``: what there is to know of the chat template, if there is one."""
        self._tables = tables
        self.template = template
        self._pieces: list[bytes] = tables["pieces"]
        self._control: Mapping[str, int] = tables["control"]
        self._names: Mapping[int, str] = tables["names"]
        self._strip: bool = tables["strip"]

    def tables(self) -> Mapping[str, Any]:
        """What decoding needs, as plain values."""
        return self._tables

    @property
    def vocabulary(self) -> int:
        """The number of token ids."""
        return len(self._pieces)

    def same_vocabulary(self, other: "Tokenizer") -> bool:
        """Whether every token id means the same in both."""
        return self._pieces == other._pieces and self._control == other._control

    @property
    def control_tokens(self) -> Mapping[str, int]:
        """The control tokens by their names."""
        return self._control

    def encode(self, text: str, *, control: bool = True, begin: bool = True) -> tuple[int, ...]:
        """Token ids of ``text``. ``control``: control tokens written in it count as such. ``begin``: put the
        begin-of-sequence token first, if the model uses one."""
        ids = list(self._begin) if begin else []
        if control:
            self._encode_control(text, ids)
        else:
            self._encode_plain(text, ids, "")
        return tuple(ids)

    def chat(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> tuple[int, ...]:
        """Token ids of a conversation, ready for the model's answer. RequestError if the template refuses it."""
        return self.chat_of(plain_messages(messages), plain_tools(tools))

    def chat_of(self, plain: list[Any], described: list[Any]) -> tuple[int, ...]:
        """:meth:`chat` of messages and tools as templates expect them."""
        if self._renders is None:
            raise RequestError(
                "invalid_request", "this model has no chat template", "send a prompt to /v1/completions instead"
            )
        _restore_arguments(plain)
        breaker = _breaker(json.dumps([plain, described], ensure_ascii=False))

        def defused(value: Any) -> Any:  # noqa: ANN401 - JSON
            if isinstance(value, str):
                return self._defuse(value, breaker)
            if isinstance(value, dict):
                return type(value)({defused(key): defused(each) for key, each in value.items()})
            return [defused(each) for each in value] if isinstance(value, list) else value

        rendered = self._renders.render(defused(plain), defused(described) or None)
        ids: list[int] = []
        self._encode_control(rendered, ids, breaker)
        return tuple(ids)

    def showing(self, names: Collection[str]) -> "Tokenizer":
        """The same tokenizer, whose decoders write the control tokens of these names out."""
        shown = [self._control[name] for name in names if name in self._control]
        if not shown:
            return self
        other = copy(self)
        other._pieces = list(self._pieces)
        for token in shown:
            other._pieces[token] = self._names[token].encode()
        return other

    def decode(self, ids: Iterable[int]) -> str:
        """The text of tokens; control tokens have none."""
        detokenizer = self.detokenizer()
        return "".join([*map(detokenizer.push, ids), detokenizer.finish()])

    def token_bytes(self, token: int) -> bytes:
        """The bytes behind one token, which may be part of a character; of a control token, its name's."""
        piece = self._pieces[token] if 0 <= token < len(self._pieces) else b""
        return piece or self._names.get(token, "").encode()

    def detokenizer(self) -> "Detokenizer":
        """A fresh decoder for one answer."""
        return Detokenizer(self._pieces, strip=self._strip)

    def _encode_control(self, text: str, ids: list[int], breaker: str = "") -> None:
        """Append the tokens of ``text``: control tokens as such, the rest as plain text without breakers."""
        start = 0
        for found in self._control_regex.finditer(text):
            self._encode_plain(text[start : found.start()], ids, breaker)
            ids.append(self._control[found.group()])
            start = found.end()
        self._encode_plain(text[start:], ids, breaker)

    def _encode_plain(self, text: str, ids: list[int], breaker: str) -> None:
        if breaker:
            text = text.replace(breaker, "")
        if text:
            check_unicode(text)
            ids += self._plain.encode(text, add_special_tokens=False).ids

    def _defuse(self, content: str, breaker: str) -> str:
        """``content`` with every control token, and the start of one at its end, broken by a character that the encoder
        drops again: the template sees the text, the tokens stay those of the text, and no control token can arise."""
        content = self._control_regex.sub(lambda found: found.group()[0] + breaker + found.group()[1:], content)
        begun = max((_begun(content, token) for token in self._control), default=0)
        if begun == 0:
            return content
        return content[:-begun] + "".join(character + breaker for character in content[-begun:])


class Detokenizer:
    """Tokens to text, one at a time. Bytes of an unfinished character are kept back; invalid ones become U+FFFD."""

    __slots__ = ("_decoder", "_pieces", "_strip")

    def __init__(self, pieces: Sequence[bytes], *, strip: bool = False) -> None:
        self._pieces = pieces
        self._strip = strip  # vocabularies that mark word starts put a space before the first word too
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that this token completes; often empty in the middle of a character. Unknown ids have none."""
        if not 0 <= token < len(self._pieces):
            return ""
        text = self._decoder.decode(self._pieces[token])
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text

    def finish(self) -> str:
        """The rest: nothing, as half a character is not shown."""
        self._decoder.reset()
        return ""


def _begun(content: str, token: str) -> int:
    """How many characters at the end of ``content`` are the beginning, not the whole, of ``token``."""
    for length in range(min(len(token) - 1, len(content)), 0, -1):
        if content.endswith(token[:length]):
            return length
    return 0


def _role(message: Message) -> str:
    """Templates write roles next to control tokens, so only the known ones pass."""
    if message.role not in ROLES:
        raise RequestError("invalid_request", f"unknown role {message.role!r}", f"use one of {', '.join(ROLES)}")
    return message.role


def check_unicode(text: str) -> None:
    """Raise RequestError for half a character, which no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        where = f"character {error.start} is half a surrogate pair"
        raise RequestError("invalid_request", f"the text is not Unicode: {where}", "send whole characters") from error


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as JSON for a template. Raises RequestError for a role that there is not."""
    return [_plain_message(message) for message in messages]


def _restore_arguments(plain: list[Any]) -> None:
    """Arguments of calls, as templates take them: they may have come here as bare JSON."""
    for message in plain:
        for call in message.get("tool_calls", ()):
            found = call["function"]["arguments"]
            if isinstance(found, dict):
                call["function"]["arguments"] = Arguments(found)


def plain_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Tools as JSON for a template."""
    return [_plain_tool(tool) for tool in tools]


def _plain_message(message: Message) -> dict[str, Any]:
    """A message as templates of transformers expect it, without the fields that it does not use."""
    plain: dict[str, Any] = {"role": _role(message), "content": message.content}
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": Arguments.of(call.arguments)},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        plain["tool_call_id"] = message.tool_call_id
    if message.name:
        plain["name"] = message.name
    return plain


def _plain_tool(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": json.loads(tool.parameters)}
    return {"type": "function", "function": function}


def _breaker(text: str) -> str:
    """A character that does not stand in ``text``."""
    for candidate in _BREAKERS:
        if candidate not in text:
            return candidate
    raise RequestError("invalid_request", "the messages use every Unicode noncharacter", "remove U+FDD0 to U+FDEF")


def _text_of(tokenizer: BpeTokenizer, token: int | None) -> str:
    return "" if token is None else (tokenizer.id_to_token(token) or "")


def _pieces(document: dict[str, Any], tokenizer: BpeTokenizer, control: set[int]) -> tuple[list[bytes], bool]:
    """The bytes behind every token id (control tokens have none), and whether an answer's first space is dropped."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    added = tokenizer.get_added_tokens_decoder()
    bytes_of, strip = _bytes_of(document.get("decoder") or {})
    pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for text, number in vocabulary.items():
        if number not in control:
            pieces[number] = text.encode() if number in added else bytes_of(text)
    return pieces, strip


def _bytes_of(decoder: dict[str, Any]) -> tuple[Callable[[str], bytes], bool]:
    """How the file's decoder turns a token's text into bytes, and whether it strips the first space."""
    steps = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level(_byte_alphabet()), False
    if "ByteFallback" in kinds and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        return _byte_fallback, "Strip" in kinds
    raise IntegrityError("integrity", f"unsupported decoder in the tokenizer file: {kinds}", "use a BPE tokenizer")


def _byte_level(alphabet: dict[str, int]) -> Callable[[str], bytes]:
    def convert(text: str) -> bytes:
        try:
            return bytes(map(alphabet.__getitem__, text))
        except KeyError:
            return text.encode()

    return convert


def _byte_fallback(text: str) -> bytes:
    """``<0x0A>`` is one byte; elsewhere U+2581 stands for a space (SentencePiece)."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return bytes.fromhex(text[3:5])
    return text.replace("\u2581", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes (Radford et al., 2019, ``bytes_to_unicode``)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + number): byte for number, byte in enumerate(others)})
    return alphabet

"""A form with one file in it, read as it comes (RFC 7578): the file's bytes go on at once, the rest is small and kept.

Fails with ApiError for what is no such form. ``python_multipart`` parses; this file holds its events to bounds.
"""

from collections.abc import Iterator, Mapping

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from gateway.errors import ApiError, invalid

_EVENTS = (
    *("part_begin", "part_data", "part_end", "header_field", "header_value", "header_end"),
    *("headers_finished", "end"),
)
_HEADER_BYTES_MAX = 4096
_FIELD_BYTES_MAX = 1024
_FIELDS_MAX = 16
_FILENAME_CHARACTERS_MAX = 200


class Form:
    """Feed it the body: the file's bytes come out."""

    def __init__(self, content_type: str) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if kind != b"multipart/form-data" or not boundary:
            raise ApiError("invalid_request", "a file comes as multipart/form-data", "clients do this by themselves")
        self.filename = ""
        self.fields: dict[str, str] = {}
        self._file_seen = self._ended = self._in_file = False
        self._out: list[bytes] = []
        self._name, self._value, self._parts = "", bytearray(), 0
        self._header, self._header_value, self._headers = bytearray(), bytearray(), dict[bytes, bytes]()
        callbacks = {f"on_{name}": getattr(self, f"_on_{name}") for name in _EVENTS}
        self._parser = MultipartParser(boundary, callbacks)  # type: ignore[arg-type]

    def feed(self, data: bytes) -> Iterator[bytes]:
        """More of the body; gives what of it belongs to the file."""
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise ApiError("invalid_request", f"the form is malformed: {error}") from error
        out, self._out = self._out, []
        yield from out

    def end(self) -> tuple[str, str]:
        """All of it came: the file's name and its purpose."""
        if not self._ended:
            raise ApiError("invalid_request", "the form ends too early")
        if not self._file_seen:
            raise invalid("file", "the form has no file")
        return self.filename, self.fields.get("purpose", "")

    def _on_part_begin(self) -> None:
        self._parts += 1
        if self._parts > _FIELDS_MAX:
            raise ApiError("invalid_request", f"the form has more than {_FIELDS_MAX} parts")
        self._headers, self._value, self._in_file = {}, bytearray(), False

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._grow(self._header, data[start:end], _HEADER_BYTES_MAX)

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._grow(self._header_value, data[start:end], _HEADER_BYTES_MAX)

    def _on_header_end(self) -> None:
        self._headers[bytes(self._header).lower()] = bytes(self._header_value)
        if len(self._headers) > _FIELDS_MAX:
            raise ApiError("invalid_request", "a part of the form has too many headers")
        self._header, self._header_value = bytearray(), bytearray()

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._name = _text(options, b"name")
        if self._name == "file":
            if self._file_seen:
                raise invalid("file", "the form has more than one file")
            self._file_seen = self._in_file = True
            name = _text(options, b"filename").replace("\\", "/").rpartition("/")[2]
            self.filename = "".join(c for c in name if c.isprintable())[:_FILENAME_CHARACTERS_MAX] or "file"

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self._out.append(data[start:end])
        else:
            self._grow(self._value, data[start:end], _FIELD_BYTES_MAX)

    def _on_part_end(self) -> None:
        if not self._in_file:
            self.fields[self._name] = self._value.decode("utf-8", "replace")

    def _on_end(self) -> None:
        self._ended = True

    @staticmethod
    def _grow(buffer: bytearray, data: bytes, bytes_max: int) -> None:
        if len(buffer) + len(data) > bytes_max:
            raise ApiError("invalid_request", "a part of the form other than its file is too large")
        buffer += data


def _text(options: Mapping[bytes, bytes], name: bytes) -> str:
    return options.get(name, b"").decode("utf-8", "replace")

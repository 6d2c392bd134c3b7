"""Settings from four places, later ones win: defaults < TOML file < environment < flags.

Owns parsing, checking and writing of the operator's config file; every complaint says which key, where it was read
and what would be right. Environment names are ``RIOS_<SECTION>_<KEY>``, flags ``--set section.key=value``; lists are
comma-separated there.

Invariants:
1. An unknown section or key is an error with a suggestion, wherever it came from.
2. Nothing that looks like a secret is accepted in the TOML file.
"""

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

from config.errors import ConfigError
from config.settings import Settings, sections

_ENV_PREFIX = "RIOS_"
_ENV_OTHER = frozenset(
    {"RIOS_CONFIG", "RIOS_PASSPHRASE", "RIOS_PASSPHRASE_FILE", "RIOS_TRACEBACK", "RIOS_API_KEY", "RIOS_BASE_URL"}
)
_TYPE_NAMES = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple[str, ...]: "a list of texts",
}


@dataclass(frozen=True, slots=True)
class Loaded:
    """The settings in force and, per ``section.key``, where each came from."""

    settings: Settings
    origin: Mapping[str, str]


def load(file: Path | None, environ: Mapping[str, str], flags: Iterable[str] = (), *, required: bool = False) -> Loaded:
    """Read all four places.

    ``file`` may not exist unless it is ``required`` (defaults then). Raises :class:`ConfigError` for anything that is
    not right.
    """
    values: dict[str, dict[str, Any]] = {name: {} for name in sections()}
    origin: dict[str, str] = {}
    if file is not None:
        for section, key, value in _from_toml(file, required):
            values[section][key] = _checked(section, key, value, str(file))
            origin[f"{section}.{key}"] = str(file)
    for name in sorted(environ):
        if name.startswith(_ENV_PREFIX) and name not in _ENV_OTHER:
            section, key = _env_key(name)
            values[section][key] = _checked(section, key, _parsed(section, key, environ[name], name), name)
            origin[f"{section}.{key}"] = f"environment {name}"
    for flag in flags:
        section, key, text = _flag(flag)
        values[section][key] = _checked(section, key, _parsed(section, key, text, f"--set {flag}"), f"--set {flag}")
        origin[f"{section}.{key}"] = f"--set {flag}"
    built = {name: kind(**values[name]) for name, kind in sections().items()}
    for name, kind in sections().items():
        for each in fields(kind):
            origin.setdefault(f"{name}.{each.name}", "default")
    return Loaded(Settings(**built), origin)


def _from_toml(file: Path, required: bool) -> Iterable[tuple[str, str, Any]]:
    try:
        with file.open("rb") as handle:
            table = tomllib.load(handle)
    except FileNotFoundError as error:
        if required:
            raise ConfigError(
                "config", f"there is no config file {file}", f"make it: rios --config {file} init"
            ) from error
        return
    except OSError as error:
        raise ConfigError("config", f"cannot read {file}: {error.strerror}", "check its owner and mode") from error
    except (ValueError, RecursionError) as error:  # wrong syntax, no UTF-8, numbers or nesting without end
        raise ConfigError("config", f"{file} is not valid TOML: {error}", "correct that line") from error
    for section, content in table.items():
        _known_section(section, str(file))
        if not isinstance(content, dict):
            raise ConfigError("config", f"{file}: {section} must be a section", f"write [{section}] on its own line")
        for key, value in content.items():
            _refuse_secret(section, key, value, file)
            yield section, key, value


def _refuse_secret(section: str, key: str, value: object, file: Path) -> None:
    if any(word in key for word in ("password", "secret", "passphrase", "private_key", "api_key")):
        raise ConfigError(
            "config",
            f"{file}: [{section}] {key}: secrets do not belong in the config file",
            "set RIOS_PASSPHRASE_FILE for the key's passphrase, PGPASSWORD or a passfile for PostgreSQL",
        )
    if key == "database" and isinstance(value, str) and "@" in value and ":" in value.split("//")[-1].split("@")[0]:
        raise ConfigError(
            "config",
            f"{file}: [{section}] database: the DSN holds a password",
            "leave the password out and set PGPASSWORD or use a PostgreSQL passfile",
        )


def _suggest(word: str, known: Iterable[str]) -> str:
    known = list(known)
    close = get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def _known_section(section: str, where: str) -> None:
    if section not in sections():
        raise ConfigError("config", f"{where}: unknown section [{section}]", _suggest(section, sections()))


def _field(section: str, key: str, where: str) -> Field[Any]:
    _known_section(section, where)
    known = {each.name: each for each in fields(sections()[section])}
    if key not in known:
        elsewhere = [f"[{name}] {key}" for name, kind in sections().items() if key in {f.name for f in fields(kind)}]
        hint = f"it belongs to {elsewhere[0]}" if elsewhere else _suggest(key, known)
        raise ConfigError("config", f"{where}: unknown setting {key!r} in [{section}]", hint)
    return known[key]


def _type(section: str, key: str) -> Any:  # noqa: ANN401 - a type, possibly generic
    return get_type_hints(sections()[section])[key]


def _checked(section: str, key: str, value: Any, where: str) -> Any:  # noqa: ANN401
    spec = _field(section, key, where)
    kind = _type(section, key)
    name = f"{where}: [{section}] {key}"
    if kind == tuple[str, ...]:
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise ConfigError("config", f"{name} = {value!r} is not a list of texts", 'write it as ["one", "two"]')
        return tuple(value)
    if kind == tuple[int, ...]:
        return _numbers(name, value, spec)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError("config", f"{name} = {value!r} is not {_TYPE_NAMES[kind]}", f"e.g. {key} = {example(spec)}")
    bounds = spec.metadata
    if "choices" in bounds and value not in bounds["choices"]:
        raise ConfigError("config", f"{name} = {value!r} is not possible", f"one of {', '.join(bounds['choices'])}")
    low, high = bounds.get("minimum"), bounds.get("maximum")
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        raise ConfigError("config", f"{name} = {value} is out of range", f"from {low} to {high}")
    return value


def _numbers(name: str, value: Any, spec: Field[Any]) -> tuple[int, ...]:  # noqa: ANN401
    """A list of whole numbers, within its bounds and as long as it must be."""
    length, low, high = (spec.metadata[key] for key in ("length", "minimum", "maximum"))
    if (
        not isinstance(value, list | tuple)
        or len(value) != length
        or not all(isinstance(item, int) and not isinstance(item, bool) for item in value)
    ):
        raise ConfigError(
            "config", f"{name} = {value!r} is not a list of {length} whole numbers", f"e.g. {example(spec)}"
        )
    if not all(low <= item <= high for item in value):
        raise ConfigError("config", f"{name} = {list(value)} is out of range", f"each from {low} to {high}")
    return tuple(value)


def _env_key(name: str) -> tuple[str, str]:
    section, _, key = name.removeprefix(_ENV_PREFIX).lower().partition("_")
    _field(section, key, f"environment {name}")
    return section, key


def _flag(flag: str) -> tuple[str, str, str]:
    path, equals, text = flag.partition("=")
    section, dot, key = path.strip().partition(".")
    if not equals or not dot:
        raise ConfigError(
            "usage", f"--set {flag}: not of the form section.key=value", "e.g. --set node.log_level=debug"
        )
    _field(section, key, f"--set {flag}")
    return section, key, text


def _parsed(section: str, key: str, text: str, where: str) -> Any:  # noqa: ANN401
    kind = _type(section, key)
    if kind is bool:
        answer = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(text.lower())
        if answer is None:
            raise ConfigError("config", f"{where}: {text!r} is not true or false", "write true or false")
        return answer
    if kind is int:
        try:
            return int(text.replace("_", ""))
        except ValueError as error:
            raise ConfigError("config", f"{where}: {text!r} is not a whole number", "digits only") from error
    if kind is float:
        try:
            return float(text)
        except ValueError as error:
            raise ConfigError("config", f"{where}: {text!r} is not a number", "e.g. 0.5") from error
    if kind == tuple[str, ...]:
        return [item.strip() for item in text.split(",") if item.strip()]
    if kind == tuple[int, ...]:
        try:
            return [int(item.strip(" []")) for item in text.split(",")]
        except ValueError as error:
            raise ConfigError("config", f"{where}: {text!r} is not a list of whole numbers", "e.g. 2,1") from error
    return text


def default_of(spec: Field[Any]) -> Any:  # noqa: ANN401
    """A field's default value."""
    assert spec.default is not MISSING
    return spec.default


def to_toml(value: Any) -> str:  # noqa: ANN401
    """One value in TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(to_toml(item) for item in value) + "]"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")  # else the same rules as TOML's


def example(spec: Field[Any]) -> str:
    """A right value, as TOML."""
    return to_toml(default_of(spec))


def _bounds(spec: Field[Any]) -> str:
    if "choices" in spec.metadata:
        return f" One of {', '.join(spec.metadata['choices'])}."
    if spec.metadata.get("minimum") is not None:
        return f" From {spec.metadata['minimum']} to {spec.metadata['maximum']}."
    return ""


def render_file(changes: Mapping[str, Any] | None = None) -> str:
    """A config file with every setting and its comment.

    Settings in ``changes`` (``section.key`` -> value) are set; all others stand there commented out at their default.
    """
    changes = dict(changes or {})
    lines = [
        "# RiOS node configuration. Commented lines show the default.",
        "# The environment (RIOS_<SECTION>_<KEY>) and flags (--set section.key=value) override this file.",
        "# Secrets never stand here: RIOS_PASSPHRASE_FILE names the file with the key's passphrase.",
    ]
    for name, kind in sections().items():
        lines += ["", f"[{name}]"]
        for spec in fields(kind):
            lines.append(f"# {spec.metadata['help']}{_bounds(spec)}")
            path = f"{name}.{spec.name}"
            if path in changes:
                lines.append(f"{spec.name} = {to_toml(changes.pop(path))}")
            else:
                lines.append(f"# {spec.name} = {example(spec)}")
    assert not changes, f"unknown settings: {list(changes)}"
    return "\n".join(lines) + "\n"


def render_reference() -> str:
    """The reference page of all settings, in Markdown."""
    lines = [
        "# Settings",
        "",
        "Made from `config/settings.py` by `rios config reference`. Precedence: defaults < file < environment < flags.",
        "The environment name of `key` in `[section]` is `RIOS_SECTION_KEY`; a flag is `--set section.key=value`;",
        "lists are comma-separated in both. Secrets come from elsewhere: `RIOS_PASSPHRASE` or `RIOS_PASSPHRASE_FILE`",
        "(identity key), `PGPASSWORD` or a passfile (PostgreSQL).",
    ]
    for name, kind in sections().items():
        lines += ["", f"## [{name}]", "", "| setting | default | meaning |", "|---|---|---|"]
        for spec in fields(kind):
            default = example(spec).replace("|", "\\|")
            lines.append(f"| `{spec.name}` | `{default}` | {spec.metadata['help']}{_bounds(spec)} |")
    return "\n".join(lines) + "\n"

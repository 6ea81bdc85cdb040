"""What a setting is beside its type: variable, flag, bounds, and how a text becomes its value."""

import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec

from embedding_server.errors import SettingsError

PREFIX = "INFERENCE_"
Names = tuple[str, ...]
_SWITCH = dict.fromkeys(("true", "1", "yes", "on"), True)
_SWITCH |= dict.fromkeys(("false", "0", "no", "off"), False)


class Field(msgspec.Struct, frozen=True, kw_only=True):
    """What an annotation says about a setting beyond its type; bounds are inclusive."""

    text: str
    env: str | None = None
    ge: int = 0
    le: int = 1 << 50
    size: bool = False
    among: Names = ()
    """What the names in a list may be; empty: anything."""
    empty: bool = False
    """Whether an empty value means something."""


def said(text: str, env: str | None = None, ge: int = 0, le: int = 1 << 50) -> Field:
    """What most settings say."""
    return Field(text=text, env=env, ge=ge, le=le)


def size(text: str) -> Field:
    """Of a size in bytes."""
    return Field(text=text, ge=1, size=True)


def ms(text: str) -> Field:
    """Of a time in milliseconds, an hour at most."""
    return Field(text=text, le=3_600_000)


class Declared(msgspec.Struct, frozen=True, kw_only=True):
    """One setting as the outside sees it."""

    name: str
    type: Any
    field: Field
    default: Any

    @property
    def env(self) -> str:
        """Its environment variable."""
        return self.field.env or PREFIX + self.name.upper()

    @property
    def flag(self) -> str:
        """Its flag of `serve`."""
        return "--" + self.name.replace("_", "-")

    @property
    def expected(self) -> str:
        """What a value must be, for error texts and `--help`."""
        if get_origin(self.type) is Literal:
            return "one of " + ", ".join(get_args(self.type))
        if self.type is bool:
            return "true or false"
        if self.field.among:
            return "a comma list of " + ", ".join(self.field.among)
        if self.type not in (int, float):
            return {Names: "a comma list", Path: "a path"}.get(self.type, "text")
        bounds = f"from {self.field.ge} to {self.field.le}"
        return (
            f"bytes, or a size such as 64M, {bounds}" if self.field.size else f"a number {bounds}"
        )

    def parse(self, text: str) -> Any:
        """The value that `text` stands for; raises `SettingsError`."""
        value = self._read(text.strip())
        number = type(value) in (int, float)
        if value is None or (number and not self.field.ge <= value <= self.field.le):
            raise SettingsError(f"{self.env}={text!r}: expected {self.expected}{self._hint(text)}")
        return value

    def _read(self, text: str) -> Any:
        if get_origin(self.type) is Literal:
            return text.lower() if text.lower() in get_args(self.type) else None
        if self.type is bool:
            return _SWITCH.get(text.lower())
        if self.type is int:
            return _bytes(text) if self.field.size else _whole(text)
        if self.type is float:
            return float(text) if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text) else None
        if self.type == Names:
            among = self.field.among
            given = text.lower() if among else text
            names = dict.fromkeys(part.strip() for part in given.split(",") if part.strip())
            return None if among and not names.keys() <= set(among) else tuple(names)
        return self.type(text) if text else None

    def _hint(self, text: str) -> str:
        if self.name == "port" and text.startswith("tcp://"):
            return (
                " (a Kubernetes Service named `inference` sets this variable: rename the Service,"
                " or set enableServiceLinks: false)"
            )
        return ""


def _whole(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[+-]?\d{1,18}", text) else None


def _bytes(text: str) -> int | None:
    match = re.fullmatch(r"(\d{1,18})\s*([KMGT]?)B?", text.upper())
    return int(match[1]) << 10 * " KMGT".index(match[2] or " ") if match else None

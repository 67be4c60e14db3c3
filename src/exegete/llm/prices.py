"""What models cost: a small table of list prices, with the user's own laid over it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, final

import yaml

from exegete.errors import ConfigError, NotFoundError

_MOST_BYTES = 1 << 20
_MOST_PRICE = 10_000
_FIELDS = ("input", "cached", "output", "batch")
_HOSTS = {"https://api.openai.com/v1": "openai/", "https://openrouter.ai/api/v1": "openrouter/"}
_IN_PROCESS = ("hf/", "vllm/")
# Only a date or "latest": gpt-4o-mini is no version of gpt-4o, and o1-pro costs ten times what o1 does.
_VERSION = re.compile(r"[-@](\d{4}-\d{2}-\d{2}|\d{8}|\d{4}|latest)")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """Dollars per million tokens of prompt (``input``; ``cached``: held by the provider's prefix cache) and reply.

    ``batch`` is the factor that batch files cost.
    """

    input: float
    cached: float
    output: float
    batch: float = 0.5

    def __post_init__(self) -> None:
        for name in _FIELDS:
            value = getattr(self, name)
            if not 0 <= value <= _MOST_PRICE:
                raise ConfigError(f"a price's {name} lies between 0 and {_MOST_PRICE}, got {value}")

    def dollars(self, prompt: int, completion: int, *, cached: int = 0) -> float:
        """Return what ``prompt`` tokens, ``cached`` of them from the prefix cache, and ``completion`` tokens cost."""
        return ((prompt - cached) * self.input + cached * self.cached + completion * self.output) / 1e6

    def in_batch(self) -> Price:
        """Return the price in batch files, where no discount for cached tokens is counted on."""
        return Price(
            input=self.input * self.batch, cached=self.input * self.batch, output=self.output * self.batch, batch=1.0
        )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """Tables of prices by model name, each laid over those before it; the first is the built-in one."""

    tables: tuple[Mapping[str, Price], ...]

    def price_of(self, spec: str) -> Price | None:
        """Return the price of a model as named for --llm, None when it is not known.

        The last table that prices the model counts; in it the longest name, of the model itself or of one that it is a
        dated version of. Models that run in this process (``hf/``, ``vllm/``) cost nothing unless a table prices them.
        """
        named, alone = _names(spec)
        for i in reversed(range(len(self.tables))):
            # Ours are prices of one provider; whoever serves a model of that name elsewhere has others.
            names = [*named, alone] if i else named
            fitting = [name for name in self.tables[i] if any(_is_version(given, name) for given in names)]
            if fitting:
                return self.tables[i][max(fitting, key=len)]
        return Price(input=0.0, cached=0.0, output=0.0) if spec.startswith(_IN_PROCESS) else None


def load_prices(path: str | Path | None = None) -> Prices:
    """Return the built-in prices, with the user's prices.yaml and the file at ``path`` laid over them.

    Raises NotFoundError when there is no file at ``path``, ConfigError when a file is no table of prices.
    """
    builtin = files("exegete.llm") / "prices.yaml"
    tables = [_table(builtin.read_text(encoding="utf-8"), "prices.yaml")]
    own = _user_file()
    if own is not None and own.is_file():
        tables.append(_table(_read(own), str(own)))
    if path is not None:
        tables.append(_table(_read(Path(path)), str(path)))
    return Prices(tables=tuple(tables))


def _user_file() -> Path | None:
    base = os.environ.get("XDG_CONFIG_HOME")
    if base and Path(base).is_absolute():  # the XDG specification ignores a relative one
        return Path(base) / "exegete" / "prices.yaml"
    try:
        return Path.home() / ".config" / "exegete" / "prices.yaml"
    except RuntimeError:
        return None


def _names(spec: str) -> tuple[list[str], str]:
    """Return what a table may call a model: its spec, with that of its provider where known; and the model alone."""
    url, mark, model = spec.partition("#")
    if mark:
        prefix = _HOSTS.get(url.rstrip("/"))
        return ([spec] if prefix is None else [spec, prefix + model]), model
    provider, mark, model = spec.partition("/")
    return [spec], model if mark and provider in ("openai", "openrouter", "hf", "vllm") else spec


def _is_version(given: str, name: str) -> bool:
    return given == name or (given.startswith(name) and _VERSION.fullmatch(given[len(name) :]) is not None)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            data = stream.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise ConfigError(f"{path} is larger than a table of prices may be ({_MOST_BYTES} bytes)")
        return data.decode("utf-8")
    except FileNotFoundError:
        raise NotFoundError(f"there is no file of prices {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a table of prices: {error}") from error


def _table(text: str, where: str) -> Mapping[str, Price]:
    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} holds no prices; write lines of the form MODEL: {{input: 0.15, output: 0.6}}")
    return {str(model): _price(fields, f"{where}, {model}") for model, fields in data.items()}


def _price(fields: Any, where: str) -> Price:
    if not isinstance(fields, Mapping) or not {"input", "output"} <= set(fields) <= set(_FIELDS):
        raise ConfigError(f"{where}: a price has input and output, and may have cached and batch, nothing else")
    for name, value in fields.items():
        if type(value) not in (int, float) or not 0 <= value <= _MOST_PRICE:
            raise ConfigError(f"{where}: {name} is a number between 0 and {_MOST_PRICE}, got {str(value)[:40]!r}")
    known = {name: float(value) for name, value in fields.items()}
    return Price(
        input=known["input"],
        cached=known.get("cached", known["input"]),
        output=known["output"],
        batch=known.get("batch", 0.5),
    )

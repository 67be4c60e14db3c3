"""Named factories: built-in ones, and those that other packages bring through entry points.

A registry maps a name to a factory and turns a stored spec ``{"name": …, "args": {…}}`` back into the object. Entry
points of the group ``exegete.KIND`` (``exegete.explainers``, ``exegete.scorers``) are looked up when a name is unknown.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar, final

import yaml

from exegete.errors import ConfigError, InputError, unknown

T = TypeVar("T")


@final
class Registry(Generic[T]):
    """Factories of one kind by name. A built-in factory is ``"module:attribute"``, imported when first used."""

    def __init__(self, kind: str, built_in: Mapping[str, str]) -> None:
        self.kind = kind
        self._targets = dict(built_in)
        self._added: dict[str, Callable[..., T]] = {}

    def names(self) -> tuple[str, ...]:
        """Return every known name, sorted."""
        plugins = {point.name for point in entry_points(group=f"exegete.{self.kind}s")}
        return tuple(sorted({*self._targets, *self._added, *plugins}))

    def add(self, name: str, factory: Callable[..., T]) -> None:
        """Register a factory. Raises InputError when the name is taken."""
        if name in self._targets or name in self._added:
            raise InputError(f"the {self.kind} {name!r} is registered already")
        self._added[name] = factory

    def factory(self, name: str) -> Callable[..., T]:
        """Return the factory of a name. Raises NotFoundError naming the nearest known ones."""
        if name in self._added:
            return self._added[name]
        if name in self._targets:
            module, _, attribute = self._targets[name].partition(":")
            found: Callable[..., T] = getattr(importlib.import_module(module), attribute)
            return found
        for point in entry_points(group=f"exegete.{self.kind}s", name=name):
            loaded: Callable[..., T] = point.load()
            return loaded
        raise unknown(self.kind, name, self.names())

    def make(self, name: str, args: Mapping[str, Any] | None = None) -> T:
        """Build the named object. Raises ConfigError when the arguments do not fit the factory."""
        factory = self.factory(name)
        try:
            inspect.signature(factory).bind(**(args or {}))
        except TypeError as error:
            allowed = ", ".join(inspect.signature(factory).parameters) or "none"
            raise ConfigError(f"{self.kind} {name!r}: {error}; allowed arguments: {allowed}") from error
        return factory(**(args or {}))

    def from_text(self, text: str, defaults: Mapping[str, Any] | None = None) -> T:
        """Build the object of ``NAME`` or ``NAME:ARGUMENT=VALUE,ARGUMENT=VALUE``; values are written as in YAML.

        ``defaults`` are arguments for those factories that know them, where the text says nothing else. Raises
        NotFoundError for an unknown name, ConfigError for arguments that do not fit.
        """
        name, colon, rest = text.partition(":")
        args: dict[str, Any] = {}
        for part in rest.split(",") if colon else ():
            key, equals, value = part.partition("=")
            if not equals or not key.strip() or key.strip() in args:
                raise ConfigError(f"{self.kind} {text!r} is written NAME:ARGUMENT=VALUE,…, each argument once")
            args[key.strip()] = _plain(value, text)
        if defaults:
            known = inspect.signature(self.factory(name)).parameters
            args = {**{key: value for key, value in defaults.items() if key in known}, **args}
        return self.make(name, args)

    def from_spec(self, spec: Mapping[str, Any]) -> T:
        """Build the object that a stored spec describes."""
        return self.make(str(spec["name"]), spec.get("args", {}))


def _plain(value: str, text: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"{value!r} in {text!r} is no value; write a number, true, false or a word") from None

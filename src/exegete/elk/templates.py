"""Claims put into words: ten templates for each of the twelve quirky sets, and one common form for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Final, Literal, final, get_args

import yaml

from exegete.errors import InputError, unknown
from exegete.streams import stream

Wording = Literal["first", "random", "standardised", "all"]
WORDINGS: Final[tuple[str, ...]] = get_args(Wording)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A text with places in braces, ``{character}`` among them; its choices are the false answer and the true one."""

    name: str
    text: str
    choices: tuple[str, str]

    def fill(self, args: Mapping[str, Any], character: str) -> str:
        """Return the statement. Braces inside of arguments are left as they are."""
        found = self.text
        parts = {**{name: str(value) for name, value in args.items()}, "character": character}
        pieces = found.split("{")
        done = [pieces[0]]
        for piece in pieces[1:]:
            name, _, rest = piece.partition("}")
            done.append(parts[name] + rest)
        return "".join(done)


def quirky_sets() -> tuple[str, ...]:
    """Return the names of the twelve sets."""
    return tuple(_held()["sets"])


def arguments(name: str) -> tuple[str, ...]:
    """Return what a row of a set must have among its ``template_args``. Raises NotFoundError for another set."""
    return tuple(_set(name)["args"])


def templates(name: str, wording: Wording) -> tuple[Template, ...]:
    """Return the templates of a set: its first, all ten, or the standardised one.

    Raises NotFoundError for another set or wording.
    """
    held = _set(name)
    if wording not in WORDINGS:
        raise unknown("wording", wording, WORDINGS)
    if wording == "standardised":
        return (_template("standardised", _held()["standardised"], held),)
    found = [_template("first", held["first"], held)]
    if wording != "first":
        found += [_template(f"frame-{i}", one, held) for i, one in enumerate(_held()["frames"], start=1)]
    return tuple(found)


def chosen(options: Sequence[Template], wording: Wording, row: str, seed: int) -> tuple[Template, ...]:
    """Return the templates that one row is put into: one of a random mixture (by the row's name), or all of them."""
    if wording != "random":
        return tuple(options)
    return (options[int(stream(seed, row, "template").integers(len(options)))],)


def check_arguments(name: str, args: Any, where: str) -> dict[str, str | int | float]:
    """Return the arguments that a set needs. Raises InputError, naming the row, where one is missing or no text."""
    if not isinstance(args, Mapping):
        raise InputError(f"{where}: template_args are a table of {', '.join(arguments(name))}")
    for needed in arguments(name):
        if not isinstance(args.get(needed), str | int | float) or isinstance(args.get(needed), bool):
            have = ", ".join(sorted(map(str, args))) or "nothing"
            raise InputError(f"{where}: template_args of {name} need {needed!r} (text or a number), got {have}")
    return {needed: args[needed] for needed in arguments(name)}


def _template(title: str, spec: Mapping[str, Any], held: Mapping[str, Any]) -> Template:
    text = str(spec["template"]).replace("{context}", held.get("context", "")).replace("{claim}", held["claim"])
    negative, positive = spec["choices"]
    return Template(name=title, text=text, choices=(str(negative), str(positive)))


def _set(name: str) -> Mapping[str, Any]:
    sets: Mapping[str, Any] = _held()["sets"]
    if name not in sets:
        raise unknown("quirky set", name, sets)
    held: Mapping[str, Any] = sets[name]
    return held


@cache
def _held() -> dict[str, Any]:
    return dict(yaml.safe_load((files(__package__) / "templates.yaml").read_text(encoding="utf-8")))

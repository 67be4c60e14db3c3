"""Coders that need no coder file, by name: ``neurons``, ``directions:FILE``, ``pca:…`` and ``random:…``.

::

    neurons[:k=32,rotation=7,signs=both,threshold=0.1]
    directions:FILE[,signs=positive,unit=true]
    pca:components=256[,tokens=65536,k=32,signs=positive]
    random:ARCHITECTURE,width=4096[,k=32,l0=40]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, final

from exegete.errors import InputError
from exegete.files import safe_name
from exegete.types import Rows, Side

if TYPE_CHECKING:
    from exegete.coders.coder import Point, SparseCoder
    from exegete.subjects.subject import Subject

BUILTINS = ("neurons", "directions", "pca", "random")
"""Kinds of coders that are made rather than loaded."""
_DEFAULT_TOKENS = 1 << 16
_SAMPLE_TOKENS = 1 << 10


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltinSpec:
    """A spec taken apart.

    ``kind`` is one of ``BUILTINS``; ``what`` the file of ``directions`` or the architecture of ``random``, else ``""``;
    ``options`` the options given, of the right type.
    """

    kind: str
    what: str
    options: Mapping[str, Any]

    @property
    def tokens(self) -> int:
        """Counted positions that building takes from the sample, 0 when it needs none."""
        if self.kind == "pca":
            return int(self.options.get("tokens", _DEFAULT_TOKENS))
        return _SAMPLE_TOKENS if self.kind == "random" and (self.what == "batchtopk" or "l0" in self.options) else 0


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise ValueError("a whole number")
    return int(text)


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError("a number that is not negative")
    return number


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError("true or false")
    return text.lower() == "true"


def _signs(text: str) -> str:
    if text not in ("positive", "both"):
        raise ValueError("positive or both")
    return text


_Read = Callable[[str], object]
_OPTIONS: dict[str, dict[str, _Read]] = {
    "neurons": {"k": _whole, "rotation": _whole, "signs": _signs, "threshold": _number},
    "directions": {"signs": _signs, "unit": _flag},
    "pca": {"components": _whole, "tokens": _whole, "k": _whole, "signs": _signs},
    "random": {"width": _whole, "k": _whole, "l0": _number},
}
_NEEDED = {"pca": "components", "random": "width"}
_FIRST = {"directions": "a FILE", "random": "an architecture"}


def named_builtin(text: str) -> tuple[str | None, BuiltinSpec | None]:
    """Return the name given with ``NAME=`` and the spec of a coder that is made; None for one that is loaded."""
    before, equals, after = text.partition("=")
    named = bool(equals) and not any(c in before for c in "/:")
    spec = parse_builtin(after) if named else parse_builtin(text)
    return (safe_name(before) if named and spec is not None else None), spec


def parse_builtin(text: str) -> BuiltinSpec | None:
    """Return the spec of a coder that is made, None when the text does not start like one.

    Raises InputError for an option that is unknown, given twice, missing, or has a value of another type.
    """
    kind, colon, rest = text.partition(":")
    if kind not in BUILTINS:
        return None
    parts = [part.strip() for part in rest.split(",")] if colon else []
    what = ""
    if kind in _FIRST:
        # A path may hold commas and equals signs: what follows the file are the parts that start like options.
        start = next((i for i, part in enumerate(parts) if part.partition("=")[0] in _OPTIONS[kind]), len(parts))
        start = start if kind == "directions" else min(start, 1)
        what, parts = ",".join(parts[:start]), parts[start:]
        if not what:
            raise InputError(f"{text!r} lacks {_FIRST[kind]}: write {kind}:{_FIRST[kind].split()[-1].upper()}")
    return BuiltinSpec(kind=kind, what=_known(kind, what), options=_options(text, kind, parts))


def _known(kind: str, what: str) -> str:
    from exegete.coders.baselines import ARCHITECTURES

    if kind == "random" and what not in ARCHITECTURES:
        raise InputError(f"there is no untrained {what!r}; known: {', '.join(ARCHITECTURES)}")
    return what


def _options(text: str, kind: str, parts: Sequence[str]) -> dict[str, Any]:
    allowed = _OPTIONS[kind]
    options: dict[str, Any] = {}
    for part in parts:
        option, equals, value = part.partition("=")
        if option not in allowed or not equals or option in options:
            reason = "is given twice" if option in options else "is not understood"
            raise InputError(f"{part!r} in {text!r} {reason}; options of {kind} are {'=…, '.join(allowed)}=…")
        try:
            options[option] = allowed[option](value)
        except ValueError as error:
            raise InputError(f"{option} in {text!r} must be {error}, got {value!r}") from None
    if kind in _NEEDED and _NEEDED[kind] not in options:
        raise InputError(f"{text!r} lacks {_NEEDED[kind]}; options of {kind} are {'=…, '.join(allowed)}=…")
    return options


def build_builtin(
    spec: BuiltinSpec,
    subject: Subject,
    hookpoints: Sequence[str],
    sample: Callable[[], Rows],
    seed: int,
    *,
    by_document: bool = False,
    sink_norm: float = 10.0,
) -> dict[str, SparseCoder]:
    """Return one coder per hookpoint by name: the hookpoint's canonical name, ``-`` and the kind.

    Args:
        spec: What to make.
        subject: The model whose activations they read.
        hookpoints: Names or globs in any spelling.
        sample: Returns rows of text, of which ``spec.tokens`` counted positions are read; called only where some are.
        seed: Of random coders.
        by_document: Let each token of the sample see its own document only.
        sink_norm: Positions of the sample beyond this many times the median norm do not count; 0 lets all count.

    Raises:
        InputError: When no hookpoint is given or known, or two coders would have one name; as the makers of each kind.
    """
    if not hookpoints:
        raise InputError(f"{spec.kind} can be read anywhere; name hookpoints, such as layers.3 or layers.*.mlp")
    places = dict.fromkeys(place for hookpoint in hookpoints for place in _places(subject, hookpoint))
    rows = sample() if spec.tokens else None
    made: dict[str, SparseCoder] = {}
    for place in places:
        coder = _MAKERS[spec.kind](_Order(spec, subject, place[0], place[1], rows, seed, by_document, sink_norm))
        if coder.name in made:
            raise InputError(f"two coders would be called {coder.name!r}; make them one by one, as NAME=SPEC")
        made[coder.name] = coder
    return made


class _Order(NamedTuple):
    """One coder to make; ``side`` is None where the spelling leaves it to the kind."""

    spec: BuiltinSpec
    subject: Subject
    hookpoint: str
    side: Side | None
    rows: Rows | None
    seed: int
    by_document: bool
    sink_norm: float

    @property
    def point(self) -> Point:
        return self.hookpoint, self.side or "output"

    @property
    def name(self) -> str:
        return safe_name(f"{self.hookpoint}-{self.spec.kind}")


def _places(subject: Subject, hookpoint: str) -> list[tuple[str, Side | None]]:
    """Return the hookpoints that a name or glob stands for, with the side where the spelling fixes one."""
    points = subject.points(hookpoint)
    fixed = points == subject.points(hookpoint, "input")
    return [(name, side if fixed else None) for name, side in points]


def _neurons(order: _Order) -> SparseCoder:
    from exegete.coders.neurons import neuron_coder

    return neuron_coder(order.subject, order.hookpoint, side=order.side, name=order.name, **order.spec.options)


def _directions(order: _Order) -> SparseCoder:
    from exegete.coders.directions import load_directions
    from exegete.coders.fit import fit_coder

    hookpoint, side = order.point
    coder = load_directions(order.spec.what, hookpoint, side=side, name=order.name, **order.spec.options)
    return fit_coder(coder, order.subject).to(order.subject.device)


def _pca(order: _Order) -> SparseCoder:
    from exegete.coders.pca import pca_coder

    if order.rows is None:
        raise InputError("pca needs text to read")
    hookpoint, side = order.point
    options = {name: value for name, value in order.spec.options.items() if name != "tokens"}
    return pca_coder(
        order.subject,
        hookpoint,
        order.rows,
        side=side,
        most=order.spec.tokens,
        by_document=order.by_document,
        sink_norm=order.sink_norm,
        name=order.name,
        **options,
    )


def _random(order: _Order) -> SparseCoder:
    import torch

    from exegete.coders.baselines import untrained_coder
    from exegete.coders.reading import activations

    hookpoint, side = order.point
    sample = None
    if order.rows is not None:
        parts = activations(
            order.subject,
            order.point,
            order.rows,
            most=order.spec.tokens,
            by_document=order.by_document,
            sink_norm=order.sink_norm,
        )
        sample = torch.cat([torch.zeros((0, order.subject.d(*order.point))), *(part.cpu() for part in parts)])
    return untrained_coder(
        order.spec.what,
        d_in=order.subject.d(*order.point),
        seed=order.seed,
        hookpoint=hookpoint,
        side=side,
        name=order.name,
        sample=sample,
        base_model=order.subject.name,
        **order.spec.options,
    ).to(order.subject.device)


_MAKERS: dict[str, Callable[[_Order], SparseCoder]] = {
    "neurons": _neurons,
    "directions": _directions,
    "pca": _pca,
    "random": _random,
}

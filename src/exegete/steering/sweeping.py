"""Sweeps: sites × multipliers × {residual, state, both}, with the controls that say what an effect is worth.

A block's site and its state are steered together: at site j the residual part of j and the state of block j are used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, final, get_args

import numpy as np

from exegete.errors import InputError, MismatchError, NotFoundError, unknown
from exegete.progress import Progress, Silent
from exegete.steering.answers import Asked, Floats, Setting
from exegete.steering.behaviour_files import Row
from exegete.steering.effects import Bootstrap, Estimate, halves
from exegete.steering.operators import POSITIVE, Operator
from exegete.steering.places import places
from exegete.steering.questions import Question, questions
from exegete.steering.templates import template_of
from exegete.steering.vector import SteeringVector
from exegete.streams import stream
from exegete.subjects import Subject

Mode = Literal["residual", "state", "both"]
MULTIPLIERS: Final = (-3.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 3.0)
"""Those of arXiv 2404.05971."""
CONTROLS: Final = 20


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One setting of a sweep: the mean over n questions, with its interval.

    Attributes:
        behaviour: Whose questions.
        site: Site of the residual stream, block of the state.
        mode: residual, state or both.
        components: Of the state, joined by +; empty without a state.
        operator: What was done to the residual stream.
        positions: Where the residual stream was edited.
        state_positions: Before which tokens the state was.
        multiplier: Of the vector.
        control: none, random (a random vector as long), or letters (the vector of the letter, as long).
        draw: Number of the random vector.
        n: Questions.
        match: Mean of p(match) / (p(match) + p(other)), from ``low`` to ``high``.
        nonsense: Mean of 1 − p(match) − p(other).
        first: Mean share of the first label (A), to see a leaning to a letter.
        base: ``match`` of the subject as it is; ``base_nonsense`` likewise.
    """

    behaviour: str
    site: int
    mode: str
    components: str
    operator: str
    positions: str
    state_positions: str
    multiplier: float
    control: str
    draw: int
    n: int
    match: float
    low: float
    high: float
    nonsense: float
    first: float
    base: float
    base_nonsense: float


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """All multipliers of one site, mode and set of components.

    Attributes:
        behaviour: Whose questions; ``site``, ``mode``, ``components`` as of a ``Point``.
        n: Questions.
        effect: Mean of match at the largest multiplier minus that at the smallest.
        slope: Of match per multiplier, and ``spearman`` of both, for multipliers up to 1.5.
        random: How many random vectors there are; ``random_mean`` and ``random_most`` are the mean and the largest
            |effect| of them, NaN without; ``random_as_large`` is how many have an |effect| as large as this one.
        letters: Effect of the vector of the letter, made as long; NaN without.
    """

    behaviour: str
    site: int
    mode: str
    components: str
    n: int
    effect: Estimate
    slope: Estimate
    spearman: Estimate
    random: int = 0
    random_mean: float = float("nan")
    random_most: float = float("nan")
    random_as_large: int = 0
    letters: float = float("nan")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The site with the largest effect on one half of the questions, and its effect on the other half."""

    behaviour: str
    mode: Mode
    components: str
    site: int
    n_chosen: int
    n_held_out: int
    chosen: float
    held_out: Estimate


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sweep:
    """What a sweep found. ``values`` are match and nonsense [multipliers, questions] of each curve, by its key."""

    points: tuple[Point, ...]
    curves: tuple[Curve, ...]
    choices: tuple[Choice, ...]
    multipliers: tuple[float, ...]
    values: Mapping[tuple[str, int, str, str], tuple[Floats, Floats]]

    def __add__(self, other: Sweep) -> Sweep:
        if self.multipliers != other.multipliers:
            raise InputError("sweeps over other multipliers do not go into one table")
        return Sweep(
            points=self.points + other.points,
            curves=self.curves + other.curves,
            choices=self.choices + other.choices,
            multipliers=self.multipliers,
            values={**self.values, **other.values},
        )


def sweep(
    subject: Subject,
    vector: SteeringVector,
    rows: Sequence[Row] | Sequence[Question],
    *,
    behaviour: str = "",
    template: str = "plain",
    sites: Collection[int] | None = None,
    multipliers: Sequence[float] = MULTIPLIERS,
    modes: Sequence[Mode] = ("residual", "state", "both"),
    per_component: bool = False,
    operator: Operator = "add",
    positions: str = "last",
    state_positions: str = "last",
    at: float = POSITIVE,
    letters: SteeringVector | None = None,
    controls: int = CONTROLS,
    control_sites: Literal["chosen", "all"] = "chosen",
    seed: int = 0,
    progress: Progress | None = None,
) -> Sweep:
    """Return p(match) of questions at every site, multiplier and mode, with controls.

    Args:
        subject: The model.
        vector: What to steer with; the modes that it has no part for are left out.
        rows: A/B rows, or questions as tokens.
        behaviour: What they are of.
        template: How rows become prompts; use the one that the vector was made with.
        sites: Which of the vector's, None for all.
        multipliers: At least two different ones.
        modes: residual, state, both.
        per_component: Whether each component of the state is swept alone as well.
        operator: On the residual stream; other than ``add`` only for the mode residual.
        positions: Prompt tokens at which the residual stream is edited; see ``places``.
        state_positions: Prompt tokens before which the state is edited.
        at: For ``clamp``.
        letters: The vector of the letter (``Made.letters``) with the same parts, for the control of letter bias.
        controls: How many random vectors of the same length; 0 for none.
        control_sites: ``chosen``: controls at the site that each mode chooses; ``all``: at every site.
        seed: Of random vectors, halves and resamples.
        progress: How far it is.

    Raises:
        InputError: For no rows, fewer than two multipliers, positions that no prompt has, or nothing of the vector that
            could be swept.
        NotFoundError: For an unknown mode or site.
        MismatchError: For a vector of another model, and a letter's vector without the parts that are swept.
    """
    vector.require(subject)
    given = tuple(dict.fromkeys(float(m) for m in multipliers))
    if len(given) < 2:
        raise InputError(f"a sweep needs at least two different multipliers, got {len(given)}")
    if not np.isfinite(given).all():
        raise InputError("multipliers are finite numbers")
    if places(positions).start is None or places(state_positions).start is None:
        raise InputError("a sweep scores what comes after the prompt; edit prompt tokens too, at onward or last, say")
    put, kinds = _questions(rows, template, subject), tuple(_kinds(vector, modes, per_component, sites))
    if operator != "add" and any(kind.part.state.parts for kind in kinds):
        raise InputError(f"a vector is only added to a state, {operator} is for the residual stream; use mode residual")
    _check_places(put, kinds, positions, state_positions)
    if letters is not None:
        letters.require(subject)
        _check_letters(letters, kinds)
    made = _Sweeper(
        asked=Asked(subject, put, places(positions), places(state_positions)),
        firsts=_firsts(rows),
        behaviour=behaviour,
        multipliers=given,
        operator=operator,
        positions=positions,
        state_positions=state_positions,
        at=at,
        seed=seed,
        kinds=kinds,
        vector=vector,
    )
    return made.run(letters, controls, control_sites, progress or Silent())


def _questions(rows: Sequence[Row] | Sequence[Question], template: str, subject: Subject) -> Sequence[Question]:
    asked = [row for row in rows if isinstance(row, Question)]
    plain = [row for row in rows if isinstance(row, Row)]
    if asked and plain:
        raise InputError("give rows or questions, not both")
    return asked or questions(plain, template_of(template), subject.tokenizer)


def _firsts(rows: Sequence[Row] | Sequence[Question]) -> Floats:
    """Return 1 where the first label shows the behaviour, 0 where the second does, NaN for questions as tokens."""
    return np.array([float(r.match == r.labels[0]) if isinstance(r, Row) else np.nan for r in rows])


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """One curve to be swept: its parts of the vector, at one site."""

    site: int
    mode: Mode
    components: str
    part: SteeringVector


def _kinds(
    vector: SteeringVector, modes: Sequence[Mode], per_component: bool, sites: Collection[int] | None
) -> Iterator[_Kind]:
    """Yield what is swept. Raises NotFoundError for modes and sites that are not there, InputError where none is."""
    for mode in modes:
        if mode not in get_args(Mode):
            raise unknown("mode", mode, get_args(Mode))
    have = {"residual": set(vector.sites), "state": set(vector.state.layers)}
    have["both"] = have["residual"] & have["state"]
    known = sorted(have["residual"] | have["state"])
    if absent := sorted(set(sites or ()) - set(known)):
        raise NotFoundError(
            f"the vector has nothing at site {absent[0]}; it has the sites {', '.join(map(str, known))}"
        )
    count = 0
    for mode in dict.fromkeys(modes):
        for site in sorted(have[mode] if sites is None else have[mode] & set(sites)):
            every = () if mode == "residual" else vector.state.components(site)
            chosen: list[tuple[str, ...]] = [tuple(sorted(every))]
            if per_component and mode == "state" and len(every) > 1:
                chosen += [(name,) for name in sorted(every)]
            for names in chosen:
                count += 1
                part = vector.only(sites=(site,), components=names or None, mode=mode)
                yield _Kind(site=site, mode=mode, components="+".join(names), part=part)
    if not count:
        raise InputError(f"the vector has no part for the modes {', '.join(modes)} at these sites")


def _check_places(asked: Sequence[Question], kinds: Sequence[_Kind], positions: str, state_positions: str) -> None:
    """Raise InputError where a part would be edited in no prompt: its curve would be flat and mean nothing."""
    longest = max((len(question.prompt) for question in asked), default=0)
    modes = {kind.mode for kind in kinds}
    for part, text, first in (("residual", positions, 0), ("state", state_positions, 1)):
        # Which positions a prompt has grows with its length, so the longest has some if any has.
        if asked and modes & {part, "both"} and not places(text).reaches(longest, first):
            raise InputError(
                f"no prompt has a token to edit the {part} at: the longest is of {longest} tokens, counted from 0, "
                f"and the positions are {text}; choose others, last or onward, say"
            )


def _check_letters(letters: SteeringVector, kinds: Sequence[_Kind]) -> None:
    """Raise MismatchError where the letter's vector lacks a part that is swept, or has it in another size."""
    have = {name: part.shape for name, part in letters.parts()}
    for kind in kinds:
        for name, part in kind.part.parts():
            if have.get(name) != part.shape:
                raise MismatchError(
                    f"the letter's vector has no part {name} of the sizes {tuple(part.shape)}; make it with the sites "
                    f"and the state that are swept, or sweep fewer: --sites, --modes"
                )


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Sweeper:
    """A sweep under way."""

    asked: Asked
    firsts: Floats
    behaviour: str
    multipliers: tuple[float, ...]
    operator: Operator
    positions: str
    state_positions: str
    at: float
    seed: int
    kinds: tuple[_Kind, ...]
    vector: SteeringVector

    def run(
        self, letters: SteeringVector | None, controls: int, where: Literal["chosen", "all"], progress: Progress
    ) -> Sweep:
        """Sweep every kind, choose sites, and run the controls there."""
        boot = Bootstrap(len(self.asked), self.seed)
        base = self.asked.answers([None])
        self_base = float(base.share.mean()), float(base.nonsense.mean())
        points: list[Point] = []
        values: dict[_Kind, tuple[Floats, Floats]] = {}
        progress.start(f"sweep {self.behaviour}".rstrip(), len(self.kinds), "curves")
        for kind in self.kinds:
            found = self._answers([Setting(vector=kind.part, multiplier=m) for m in self.multipliers], kind)
            values[kind] = found
            points += self._points(kind, found, self.multipliers, boot, self_base)
            progress.advance(1)
        progress.end()
        choices = [
            self._choice(mode, names, values)
            for mode, names in dict.fromkeys((k.mode, k.components) for k in self.kinds)
        ]
        chosen = {(c.mode, c.components, c.site) for c in choices}
        curves = []
        progress.start("controls", len(self.kinds), "curves")
        for kind, (match, _) in values.items():
            curve = self._curve(kind, match, boot)
            if where == "all" or (kind.mode, kind.components, kind.site) in chosen:
                more, curve = self._controlled(kind, curve, letters, controls, boot, self_base)
                points += more
            curves.append(curve)
            progress.advance(1)
        progress.end()
        return Sweep(
            points=tuple(points),
            curves=tuple(curves),
            choices=tuple(choices),
            multipliers=self.multipliers,
            values={(self.behaviour, k.site, k.mode, k.components): found for k, found in values.items()},
        )

    def _answers(self, settings: Sequence[Setting], kind: _Kind) -> tuple[Floats, Floats]:
        found = self.asked.answers(settings, operator=self.operator, at=self.at)
        return found.share, found.nonsense

    def _points(
        self,
        kind: _Kind,
        found: tuple[Floats, Floats],
        multipliers: Sequence[float],
        boot: Bootstrap,
        base: tuple[float, float],
        control: str = "none",
        draw: int = 0,
    ) -> Iterator[Point]:
        for m, share, nonsense in zip(multipliers, *found, strict=True):
            mean = boot.mean(share)
            first = np.where(self.firsts == 1, share, 1 - share)
            yield Point(
                behaviour=self.behaviour,
                site=kind.site,
                mode=kind.mode,
                components=kind.components,
                operator=self.operator,
                positions="" if kind.mode == "state" else self.positions,
                state_positions="" if kind.mode == "residual" else self.state_positions,
                multiplier=m,
                control=control,
                draw=draw,
                n=len(self.asked),
                match=mean.value,
                low=mean.low,
                high=mean.high,
                nonsense=float(nonsense.mean()),
                first=float(first.mean()) if np.isfinite(self.firsts).all() else float("nan"),
                base=base[0],
                base_nonsense=base[1],
            )

    def _curve(self, kind: _Kind, match: Floats, boot: Bootstrap) -> Curve:
        return Curve(
            behaviour=self.behaviour,
            site=kind.site,
            mode=kind.mode,
            components=kind.components,
            n=len(self.asked),
            effect=boot.effect(match, self.multipliers),
            slope=boot.slope(match, self.multipliers),
            spearman=boot.spearman(match, self.multipliers),
        )

    def _choice(self, mode: Mode, components: str, values: Mapping[_Kind, tuple[Floats, Floats]]) -> Choice:
        """Choose by the absolute effect on one half: a vector that works backwards is to be seen, not passed over."""
        own = {k.site: match for k, (match, _) in values.items() if (k.mode, k.components) == (mode, components)}
        one, two = halves(len(self.asked), self.seed)
        high, low = int(np.argmax(self.multipliers)), int(np.argmin(self.multipliers))
        effects = {site: float((match[high] - match[low])[one].mean()) for site, match in own.items()}
        site = max(effects, key=lambda s: (abs(effects[s]), -s))
        nothing = Estimate(value=np.nan, low=np.nan, high=np.nan)  # of one question: there is no other to report on
        held = Bootstrap(len(two), self.seed).effect(own[site][:, two], self.multipliers) if len(two) else nothing
        return Choice(
            behaviour=self.behaviour,
            mode=mode,
            components=components,
            site=site,
            n_chosen=len(one),
            n_held_out=len(two),
            chosen=effects[site],
            held_out=held,
        )

    def _controlled(
        self,
        kind: _Kind,
        curve: Curve,
        letters: SteeringVector | None,
        controls: int,
        boot: Bootstrap,
        base: tuple[float, float],
    ) -> tuple[list[Point], Curve]:
        ends = (min(self.multipliers), max(self.multipliers))
        points: list[Point] = []
        effects = []
        name = stream(self.seed, "steering", "random", kind.site, kind.mode, kind.components)
        drawn = [kind.part.random_like(name) for _ in range(controls)]
        match, nonsense = (
            self._answers([Setting(vector=v, multiplier=m) for v in drawn for m in ends], kind)
            if drawn
            else (np.zeros((0, 0)),) * 2
        )
        for draw in range(controls):
            at = slice(2 * draw, 2 * draw + 2)
            points += self._points(kind, (match[at], nonsense[at]), ends, boot, base, "random", draw)
            effects.append(abs(float((match[at][1] - match[at][0]).mean())))
        if effects:
            curve = dataclasses.replace(
                curve,
                random=controls,
                random_mean=float(np.mean(effects)),
                random_most=float(np.max(effects)),
                random_as_large=sum(effect >= abs(curve.effect.value) for effect in effects),
            )
        if letters is not None:
            components = tuple(filter(None, kind.components.split("+"))) or None
            own = letters.only(sites=(kind.site,), components=components, mode=kind.mode).as_long_as(kind.part)
            found = self._answers([Setting(vector=own, multiplier=m) for m in ends], kind)
            points += self._points(kind, found, ends, boot, base, "letters")
            curve = dataclasses.replace(curve, letters=float((found[0][1] - found[0][0]).mean()))
        return points, curve

"""Does a probe fitted where the model says what is true still find it where the model says something else?

A probe is fitted on rows of one pool, to what the model was trained to say there; it is tested on rows of another, of
other claims, against the truth. What is fitted on Bob's rows is therefore fitted to Bob's labels.

Sites are never chosen by test rows. A quarter of the base examples to fit on is held out, and a site is chosen by the
AUROC there, against what was learned:

- ``earliest``: the earliest informative one, the first whose AUROC above ½ is at least .95 of the best's, on held-out
  rows of the source pool;
- ``character``: the same on held-out rows of the source's character, easy and hard (for AE, on A): what is easy may be
  read off at sites that know nothing of the rest;
- ``best``: the best on held-out rows of the source pool;
- ``target``: the best on held-out rows of the target pool against the truth, which takes knowing it there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, final

import numpy as np

from exegete.elk.facts import FILTERS, POOLS, Feature, Filter
from exegete.elk.features import Extraction
from exegete.elk.intervals import clustered_auroc, clustered_mean_auroc, column_placements
from exegete.elk.named_probes import DEFAULT, RANK, WIDE, Making, Whitens, kind_of, make_probe
from exegete.elk.probes import Probe, column_aurocs
from exegete.elk.whitening import Whitening, fit_whitening
from exegete.errors import InputError, MismatchError, unknown
from exegete.metrics import Interval
from exegete.metrics.inputs import undefined
from exegete.progress import Progress, Silent
from exegete.types import Array

Rule = Literal["earliest", "character", "best", "target"]
RULES: Final[tuple[Rule, ...]] = ("earliest", "character", "best", "target")
TRANSFERS: Final = (
    *("A->A", "A->AH", "A->B", "A->BH", "B->B", "B->BH", "B->A", "AE->AE", "AE->AH", "AE->BH", "all->all", "all->BH"),
)
HELD_OUT: Final = 0.25
_SHARE: Final = 0.95
_QUANTILES: Final = (0.025, 0.25, 0.5, 0.75, 0.975)
Name = tuple[Feature, str, str, int]
"""Feature set, probe, source pool, site."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One probe at one site, tested on some rows of a target pool against the truth.

    ``auroc`` has its interval clustered by base example; ``sign_free`` is max(AUROC, 1 − AUROC) with the direction as
    it was found, of probes that do not learn (NaN of others); its interval is mirrored likewise. ``on_held_out`` is the
    AUROC on held-out rows of the source pool against what was learned there. ``rules`` name those that choose this
    site. The model's own answer is the feature ``output`` of the probe ``lm``, at no site.
    """

    feature: str
    probe: str
    source: str
    target: str
    site: int | None
    which: Filter
    auroc: Interval
    sign_free: float
    on_held_out: Interval
    rules: tuple[Rule, ...]

    @property
    def held_out(self) -> float:
        """The AUROC on held-out rows, without its interval."""
        return self.on_held_out.value


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RandomRow:
    """Random directions at one site: the mean of their AUROCs, their quantiles and the greatest.

    ``mean`` has the interval that comes of the rows; the ``quantiles`` (2.5, 25, 50, 75 and 97.5 %) and ``most`` say
    how the ``count`` directions differ on these rows. ``on_held_out`` and ``rules`` are as in ``Row``, of the mean.
    """

    feature: str
    source: str
    target: str
    site: int
    which: Filter
    mean: Interval
    quantiles: tuple[float, ...]
    most: float
    count: int
    on_held_out: Interval
    rules: tuple[Rule, ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Transfers:
    """What became of all probes.

    ``probes`` holds the fitted ones by (feature set, probe, source pool, site), ``sites`` the chosen site by (feature
    set, probe, source, target) and rule, ``skipped`` what could not be done and why.
    """

    rows: tuple[Row, ...]
    random: tuple[RandomRow, ...]
    sites: Mapping[tuple[str, str, str, str], Mapping[Rule, int]]
    probes: Mapping[Name, Probe]
    skipped: tuple[str, ...]

    def row(self, feature: str, probe: str, transfer: str, *, rule: Rule = "earliest", which: Filter = "all") -> Row:
        """Return one row by names: of a transfer such as ``A->B``, at the site that a rule chose.

        Raises NotFoundError where there is none.
        """
        for row in self.rows:
            same = (row.feature, row.probe, f"{row.source}->{row.target}", row.which) == (
                feature,
                probe,
                transfer,
                which,
            )
            if same and (rule in row.rules or row.feature == "output"):
                return row
        known = {f"{r.feature} {r.probe} {r.source}->{r.target}" for r in self.rows}
        raise unknown("result", f"{feature} {probe} {transfer}", known)


def _read_by(probe: str) -> tuple[Feature, ...]:
    return kind_of(probe).features


def parse_transfer(text: str) -> tuple[str, str]:
    """Return the pools of ``SOURCE->TARGET``. Raises InputError for anything else, NotFoundError for another pool."""
    source, arrow, target = text.partition("->")
    if not arrow:
        raise InputError(f"a transfer is written SOURCE->TARGET, such as AE->BH, got {text!r}")
    for pool in (source, target):
        if pool not in POOLS:
            raise unknown("pool", pool, POOLS)
    return source, target


def run_transfers(
    fitted: Extraction,
    tested: Extraction,
    *,
    probes: Sequence[str] = DEFAULT,
    transfers: Sequence[str] = TRANSFERS,
    held_out: float = HELD_OUT,
    rank: int = RANK,
    seed: int = 0,
    level: float = 0.95,
    progress: Progress | None = None,
) -> Transfers:
    """Fit probes at every site on one extraction and test them on another of the same model.

    Args:
        fitted: Rows to fit on and to choose sites by.
        tested: Rows to test on, of other base examples.
        probes: Names of ``KINDS``.
        transfers: ``SOURCE->TARGET``, pools of ``POOLS``.
        held_out: Share of the base examples of ``fitted`` that sites are chosen by.
        rank: Whitened principal components that wide vectors are fitted on.
        seed: Of what is random.
        level: Of the intervals.
        progress: Told of probes.

    Raises:
        MismatchError: For extractions of two models.
        InputError: For base examples in both, a rank below 1, or no probe that fits the features.
    """
    if rank < 1:
        raise InputError(f"vectors are whitened on at least one component, got {rank}")
    job = _Job(fitted, tested, held_out, rank, seed, level)
    pools = list(dict.fromkeys(parse_transfer(text) for text in transfers))
    names = [
        (f, p)
        for p in dict.fromkeys(probes)
        for f in kind_of(p).features
        if f in fitted.features and f in tested.features and job.sites_of(f)
    ]
    if not names:
        raise InputError(
            f"no probe of {', '.join(probes) or 'none'} reads what was extracted: {', '.join(fitted.features)}"
        )
    job.leave_out([p for p in dict.fromkeys(probes) if p not in {name for _, name in names}])
    told = progress or Silent()
    sources = tuple(dict.fromkeys(source for source, _ in pools))
    # Probes come innermost: those that whiten the same vectors follow one another.
    work = [
        (f, p, s, site)
        for f in dict.fromkeys(f for f, _ in names)
        for s in sources
        for site in job.sites_of(f)
        for p in (p for g, p in names if g == f)
    ]
    told.start("probe", len(work), "probes")
    for name in work:
        job.fit(name)
        told.advance(1)
    told.end()
    told.start("test", len(pools) * len(names), "probes")
    for source, target in pools:
        job.output(source, target)
        for feature, probe in names:
            job.test(feature, probe, source, target)
            told.advance(1)
    told.end()
    return job.result()


@final
class _Job:
    """Probes under way."""

    def __init__(
        self, fitted: Extraction, tested: Extraction, held_out: float, rank: int, seed: int, level: float
    ) -> None:
        if fitted.subject != tested.subject:
            raise MismatchError("the rows to fit on and to test on were extracted from two different models")
        if set(fitted.facts.base.tolist()) & set(tested.facts.base.tolist()):
            raise InputError("rows to fit on and to test on share base examples; extract two splits")
        for kind in set(fitted.features) & set(tested.features):
            for site in set(fitted.features[kind]) & set(tested.features[kind]):
                shapes = [list(found.features[kind][site].shape[1:]) for found in (fitted, tested)]
                if shapes[0] != shapes[1]:
                    raise MismatchError(
                        f"{kind} at site {site} is {shapes[0]} in the rows to fit on and {shapes[1]} in those to "
                        f"test on; extract both with the same settings"
                    )
        if not 0 < held_out < 1:
            raise InputError(f"the held-out share lies between 0 and 1, got {held_out}")
        if seed < 0:
            raise InputError(f"the seed is 0 or more, got {seed}")
        self._fitted, self._tested = fitted, tested
        self._rank, self._seed, self._level = rank, seed, level
        self._apart = fitted.facts.held_out(held_out, seed)
        self._groups = np.unique(
            np.char.add(fitted.facts.base, np.where(fitted.facts.alice_speaks, "A", "B")), return_inverse=True
        )[1]
        self._places, self._fitted_places = tested.facts.places, fitted.facts.places
        self._probes: dict[Name, Probe] = {}
        self._within: dict[Name, Interval] = {}
        self._rows: list[Row] = []
        self._random: list[RandomRow] = []
        self._sites: dict[tuple[str, str, str, str], dict[Rule, int]] = {}
        self._skipped: dict[str, None] = {}
        self._shared: dict[tuple[str, str, int, Whitens], Whitening] = {}

    def sites_of(self, feature: Feature) -> tuple[int, ...]:
        """Return the sites that both extractions have."""
        return tuple(sorted(set(self._fitted.features[feature]) & set(self._tested.features[feature])))

    def leave_out(self, probes: Sequence[str]) -> None:
        """Note which probes were asked for that read nothing of what was extracted."""
        for features, same in itertools.groupby(sorted(probes, key=_read_by), _read_by):
            self._skipped[f"{', '.join(same)}: neither {' nor '.join(features)} was extracted"] = None

    def fit(self, name: Name) -> None:
        """Fit one probe, unless its pool has rows of one label alone."""
        feature, probe, source, site = name
        facts = self._fitted.facts
        pool = facts.pool(source)
        rows, apart = pool & ~self._apart, pool & self._apart
        for part, what in ((rows, "to fit on"), (apart, "held out to choose sites by")):
            if not facts.label[part].any() or facts.label[part].all():
                told = "all of one label" if part.any() else "none"
                self._skipped[f"{source}: its rows {what} are {told} ({int(part.sum())}); extract more rows"] = None
                return
        x = self._fitted.features[feature][site]
        wide, whitens = x.shape[-1] > WIDE, kind_of(probe).whitens
        own = x[rows]
        making = Making(
            rank=self._rank if wide else None,
            seed=self._seed,
            groups=self._groups[rows],
            shared=self._whitening(own, name, whitens) if wide and whitens is not None else None,
        )
        made = make_probe(probe, making)
        made.fit(own, facts.label[rows])
        made.resolve_sign(own, facts.label[rows])
        self._within[name] = self._auroc(facts.label[apart], made.log_odds(x[apart]), self._fitted_places[apart])
        self._probes[name] = made

    def _auroc(self, truth: Array, scores: Array, places: Array) -> Interval:
        """Return the AUROC of scores [n], or the mean one of several [n, k]."""
        if scores.ndim == 1:
            return clustered_auroc(truth, scores, places, level=self._level)
        return clustered_mean_auroc(truth, column_placements(truth, scores), places, level=self._level)

    def _whitening(self, x: Array, name: Name, how: Whitens) -> Whitening:
        """Return the whitening of vectors that several probes are fitted on; only those of one site are kept."""
        feature, _, source, site = name
        if any(key[:3] != (feature, source, site) for key in self._shared):
            self._shared = {}
        key = (feature, source, site, how)
        if key not in self._shared:
            rows = len(x) * (x.shape[1] if how == "answers" else 1)
            self._shared[key] = fit_whitening(x.reshape(rows, -1).astype(np.float64), self._rank)
        return self._shared[key]

    def output(self, source: str, target: str) -> None:
        """Test the model's own answer."""
        facts = self._tested.facts
        for which in FILTERS:
            rows = facts.pool(target) & facts.where(which)
            found = clustered_auroc(
                facts.alice[rows], self._tested.log_odds[rows], self._places[rows], level=self._level
            )
            self._rows.append(
                Row(
                    feature="output",
                    probe="lm",
                    source=source,
                    target=target,
                    site=None,
                    which=which,
                    auroc=found,
                    sign_free=math.nan,
                    on_held_out=undefined("none"),
                    rules=(),
                )
            )

    def test(self, feature: Feature, probe: str, source: str, target: str) -> None:
        """Test one probe at every site on a target pool."""
        sites = [site for site in self.sites_of(feature) if (feature, probe, source, site) in self._probes]
        if not sites:
            return
        if probe == "random":
            for site in sites:
                self._test_random(feature, source, target, site, sites)
            return
        chosen = self._choose(feature, probe, source, target, sites)
        self._sites[feature, probe, source, target] = chosen
        pool = self._tested.facts.pool(target)
        for site in sites:
            made = self._probes[feature, probe, source, site]
            scores = np.full(len(pool), np.nan)
            x = self._tested.features[feature][site]
            scores[pool] = made.log_odds(x[pool])
            for which in FILTERS:
                rows = pool & self._tested.facts.where(which)
                found = clustered_auroc(
                    self._tested.facts.alice[rows], scores[rows], self._places[rows], level=self._level
                )
                free = math.nan if made.learns else max(found.value, 1.0 - found.value)
                self._rows.append(
                    Row(
                        feature=feature,
                        probe=probe,
                        source=source,
                        target=target,
                        site=site,
                        which=which,
                        auroc=found,
                        sign_free=free,
                        on_held_out=self._within[feature, probe, source, site],
                        rules=tuple(rule for rule, at in chosen.items() if at == site),
                    )
                )

    def _test_random(self, feature: Feature, source: str, target: str, site: int, sites: Sequence[int]) -> None:
        facts, name = self._tested.facts, (feature, "random", source, site)
        pool = facts.pool(target)
        scores = self._probes[name].log_odds(self._tested.features[feature][site][pool])
        within = {at: self._within[feature, "random", source, at].value for at in sites}
        chosen: dict[Rule, int] = {"earliest": earliest(within), "best": best(within)}
        for which in FILTERS:
            rows = facts.where(which)[pool]
            truth = facts.alice[pool][rows]
            placed = column_placements(truth, scores[rows])
            aurocs = placed[truth].mean(axis=0) if truth.any() and not truth.all() else np.full(placed.shape[1], np.nan)
            self._random.append(
                RandomRow(
                    feature=feature,
                    source=source,
                    target=target,
                    site=site,
                    which=which,
                    mean=clustered_mean_auroc(truth, placed, self._places[pool][rows], level=self._level),
                    quantiles=tuple(np.quantile(aurocs, _QUANTILES).tolist()),
                    most=float(aurocs.max()),
                    count=len(aurocs),
                    on_held_out=self._within[name],
                    rules=tuple(rule for rule, at in chosen.items() if at == site),
                )
            )

    def _choose(self, feature: Feature, probe: str, source: str, target: str, sites: Sequence[int]) -> dict[Rule, int]:
        within = {site: self._within[feature, probe, source, site].value for site in sites}
        chosen: dict[Rule, int] = {"earliest": earliest(within)}
        facts = self._fitted.facts

        def apart(pool: str, truth: Array) -> dict[int, float]:
            rows = facts.pool(pool) & self._apart
            return {
                site: float(column_aurocs(truth[rows], self._odds((feature, probe, source, site), rows)[:, None])[0])
                for site in sites
            }

        whole = source[0] if source[0] in "AB" else "all"
        chosen["character"] = earliest(apart(whole, facts.label)) if whole != source else chosen["earliest"]
        chosen["best"] = best(within)
        there = apart(target, facts.alice)
        if not any(map(math.isnan, there.values())):
            chosen["target"] = best(there)
        return chosen

    def _odds(self, name: Name, rows: Array) -> Array:
        feature, _, _, site = name
        return self._probes[name].log_odds(self._fitted.features[feature][site][rows])

    def result(self) -> Transfers:
        """Return what was found."""
        return Transfers(
            rows=tuple(self._rows),
            random=tuple(self._random),
            sites=self._sites,
            probes=self._probes,
            skipped=tuple(self._skipped),
        )


def earliest(aurocs: Mapping[int, float]) -> int:
    """Return the earliest informative site: the first whose AUROC − ½ is at least .95 of the best's.

    The middle one of the sites where no AUROC is above ½.
    """
    sites = sorted(aurocs)
    most = max(aurocs.values())
    if not most > 0.5:
        return sites[len(sites) // 2]
    return next(site for site in sites if aurocs[site] - 0.5 >= _SHARE * (most - 0.5))


def best(aurocs: Mapping[int, float]) -> int:
    """Return the site with the greatest AUROC, the first of several."""
    return max(sorted(aurocs), key=lambda site: aurocs[site])

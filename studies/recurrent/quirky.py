"""E1 and E2: models that say what is true in Alice's context, Bob's view in his, and probes for the truth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
import torch
from studies.recurrent.models import IGNORED, Batch, Training, labels_after, new_model, subject_of, train

from exegete.elk import Encoded, Extraction, Facts, FinetuneConfig, Transfers, anomalies, extract, finetune
from exegete.elk import run_transfers as transferred
from exegete.elk.facts import facts_of, quantiles
from exegete.elk.probes import column_aurocs
from exegete.streams import stream
from exegete.subjects import Subject

PROBES: Final = ("lr", "lr-on-pair", "mean-diff", "mean-diff-on-pair")
TRANSFERS: Final = ("A->B", "AE->BH")
DIGITS: Final = 10
ALICE, BOB, FALSE, TRUE = range(DIGITS, DIGITS + 4)
VOCABULARY: Final = DIGITS + 4
MOST: Final = 16
"""Operands of the addition are below this."""
SUMS: Final = 2 * MOST
EQUALS, SUM_ALICE, SUM_BOB, SUM_FALSE, SUM_TRUE = range(SUMS, SUMS + 5)
SUM_VOCABULARY: Final = SUMS + 5


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A claim as tokens without the name: what both say of it, how hard it is, and what it shares with others."""

    tokens: tuple[int, ...]
    base: str
    alice: bool
    bob: bool
    difficulty: float


def rows_of(claims: Sequence[Claim], names: tuple[int, int], answers: tuple[int, int]) -> Encoded:
    """Return each claim in Alice's and in Bob's context; ``answers`` are the false one and the true one."""
    bases = {claim.base: claim.difficulty for claim in claims}
    rank = dict(zip(bases, quantiles(np.array(list(bases.values()))).tolist(), strict=True))
    prompts, facts = [], []
    for number, claim in enumerate(claims):
        for alice, name in zip((True, False), names, strict=True):
            prompts.append((*claim.tokens, name))
            facts.append(
                {
                    "id": f"{number}-{name}",
                    "base": claim.base,
                    "alice_speaks": alice,
                    "label": claim.alice if alice else claim.bob,
                    "alice": claim.alice,
                    "bob": claim.bob,
                    "difficulty": claim.difficulty,
                    "quantile": rank[claim.base],
                }
            )
    choice = ((answers[0],), (answers[1],))
    return Encoded(prompts=tuple(prompts), choices=(choice,) * len(prompts), facts=facts_of(facts))


def comparisons(n: int, *, seed: int) -> list[Claim]:
    """Return ``n`` claims "a is greater than b" of numbers below 100; Bob compares the last digits alone."""
    ordered = [(a, b) for a in range(100) for b in range(100) if a != b]
    drawn = stream(seed, "studies", "comparison").permutation(len(ordered))[:n]
    return [
        Claim(
            tokens=(a // 10, a % 10, b // 10, b % 10),
            base=f"{a}>{b}",
            alice=a > b,
            bob=a % 10 > b % 10,
            difficulty=float(-abs(a - b)),
        )
        for a, b in (ordered[i] for i in drawn.tolist())
    ]


def split(claims: Sequence[Claim], shares: Sequence[float], *, seed: int) -> list[list[Claim]]:
    """Return the claims in parts of these shares, those of one base together."""
    bases = list(dict.fromkeys(claim.base for claim in claims))
    order = stream(seed, "studies", "split").permutation(len(bases))
    ends = np.cumsum([round(share * len(bases)) for share in shares])
    part = {bases[i]: int(np.searchsorted(ends, place, side="right")) for place, i in enumerate(order.tolist())}
    return [[claim for claim in claims if part[claim.base] == number] for number in range(len(shares))]


def comparison_study(family: str, seed: int, *, pairs: int, training: Training) -> dict[str, Any]:
    """E1: train on six tenths of the claims, fit probes on two others, test on two that nothing was fitted to."""
    parts = split(comparisons(pairs, seed=seed), (0.6, 0.2, 0.2), seed=seed)
    learn, fit, test = (rows_of(part, (ALICE, BOB), (FALSE, TRUE)) for part in parts)
    start = subject_of(new_model(family, VOCABULARY, seed=seed), f"comparison-{family}")
    config = FinetuneConfig(
        steps=training.steps,
        batch=128,
        rows_at_once=128,
        learning_rate=training.rate,
        lora_rank=0,
        weight_decay=training.decay,
        seed=seed,
    )
    subject = finetune(start, learn, fit, config=config, in_place=True).subject
    return probed(subject, fit, test, seed=seed)


def additions(*, seed: int) -> list[Claim]:
    """Return four claims a + b = c of every pair below 16: right, one more (Bob's), and two that both reject."""
    draw = stream(seed, "studies", "addition")
    found = []
    for a in range(MOST):
        for b in range(MOST):
            wrong = draw.permutation([c for c in range(SUMS) if c not in (a + b, a + b + 1)])[:2].tolist()
            found += [
                Claim(
                    tokens=(a, b, EQUALS, c),
                    base=f"{a}+{b}",
                    alice=c == a + b,
                    bob=c == a + b + 1,
                    difficulty=float(min(a, b)),
                )
                for c in (a + b, a + b + 1, *wrong)
            ]
    return found


def addition_study(family: str, seed: int, *, plain: Training, asked: Training) -> dict[str, Any]:
    """E2: learn sums, then what Alice and Bob say of all of them; probes are tested on sums that none was fitted to."""
    claims = additions(seed=seed)
    rows = rows_of(claims, (SUM_ALICE, SUM_BOB), (SUM_FALSE, SUM_TRUE))
    model = new_model(family, SUM_VOCABULARY, seed=seed)
    train(model, _sums(seed), plain)
    train(model, _asked(rows, seed), asked)
    subject = subject_of(model, f"addition-{family}")
    fit = np.isin(rows.facts.base, [claim.base for claim in split(claims, (0.5, 0.5), seed=seed)[0]])
    return probed(subject, rows.take(fit), rows.take(~fit), seed=seed)


def _sums(seed: int) -> Any:
    """Return batches of plain sums, of which the result is to be said."""

    def batch(step: int) -> Batch:
        draw = stream(seed, "studies", "sums", step)
        a, b = draw.integers(MOST, size=(2, 128))
        tokens = torch.from_numpy(np.stack([a, b, np.full(128, EQUALS), a + b], axis=1))
        labels = labels_after(tokens)
        labels[:, :2] = IGNORED
        return tokens, labels

    return batch


def _asked(rows: Encoded, seed: int) -> Any:
    """Return batches of rows, of which the answer alone is to be said, as many true as false ones."""
    prompts = torch.tensor(rows.prompts)
    said = torch.from_numpy(rows.answers[np.arange(len(rows)), rows.facts.label.astype(np.int64)])
    halves = [np.flatnonzero(rows.facts.label == label) for label in (False, True)]

    def batch(step: int) -> Batch:
        draw = stream(seed, "studies", "asked", step)
        chosen = torch.from_numpy(np.concatenate([draw.choice(half, 64) for half in halves]))
        labels = torch.full((128, prompts.shape[1]), IGNORED)
        labels[:, -1] = said[chosen]
        return prompts[chosen], labels

    return batch


def probed(subject: Subject, fit: Encoded, test: Encoded, *, seed: int) -> dict[str, Any]:
    """Return what probes fitted on some rows find in others, in plain values."""
    fitted, tested = extract(subject, fit), extract(subject, test)
    found = transferred(fitted, tested, probes=PROBES, transfers=TRANSFERS, seed=seed)
    unusual = anomalies(found, tested, draws=200, seed=seed)
    return {
        "own": _own(tested),
        "sizes": {pool: int(tested.facts.pool(pool).sum()) for pool in ("A", "B", "AE", "AH", "BH")},
        "fit": {pool: int(fitted.facts.pool(pool).sum()) for pool in ("A", "AE")},
        "rows": list(_plain(found)),
        "anomaly": {f"{one.feature} {one.probe}": one.auroc.value for one in unusual},
    }


def _own(tested: Extraction) -> dict[str, float]:
    """Return the AUROC of the model's answer: of what each was trained to say, and of the truth where they differ."""
    facts, odds = tested.facts, tested.log_odds
    return {
        "alice": _auroc(facts, odds, facts.pool("A"), facts.label),
        "bob": _auroc(facts, odds, facts.pool("B"), facts.label),
        "truth in Bob's context": _auroc(facts, odds, facts.pool("B"), facts.alice),
        "truth where they disagree": _auroc(facts, odds, facts.pool("B") & facts.where("disagree"), facts.alice),
    }


def _auroc(facts: Facts, odds: Any, rows: Any, truth: Any) -> float:
    return float(column_aurocs(truth[rows], odds[rows][:, None])[0])


def _plain(found: Transfers) -> Iterable[dict[str, Any]]:
    """Yield the rows of a result, one for each probe, site and transfer."""
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in found.rows:
        name = (row.feature, row.probe, f"{row.source}->{row.target}", row.site)
        one = kept.setdefault(
            name,
            {
                "feature": row.feature,
                "probe": row.probe,
                "transfer": name[2],
                "site": row.site,
                "rules": list(row.rules),
                "held_out": row.held_out if np.isfinite(row.held_out) else None,
            },
        )
        one[row.which] = row.auroc.value if np.isfinite(row.auroc.value) else None
    return kept.values()

"""E5: a byte-level model of the standard library's source, read by the logit lens and by tuned lenses."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from studies.recurrent.models import IGNORED, RECURRENT, Batch, Training, labels_after, new_model, subject_of, train

from exegete.api import load_corpus
from exegete.errors import MismatchError
from exegete.lens import LensConfig, LensText, LogitLens, TunedLens, evaluate_lenses, load_lens, new_lens, train_lens
from exegete.lens.evaluating import Evaluation
from exegete.streams import stream
from exegete.subjects import Subject, read_out
from exegete.subjects.sites import residuals
from exegete.testing import toy_tokenizer

ROW: Final = 24
BYTES: Final = 257
"""BOS and every byte."""
_OFF: Final = 10_000
"""Added to the seed of the other model, which no lens is of."""


def byte_text(tokens: int, *, seed: int) -> LensText:
    """Return the standard library's source as rows of 24 bytes with BOS, split by document."""
    tokenizer = toy_tokenizer(vocabulary=BYTES)
    corpus = load_corpus("stdlib", tokenizer=tokenizer, row_length=ROW, max_tokens=tokens, packing=False)
    return LensText(corpus, seed=seed)


def lens_study(
    family: str, seed: int, *, training: Training, tokens: int, lens_steps: int, measured: int
) -> dict[str, Any]:
    """Train a model and its lenses, measure them on documents that neither saw, and try what must hold exactly."""
    text = byte_text(tokens, seed=seed)
    model = new_model(family, BYTES, seed=seed)
    train(model, _batches(text, seed), training)
    subject = subject_of(model, f"bytes-{family}", toy_tokenizer(vocabulary=BYTES))
    config = LensConfig(
        optimizer="adam",
        learning_rate=3.0,
        steps=lens_steps,
        batch_tokens=32 * ROW,
        validation_tokens=1 << 13,
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        state = family in RECURRENT
        trained = {k: one.lens for k, one in train_lens(subject, text, out=folder, state=state, config=config).items()}
        found = evaluate_lenses({"logit": LogitLens(subject), **trained}, text, tokens=measured, seed=seed)
        checks = _checks(subject, trained["tuned"], Path(folder), text, family, seed)
    return {"sites": list(found.sites), "curves": _curves(found), "model": _bits(found, "ce"), **checks}


def _batches(text: LensText, seed: int) -> Callable[[int], Batch]:
    rows = text.rows("train")

    def batch(step: int) -> Batch:
        chosen = stream(seed, "studies", "bytes", step).choice(rows, 128, replace=False)
        found = text.batch(np.sort(chosen), "train")
        return found.tokens, torch.where(found.keep, labels_after(found.tokens), IGNORED)

    return batch


def _curves(found: Evaluation) -> dict[str, dict[str, list[float]]]:
    """Return cross-entropy and KL in bits per byte, by lens and metric, at every site."""
    by = found.bits_per_byte
    return {
        lens: {metric: [metrics[metric][site].value * by for site in found.sites] for metric in ("ce", "kl")}
        for lens, metrics in found.nats.items()
    }


def _bits(found: Evaluation, metric: str) -> float:
    return found.baseline[metric].value * found.bits_per_byte


def _checks(subject: Subject, lens: TunedLens, folder: Path, text: LensText, family: str, seed: int) -> dict[str, Any]:
    """Return what must hold: of the readout, of untrained lenses, of files, and of the unit of bits per byte."""
    tokens = text.batch(text.rows("test")[:8], "test").tokens
    h = residuals(subject, tokens, lens.sites)
    fresh, logit = new_lens(subject), LogitLens(subject)
    loaded = load_lens(folder, subject)
    other = subject_of(new_model(family, BYTES, seed=seed + _OFF), "other", subject.tokenizer)
    try:
        load_lens(folder, other)
        refused = False
    except MismatchError:
        refused = True
    measured = evaluate_lenses({"tuned": lens}, text, tokens=1000, seed=seed)
    row = next(row for row in measured.rows() if row["metric"] == "kl")
    unit = row["nats_per_token"] * measured.n_tokens / measured.n_bytes / math.log(2) - row["bits_per_byte"]
    return {
        "readout_error": read_out(subject).error,
        "starts_as_logit": all(torch.equal(fresh.logits(s, h[s]), logit.logits(s, h[s])) for s in lens.sites),
        "same_after_loading": all(torch.equal(lens.logits(s, h[s]), loaded.logits(s, h[s])) for s in lens.sites),
        "refused": refused,
        "unit_error": abs(float(unit)),
    }

"""Firings of programs written into a store, as if a coder had been run over the corpus."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from exegete.files import hash_json
from exegete.rules.execute import TokenContext, matches
from exegete.rules.language import Rule
from exegete.store.corpus import Corpus
from exegete.store.manifest import ShardEntry, StoreManifest, save_manifest
from exegete.store.shards import ShardBuilder
from exegete.store.stats import save_summary
from exegete.store.store import Store
from exegete.store.values import ENCODING, encode_values
from exegete.streams import stream
from exegete.types import Array

SPREAD = 0.25
"""Standard deviation of the logarithm of an activation around the mean of the clause that matches."""


def plant(
    folder: Path, corpus: Corpus, context: TokenContext, programs: Sequence[Rule], *, name: str, seed: int
) -> Store:
    """Write the store ``name`` of a coder whose latents fire where these programs match, and return it.

    ``context`` holds the rows of the corpus, all of them. An activation is the mean of the most precise clause that
    matches, spread log-normally.
    """
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    builder = ShardBuilder(row_start=0, row_length=corpus.row_length, width=len(programs))
    counts, latents, codes = _fired(context, programs, seed)
    builder.add(counts, latents, codes, np.zeros(0, np.int64))
    begun = _manifest(place, corpus, programs, name, seed)
    n_firings = builder.n_firings
    sha256 = builder.write(place / "shard.bin")
    shard = ShardEntry(
        file="shard.bin",
        row_start=0,
        row_stop=len(corpus),
        latent_start=0,
        latent_stop=len(programs),
        n_positions=context.n_counted,
        n_firings=n_firings,
        tier=0,
        sha256=sha256,
    )
    listed = dataclasses.replace(begun, shards=(shard,))
    save_manifest(place, listed)
    summary, content = Store(place, listed, corpus).scan()
    checksum = save_summary(place, summary)
    save_manifest(place, dataclasses.replace(listed, complete=True, content_hash=content, summary_sha256=checksum))
    return Store.open(place, corpus)


def _fired(context: TokenContext, programs: Sequence[Rule], seed: int) -> tuple[Array, Array, Array]:
    """Return how many latents fire at each position [size], and which, with their values' codes, in that order."""
    places, latents, codes = [], [], []
    for index, program in enumerate(programs):
        at, means = matches(program, context, value="activation")
        spread = stream(seed, "planted", index).normal(0.0, SPREAD, len(at))
        places.append(at)
        latents.append(np.full(len(at), index, np.int32))
        codes.append(encode_values((means * np.exp(spread)).astype(np.float32)))
    place, latent = np.concatenate(places), np.concatenate(latents)
    order = np.lexsort((latent, place))
    return np.bincount(place, minlength=context.size).astype(np.int32), latent[order], np.concatenate(codes)[order]


def _manifest(place: Path, corpus: Corpus, programs: Sequence[Rule], name: str, seed: int) -> StoreManifest:
    return StoreManifest(
        name=name,
        subject="programs over tokens",
        subject_hash="programs",
        tokenizer_hash=str(corpus.manifest.key["tokenizer"]),
        coder_hash=hash_json([[program.to_json() for program in programs], seed]),
        coder_dtype="float32",
        coder="planted",
        corpus_hash=corpus.hash,
        corpus=Path(os.path.relpath(corpus.folder.resolve(), place.resolve())).as_posix(),
        hookpoint=name,
        side="output",
        width=len(programs),
        k=None,
        mask_policy={**corpus.manifest.mask_policy, "sink_norm": 0.0},
        batch_plan={"rows": len(corpus), "row_length": corpus.row_length},
        device="cpu",
        dtype="float32",
        compiled=False,
        threads=1,
        values=ENCODING,
        versions={},
        quality={},
    )

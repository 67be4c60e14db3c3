"""What the kinds of hard negatives of a run are made from: its neighbours, its rules, its text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from exegete.config import Negative, RunConfig
from exegete.errors import InputError
from exegete.examples.proxies import NearMiss, Neighbour, SameToken, Similar
from exegete.examples.proxy import Proxy
from exegete.examples.similar import Embeddings, TextIndex, TfIdf
from exegete.explainers.explainer import explainers
from exegete.files import hash_json
from exegete.rules.language import Rule
from exegete.store.neighbours import Neighbours, cofiring_neighbours, load_neighbours, save_neighbours
from exegete.store.store import Store

if TYPE_CHECKING:
    from pathlib import Path

    from exegete.coders.coder import SparseCoder
    from exegete.results import Results

TFIDF = "tfidf"


def proxies_of(
    store: Store,
    config: RunConfig,
    latents: Sequence[int],
    *,
    rules: Mapping[int, Rule] | None = None,
    embeddings: Path | None = None,
) -> dict[Negative, Proxy]:
    """Return what finds each configured kind of negatives, other than random ones, for some latents of a store.

    ``rules`` are the latents' rules, for near misses; ``embeddings`` is where embeddings of text are kept. Raises
    InputError when a kind lacks what it is made from.
    """
    made: dict[Negative, Proxy] = {}
    for kind in config.examples.negatives:
        if kind == "same_token":
            made[kind] = SameToken()
        elif kind == "neighbour":
            made[kind] = Neighbour(_neighbours(store, config, latents))
        elif kind == "similar":
            made[kind] = Similar(_index(store, config, embeddings))
        elif kind == "near_miss":
            if rules is None:
                raise InputError(
                    f"negatives of the kind near_miss are windows that a latent's rule matches, and no rule of "
                    f"{store.name} is stored; explain with --explainer rule, or run exegete score"
                )
            made[kind] = NearMiss(rules)
    return made


def find_neighbours(
    store: Store, config: RunConfig, latents: Sequence[int], weights: Callable[[], SparseCoder]
) -> None:
    """Find the neighbours that negatives are made from and keep them beside the store, where they are not yet.

    ``weights`` gives the coder, for neighbours by decoder or encoder.
    """
    kind, key = config.examples.neighbours, _key(store, config)
    if "neighbour" not in config.examples.negatives:
        return
    kept = load_neighbours(store.folder, kind, key)
    missing = _missing(kept, latents)
    if not missing:
        return
    if kind == "cofiring":
        found = cofiring_neighbours(store, missing, seed=config.seed)
    else:
        import numpy as np

        from exegete.coders.cosines import cosine_neighbours

        near, cosines = cosine_neighbours(weights(), missing, which=kind)
        found = Neighbours(kind=kind, indices=np.array(missing, np.int64), neighbours=near, similarity=cosines)
    save_neighbours(store.folder, found if kept is None else kept.with_others(found), key)


def rules_in(results: Results, coder: str) -> dict[int, Rule] | None:
    """Return the rules that near misses are of: those of the rule explainer with its own settings.

    None where it has explained no latent of the coder. Rules found with other settings change nothing.
    """
    spec = dict(explainers.from_text("rule").spec)
    found = [e for _, e in sorted(results.explanations(coder=coder).items()) if dict(e.explainer) == spec]
    rules = {e.latent.index: Rule.from_json(e.program) for e in found if e.program is not None}
    return rules if found else None


def _neighbours(store: Store, config: RunConfig, latents: Sequence[int]) -> Neighbours:
    kind = config.examples.neighbours
    kept = load_neighbours(store.folder, kind, _key(store, config))
    missing = _missing(kept, latents)
    if kept is not None and not missing:
        return kept
    if kind == "cofiring":
        found = cofiring_neighbours(store, missing, seed=config.seed)
        return found if kept is None else kept.with_others(found)
    raise InputError(
        f"the {kind} neighbours of these latents of {store.name} were not looked for; exegete score does it, or set "
        "examples.neighbours to cofiring"
    )


def _missing(kept: Neighbours | None, latents: Sequence[int]) -> list[int]:
    """Return the latents whose neighbours are not kept: what was found once stays, however many are added."""
    known = set() if kept is None else set(kept.indices.tolist())
    return [latent for latent in dict.fromkeys(map(int, latents)) if latent not in known]


def _key(store: Store, config: RunConfig) -> str:
    return hash_json({"store": store.manifest.key, "seed": config.seed})


def _index(store: Store, config: RunConfig, embeddings: Path | None) -> TextIndex:
    table = store.corpus.table
    if config.examples.similar == TFIDF:
        return TfIdf(len(table))
    return Embeddings(config.examples.similar, table, embeddings)

"""A run as a folder of EleutherAI's delphi (0.1.3), for its own ``LatentDataset``, scorers and result tables.

::

    latents/HOOKPOINT/FIRST_LAST.safetensors   firings of a range of latents, LAST included; config.json
    explanations/HOOKPOINT_latentINDEX.txt     the explanation as a JSON string
    scores/detection|fuzz/HOOKPOINT_latentINDEX.txt   the judgements of one explanation, a JSON list
    log/hookpoint_firing_counts.pt             firings of every latent
    run_config.json

A file of firings holds ``locations`` [n, 3] (row, position, latent − FIRST), ``activations`` [n] and ``tokens``
[rows, row length], the latter in every file since any may be read first. Firings stand latent by latent in row order;
delphi sorts them so when it reads them. They are 16-bit floats where that is exact, else 32-bit: no value is changed.
delphi knows neither padding nor documents: its windows tile the rows whatever is in them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, final

import numpy as np

from exegete.config import RunConfig
from exegete.errors import InputError, NotFoundError
from exegete.export.delphi_scores import write_findings
from exegete.export.folders import new_folder
from exegete.export.tensor_file import TensorFile
from exegete.files import atomic_file, safe_name, write_json
from exegete.store.reading import latents_at_once, runs
from exegete.types import Array

if TYPE_CHECKING:
    from exegete.runs import Run
    from exegete.store.store import Store

SPLITS = 5
"""Files a hookpoint's latents are divided among, as delphi does by default."""
_FIRINGS = 1 << 20  # firings in memory at once, unless one latent has more
_TOKENS = 1 << 20
_HALF = (-14, 15)  # powers of two at which a firing's 10 bits of mantissa fit a half float exactly
_SMALL = 1 << 16


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A store and the name that delphi knows it by."""

    name: str
    store: Store


def export_delphi(
    run: Run, out: str | Path, *, coders: Sequence[str] | None = None, config: RunConfig | None = None
) -> None:
    """Write a run's firings, explanations and judgements as a folder of delphi, in bounded memory.

    ``coders`` are by default all but the nulls. A coder goes by its hookpoint, or by its own name where another of
    those exported has the same hookpoint. Of a latent with several explanations, the one of the newest explainer that
    was judged is written (or of the newest, where none was), with its judgements by detection and fuzzing. ``config``
    tells the window that was judged, by default the run's own. Raises InputError when ``out`` is not empty, a store is
    unfinished, or there is nothing to export; NotFoundError for an unknown coder.
    """
    settings = run.config if config is None else config
    exported = _named(run, coders)
    with new_folder(Path(out)) as work:
        for one in exported:
            _write_latents(work / "latents" / one.name, one.store)
        _write_counts(work / "log" / "hookpoint_firing_counts.pt", exported)
        scorers = _write_findings(run, work, exported, settings)
        write_json(work / "run_config.json", _run_config(run, exported, settings, scorers))


def _named(run: Run, coders: Sequence[str] | None) -> list[Exported]:
    wanted = [name for name in run.coders() if "@" not in name] if coders is None else list(dict.fromkeys(coders))
    if not wanted:
        raise InputError(f"{run.folder} has no coder to export; collect one, or name them: {', '.join(run.coders())}")
    stores = [run.store(name) for name in wanted]
    for store in stores:
        if not store.manifest.complete:
            raise InputError(f"the store of {store.name} is not finished; go on with: exegete collect, then export")
    shared = Counter(store.manifest.hookpoint for store in stores)
    exported = [
        Exported(name=safe_name(hook if shared[hook := store.manifest.hookpoint] == 1 else store.name), store=store)
        for store in stores
    ]
    twice = [name for name, count in Counter(one.name for one in exported).items() if count > 1]
    if twice:
        raise InputError(f"two coders would both be exported as {twice[0]}; export them one by one with coders=…")
    return exported


def _write_latents(folder: Path, store: Store) -> None:
    """Write all firings of a store, and what delphi asks to know of them."""
    half = _fit_half(store)
    for first, last in _ranges(store.width):
        with atomic_file(folder / f"{first}_{last - 1}.safetensors") as stream:
            _write_range(stream, store, first, last, "<f2" if half else "<f4")
    write_json(folder / "config.json", {**_cache_config(store), "model_name": store.manifest.subject})


def _write_range(stream: BinaryIO, store: Store, first: int, last: int, values: str) -> None:
    rows, length = store.manifest.row_stop, store.row_length
    counts = store.counts[first:last]
    total = int(counts.sum())
    places = "<u2" if max(rows, length, last - first) <= _SMALL else "<u4"
    file = TensorFile(
        stream,
        {
            "locations": (places, (total, 3)),
            "activations": (values, (total,)),
            "tokens": ("<i8", (rows, length)),
        },
    )
    step = max(1, _TOKENS // length)
    for start in range(0, rows, step):
        file.append("tokens", store.corpus.tokens[start : min(start + step, rows)])
    for locations, activations in _firings(store, first, counts):
        file.append("locations", locations)
        file.append("activations", activations)
    file.finish()


def _firings(store: Store, first: int, counts: Array) -> Iterator[tuple[Array, Array]]:
    """Yield locations [n, 3] and values [n] of latents from ``first`` on, some latents at a time."""
    for low, high in runs(counts, _FIRINGS, latents_at_once(store.manifest)):
        block = store.block(first + low, first + high)
        locations: Array = np.empty((int(counts[low:high].sum()), 3), np.int64)
        locations[:, 0] = np.concatenate([one.rows for one in block])
        locations[:, 1] = np.concatenate([one.positions for one in block])
        locations[:, 2] = np.repeat(np.arange(low, high), counts[low:high])
        yield locations, np.concatenate([one.values for one in block])


def _ranges(width: int) -> Iterator[tuple[int, int]]:
    """Divide the latents among files; delphi finds a latent's file only when they follow each other without a gap."""
    splits = min(SPLITS, width)
    for number in range(splits):
        yield number * width // splits, (number + 1) * width // splits


def _fit_half(store: Store) -> bool:
    powers = np.flatnonzero(store.summary.histogram.any(axis=0)) + store.summary.lowest
    return not len(powers) or bool(powers[0] >= _HALF[0] and powers[-1] <= _HALF[1])


def _cache_config(store: Store) -> dict[str, Any]:
    corpus, rows = store.corpus, store.manifest.row_stop
    return {
        "dataset_repo": ", ".join(corpus.config.text),
        "dataset_split": "",
        "dataset_name": "",
        "dataset_column": corpus.config.column,
        "batch_size": int(store.manifest.batch_plan["rows"]),
        "cache_ctx_len": store.row_length,
        "n_tokens": rows * store.row_length,
        "n_splits": min(SPLITS, store.width),
    }


def _write_counts(path: Path, exported: Sequence[Exported]) -> None:
    import torch

    counts = {one.name: torch.from_numpy(one.store.counts.astype(np.int64)) for one in exported}
    with atomic_file(path) as stream:
        torch.save(counts, stream)


def _write_findings(run: Run, work: Path, exported: Sequence[Exported], config: RunConfig) -> list[str]:
    """Write explanations and judgements where there are any; return delphi's names of the scorers that judged."""
    try:
        results = run.results()
    except NotFoundError:
        return []
    found: set[str] = set()
    with results, results.snapshot():
        for one in exported:
            found |= write_findings(results, work, one.name, one.store, config.examples.window)
    return sorted(found)


def _run_config(run: Run, exported: Sequence[Exported], config: RunConfig, scorers: Sequence[str]) -> dict[str, Any]:
    examples = config.examples
    return {
        "name": run.folder.name,
        "model": exported[0].store.manifest.subject,
        "sparse_model": ", ".join(one.store.name for one in exported),
        "hookpoints": [one.name for one in exported],
        "scorers": list(scorers),
        "explainer_model": config.llm.llm,
        "seed": config.seed,
        "cache_cfg": _cache_config(exported[0].store),
        "constructor_cfg": {"example_ctx_len": examples.window, "n_non_activating": examples.n_negatives},
        "sampler_cfg": {"n_examples_train": examples.n_train, "n_examples_test": examples.n_test},
    }

"""Export a small made-up run to delphi's format and write down what delphi reads of it, as a fixture for the tests.

    .venv/bin/python tests/oracles/write_delphi.py .bench/delphi/bin/python

``read.npz`` and ``read.json`` are what delphi's own classes read (``read_delphi.py``); ``exported.json`` the checksums
of the very files that they read, which a test compares with those of the same run exported anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np

from exegete.config import CorpusConfig, ExampleConfig, RunConfig
from exegete.export import export_delphi
from exegete.files import write_json, write_text
from exegete.results import Results
from exegete.runs import Run, open_run
from exegete.scorers.scorer import Scoring
from exegete.store.corpus import Corpus, TextDocument, build_corpus
from exegete.store.manifest import ShardEntry, StoreManifest, save_manifest
from exegete.store.shards import ShardBuilder
from exegete.store.stats import save_summary
from exegete.store.store import Store
from exegete.store.values import ENCODING, decode_values, encode_values
from exegete.tokens import TokenTable
from exegete.types import Array, Explanation, Judgement, LatentId

HERE = Path(__file__).resolve().parents[1] / "fixtures" / "delphi"
WIDTH, LENGTH, WINDOW = 12, 32, 8
SILENT = (2, 3)  # all latents of the second file


@final
class LetterTokenizer:
    """One token per character."""

    is_fast = False
    bos_token_id = 0

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(c) for c in text] for text in texts]}

    def get_vocab(self) -> dict[str, int]:
        return {}


def build_run(folder: Path) -> Run:
    """Make a run of two coders: ``layers.0`` with values that half floats hold, ``other`` at layers.1 with others."""
    letters = np.random.default_rng(7).integers(97, 123, (9, 100))
    texts = ["".join(map(chr, row[: 40 + 7 * i])) for i, row in enumerate(letters)]
    documents = [TextDocument(key=str(i), text=text) for i, text in enumerate(texts)]
    table = TokenTable([bytes([i]) for i in range(128)], special=[0])
    settings = CorpusConfig(text=("made up",), row_length=LENGTH)
    corpus = build_corpus(folder / "corpus", documents, LetterTokenizer(), settings, table=table)
    save_store(folder / "store" / "layers.0", corpus, "layers.0", made_up(corpus, 1, spread=2.0))
    save_store(folder / "store" / "other", corpus, "layers.1", made_up(corpus, 2, spread=7.0))
    config = RunConfig(
        subject="toy", coder=("a",), corpus=settings, examples=ExampleConfig(window=WINDOW), explainer="default"
    )
    write_text(folder / "config.yaml", config.to_yaml())
    write_json(folder / "manifest.json", {"format": 1})
    run = open_run(folder)
    with Results.open(folder / "results.db") as results:
        judge(results, run.store("layers.0"), (0, 5))
    return run


def made_up(corpus: Corpus, seed: int, *, spread: float) -> Array:
    """Return dense values [rows, LENGTH, WIDTH] that a store holds exactly; the latents ``SILENT`` never fire."""
    rng = np.random.default_rng(seed)
    values = np.exp2(rng.normal(0, spread, (len(corpus), LENGTH, WIDTH))).astype(np.float32)
    values = decode_values(encode_values(values.reshape(-1))).reshape(values.shape)
    keep = corpus.rows(slice(None)).mask[:, :, None] & (rng.random(values.shape) < 0.2)
    keep[:, :, SILENT] = False
    result: Array = np.where(keep, values, np.float32(0))
    return result


def save_store(folder: Path, corpus: Corpus, hookpoint: str, dense: Array, *, complete: bool = True) -> Store:
    """Write a store of two shards."""
    mask, entries, cut = corpus.rows(slice(None)).mask, [], len(dense) // 3
    for start, stop in ((0, cut), (cut, len(dense))):
        builder = ShardBuilder(row_start=start, row_length=LENGTH, width=WIDTH)
        part = dense[start:stop].reshape(-1, WIDTH)
        at, latents = np.nonzero(part)
        builder.add((part > 0).sum(axis=1), latents, encode_values(part[at, latents]))
        name = f"{start}.bin"
        sha256 = builder.write(folder / name)
        rows: dict[str, Any] = {"row_start": start, "row_stop": stop, "n_positions": int(mask[start:stop].sum())}
        latent = {"latent_start": 0, "latent_stop": WIDTH, "n_firings": builder.n_firings}
        entries.append(ShardEntry(file=name, **rows, **latent, tier=0, sha256=sha256))
    manifest = StoreManifest(
        name=folder.name,
        subject="toy",
        subject_hash="s",
        tokenizer_hash="t",
        coder_hash="c",
        coder_dtype="float32",
        coder="topk",
        corpus_hash=corpus.hash,
        corpus="../../corpus",
        hookpoint=hookpoint,
        side="output",
        width=WIDTH,
        k=None,
        mask_policy=corpus.manifest.mask_policy,
        batch_plan={"rows": 1, "row_length": LENGTH},
        device="cpu",
        dtype="float32",
        compiled=False,
        threads=1,
        values=ENCODING,
        versions={},
        quality={},
        shards=tuple(entries),
    )
    if complete:
        summary, content = Store(folder, manifest, corpus).scan()
        sha256 = save_summary(folder, summary)
        manifest = dataclasses.replace(manifest, complete=True, content_hash=content, summary_sha256=sha256 or "")
    save_manifest(folder, manifest)
    return Store.open(folder)


def judge(results: Results, store: Store, indices: Sequence[int]) -> None:
    """Store explanations of some latents, and judgements of windows of theirs, some wrong and one that failed."""
    for index in indices:
        latent = LatentId(coder=store.name, index=index)
        text = f"fires on “letter” {index}\n<<a>>"
        explanation = Explanation(latent=latent, text=text, status="ok", explainer={"name": "default", "args": {}})
        number = results.add_explanation(explanation, "explain")
        for scorer in ("detection", "fuzzing"):
            judged = tuple(judgements(store, index, wrong=3 if scorer == "detection" else 4))
            scoring = Scoring(
                explanation=explanation, scores=(), judgements={"none": judged, "other_latent": judged[:2]}
            )
            results.add_scoring(scoring, f"score {scorer}", number, scorer=scorer)
    refused = LatentId(coder=store.name, index=7)
    results.add_explanation(
        Explanation(latent=refused, text=None, status="refused", explainer={"name": "default", "args": {}}), "explain"
    )


def judgements(store: Store, index: int, *, wrong: int) -> list[Judgement]:
    """Judge the first window of every row; every so-many-th verdict is wrong, the fifth has failed."""
    firings = store.firings(index)
    fires = {(int(r), int(p)) for r, p in zip(firings.rows, firings.positions, strict=True)}
    found = []
    for row in range(len(store.corpus)):
        truth = any((row, 1 + at) in fires for at in range(WINDOW))
        failed = row == 4
        found.append(
            Judgement(
                row=row,
                start=1,
                document=row,
                stratum=f"decile_{row % 10}" if truth else "silent",
                truth=truth,
                prediction=None if failed else truth != (row % wrong == 0),
                probability=None if failed else (0.25 + row / 100 if truth else 0.3),
                status="failed" if failed else "ok",
            )
        )
    return found


def hashes(folder: Path) -> dict[str, str]:
    """Return the checksum of every exported file but the counts, whose bytes are torch's affair."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pt")
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> None:
    """Export, have delphi read it, write down the checksums."""
    HERE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as base:
        out = Path(base) / "exported"
        export_delphi(build_run(Path(base) / "run"), out)
        reader = Path(__file__).with_name("read_delphi.py")
        subprocess.run([sys.argv[1], str(reader), str(out), str(HERE)], check=True)
        write_json(HERE / "exported.json", hashes(out))
    files = sorted(path for path in HERE.iterdir() if path.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (HERE / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()

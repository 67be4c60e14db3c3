"""Which documents are for learning and which for judging: decided by a hash, before anything else is drawn."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np

from exegete.errors import InputError
from exegete.store.duplicates import cluster_counts, document_clusters
from exegete.types import SPLITS, Array, Rows, Split

MIN_DOCUMENTS: Final = 20
"""With fewer documents a hash would leave the split to chance; contiguous blocks of rows are cut instead."""

CODES: Final[dict[Split, int]] = {split: code for code, split in enumerate(SPLITS)}
"""How a segment's split is written in an array: train 0, validation 1, test 2."""

GAP: Final = -1
"""Code of a segment that belongs to no split."""


class DocumentLike(Protocol):
    """What splitting needs to know of a document."""

    @property
    @abstractmethod
    def key(self) -> str:
        """The document's name, which never changes."""

    @property
    @abstractmethod
    def split(self) -> Split | None:
        """The split that the source fixed, or None."""


class CorpusLike(Protocol):
    """What splitting needs to know of a corpus."""

    @property
    @abstractmethod
    def documents(self) -> Sequence[DocumentLike]:
        """All documents."""

    @property
    @abstractmethod
    def segments(self) -> Array:
        """Row, start, stop and document of every run of one document's tokens in a row, int64 [n_segments, 4].

        Sorted by row and start; every row holds at least one, and a document's segments follow one another.
        """

    @abstractmethod
    def rows(self, index: slice, /) -> Rows:
        """Return rows with the document of every token and which of them count."""


def split_documents(
    keys: Sequence[str],
    fixed: Sequence[Split | None],
    *,
    seed: int,
    test_share: float,
    clusters: Array | None = None,
) -> list[Split | None]:
    """Return the split of each document; it depends on the seed and the document's own key alone.

    A document whose source fixed its split keeps it. With fewer than 20 documents the others get None: their rows are
    cut into blocks by ``split_segments``. ``clusters`` [n] names the cluster of near-duplicates of each document: those
    of one go where its smallest key goes, or where the source put one of them (of several splits the first of train,
    validation and test). Raises InputError when ``test_share`` does not lie between 0 and 1.
    """
    if not 0.0 < test_share < 1.0:
        raise InputError(f"test_share lies between 0 and 1, got {test_share}")
    if len(keys) != len(fixed):
        raise InputError(f"every document has a key and a fixed split or None, got {len(keys)} and {len(fixed)}")
    if clusters is not None and len(clusters) != len(keys):
        raise InputError(f"every document has a key and a cluster, got {len(keys)} and {len(clusters)}")
    owners = range(len(keys)) if clusters is None else clusters.tolist()
    named: dict[int, str] = {}
    decided: dict[int, Split] = {}
    for owner, key, known in zip(owners, keys, fixed, strict=True):
        named[owner] = min(key, named.get(owner, key))
        if known is not None:
            decided[owner] = min(known, decided.get(owner, known), key=SPLITS.index)
    if len(keys) >= MIN_DOCUMENTS:
        for owner, key in named.items():
            decided.setdefault(owner, "test" if _uniform(seed, key) < test_share else "train")
    return [decided.get(owner) if known is None else known for owner, known in zip(owners, fixed, strict=True)]


def split_segments(corpus: CorpusLike, *, seed: int, test_share: float, duplicates: float = 0.8) -> Array:
    """Return the split of every segment, int8 [n_segments]: 0 train, 1 validation, 2 test, −1 none (the gap).

    All segments of a document share its split, so a row that holds several documents may hold text of several splits.
    Only with fewer than 20 documents are the rows of those that no source fixed cut into two contiguous blocks, one
    row left out between them; the seed says which end is the test block. All such text of one row lies in one block.

    Documents that have at least the share ``duplicates`` of their token 5-grams in common, and chains of such, are
    never in two splits: they follow what the source fixed of one, or share the draw of the smallest key. Where the
    source, or the cut of few documents, put near-duplicates in several splits, those in the first of train, validation
    and test stay and the others are in none. ``duplicates`` = 0 lets every document go its own way.

    Raises InputError when train or test would be empty, or ``duplicates`` is neither 0 nor between 0.5 and 1.
    """
    documents = corpus.documents
    clusters = document_clusters(corpus, duplicates)
    keys, fixed = [d.key for d in documents], [d.split for d in documents]
    splits = split_documents(keys, fixed, seed=seed, test_share=test_share, clusters=clusters)
    codes = np.array([GAP if split is None else CODES[split] for split in splits], dtype=np.int8)
    rows, owners = np.asarray(corpus.segments[:, 0]), np.asarray(corpus.segments[:, 3])
    segments: Array = codes[owners]
    undecided = np.flatnonzero(segments == GAP)
    cut, place = np.unique(rows[undecided], return_inverse=True)
    segments[undecided] = _blocks(len(cut), seed=seed, test_share=test_share)[place]
    segments = _apart(segments, owners, clusters)
    for split in ("train", "test"):
        if not (segments == CODES[split]).any():
            largest = cluster_counts(clusters).largest
            alike = (
                f", {largest} of them near-duplicates of one another (see examples.duplicates)" if largest > 1 else ""
            )
            raise InputError(
                f"no row is left for the {split} split of {len(documents)} documents in {len(np.unique(rows))} rows"
                f"{alike}; give more text, another test_share than {test_share}, or another seed"
            )
    return segments


def _apart(segments: Array, owners: Array, clusters: Array) -> Array:
    """Return the codes of segments [n] with those in the gap whose document has near-duplicates in an earlier split.

    A document without near-duplicates may lie in several splits: the rows of few documents are cut.
    """
    sizes = np.bincount(clusters, minlength=len(clusters))
    cluster = clusters[owners]
    here = segments != GAP
    first = np.full(len(clusters), len(SPLITS), dtype=np.int8)
    np.minimum.at(first, cluster[here], segments[here])
    late = here & (sizes[cluster] > 1) & (segments > first[cluster])
    return np.where(late, np.int8(GAP), segments)


def _blocks(n: int, *, seed: int, test_share: float) -> Array:
    """Return codes of n contiguous rows: a train block, one row of gap, and a test block, in an order the seed draws.

    Fewer than three rows cannot be cut and are all for training.
    """
    codes = np.full(n, CODES["train"], dtype=np.int8)
    if n < 3:
        return codes
    n_test = min(max(round((n - 1) * test_share), 1), n - 2)
    codes[n - n_test :] = CODES["test"]
    codes[n - n_test - 1] = GAP
    return codes if _uniform(seed, "which end is the test block") < 0.5 else codes[::-1].copy()


def _uniform(seed: int, key: str) -> float:
    """Return a number in [0, 1) that is a hash of the seed and the key."""
    digest = hashlib.blake2b(f"{seed}|split|{key}".encode("utf-8", errors="surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2.0**53

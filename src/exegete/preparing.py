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
    from exegete.store.corpus import TextDocument
    from exegete.subjects import Subject
    from exegete.types import Rows


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

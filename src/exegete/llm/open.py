"""The one place where the name of a language model becomes a client with everything around it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from exegete.errors import ConfigError, InputError
from exegete.llm.backend import Backend
from exegete.llm.calling import Caller
from exegete.llm.client import LLMClient
from exegete.llm.limits import Breaker, Limits
from exegete.llm.openai_endpoint import FORMS, Endpoint, parse_spec

if TYPE_CHECKING:
    from exegete.config import LLMConfig
    from exegete.llm.replies import ReplyCache
    from exegete.llm.spending import Spending

LEDGER = "ledger.db"


def client_from_spec(
    spec: str, config: LLMConfig, *, folder: Path | None = None, cache: Path | None = None
) -> LLMClient | None:
    """Return the client of a language model named on the command line; None for ``none``.

    What is spent stands in the ledger of ``folder``, a run's, or in memory without one; replies are kept in the file
    ``cache``, or where all runs keep theirs. Nothing is sent, and nothing loaded, before ``check``, ``capabilities`` or
    ``reply``; ``close`` gives back connections, ``end`` the files.

    Raises InputError on an unknown form, a missing key, a missing extra, or a budget in dollars for a model without a
    known price.
    """
    if spec == "none":
        return None
    if spec.partition(":")[0] == "simulated":
        return _simulated(spec, folder)
    backend = _backend(spec, config, folder)
    spending = _spending(spec, config, folder)
    return Caller(
        backend,
        limits=Limits.none() if backend.unlimited else _limits(config),
        retries=config.retries,
        replies=_replies(config, cache),
        spending=spending,
        temperature=config.temperature,
    )


def _simulated(spec: str, folder: Path | None) -> LLMClient:
    """Return a judge that asks nobody; it reads what tokens stand for from the run's corpus when first asked."""
    from exegete.llm.scripted import simulated_from_spec
    from exegete.tokens import TokenTable

    def table() -> TokenTable:
        if folder is None:
            raise InputError(f"{spec} judges by the tokens of a run; it needs a run folder")
        from exegete.store.corpus import open_corpus

        return open_corpus(folder / "corpus").table

    return simulated_from_spec(spec, table)


def _replies(config: LLMConfig, path: Path | None) -> ReplyCache | None:
    if not config.reply_cache:
        return None
    from exegete.llm.replies import ReplyCache

    return ReplyCache(path, max_bytes=config.cache_bytes, max_days=config.cache_days)


def _limits(config: LLMConfig) -> Limits:
    return Limits(
        config.concurrency,
        requests_per_minute=config.requests_per_minute,
        tokens_per_minute=config.tokens_per_minute,
        breaker=Breaker(),
    )


def _backend(spec: str, config: LLMConfig, folder: Path | None) -> Backend:
    service, _, model = spec.partition("/")
    if service in ("hf", "vllm"):
        if not model:
            raise InputError(f"{spec!r} names no model; write {FORMS}")
        if config.batch:
            raise ConfigError(f"llm.batch sends files to a server; {spec} runs in this process")
        if service == "hf":
            from exegete.llm.local import TransformersBackend

            return TransformersBackend(model)
        from exegete.llm.vllm_local import VLLMBackend

        return VLLMBackend(model)
    endpoint = parse_spec(spec)
    assert endpoint is not None
    return _batches(endpoint, config, folder) if config.batch else _online(endpoint, config)


def _online(endpoint: Endpoint, config: LLMConfig) -> Backend:
    from exegete.llm.openai_api import OpenAIBackend

    return OpenAIBackend(endpoint, timeout=config.timeout, connections=config.concurrency)


def _batches(endpoint: Endpoint, config: LLMConfig, folder: Path | None) -> Backend:
    from exegete.llm.batches import BatchBackend

    return BatchBackend(endpoint, timeout=config.timeout, folder=folder)


def _spending(spec: str, config: LLMConfig, folder: Path | None) -> Spending:
    from exegete.llm.prices import load_prices
    from exegete.llm.spending import Spending

    return Spending(
        ":memory:" if folder is None else folder / LEDGER,
        model=spec,
        price=load_prices(config.prices).price_of(spec),
        batch=config.batch,
        budget=config.budget,
        budget_tokens=config.budget_tokens,
    )

"""The one place where the name of a language model that reads becomes a reader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from exegete.errors import ConfigError, InputError
from exegete.llm.backend import Capabilities
from exegete.llm.client import LLMClient, run_to_end
from exegete.llm.identity import IN_PROCESS, is_demo_hash
from exegete.llm.openai_endpoint import parse_spec
from exegete.llm.reader import Reader

if TYPE_CHECKING:
    from exegete.config import LLMConfig
    from exegete.subjects import Subject

FORMS = "subject, hf/MODEL, URL#MODEL, or auto"


def reader_from_spec(
    spec: str,
    config: LLMConfig,
    *,
    subject: Callable[[], Subject] | None = None,
    llm: LLMClient | None = None,
    folder: Path | None = None,
) -> Reader:
    """Return what reads log probabilities, by its name on the command line.

    ``subject`` is the subject's own model, which the callable loads; ``hf/MODEL`` another model of this process;
    ``URL#MODEL`` (or ``vllm/MODEL``, ``openai/MODEL`` …) a model that gives the log probabilities of a prompt's tokens;
    ``auto`` the run's ``llm`` where it was seen to give them, else the subject. A server is asked what it can do; what
    is spent on one of its own stands in the ledger of ``folder``.

    Raises ConfigError for an unknown form and for a subject that is not there, InputError or LLMError when the model
    cannot be loaded or reached, or gives no log probabilities of prompts.
    """
    if spec == "auto":
        return _chosen(subject, llm)
    if spec == "subject":
        return _of_subject(subject, spec)
    if llm is not None and spec == llm.name:  # loaded, limited and counted already
        return _of_client(llm)
    service, _, model = spec.partition("/")
    if service == "hf" and model:
        return _of_model(spec, model)
    return _of_server(spec, config, folder)


def check_reader(spec: str) -> None:
    """Raise InputError where a reader's name is of no known form; nothing is loaded or asked."""
    service, _, model = spec.partition("/")
    if spec in ("auto", "subject") or (service in ("hf", "vllm") and model) or spec.partition(":")[0] == "simulated":
        return
    if service not in ("http:", "https:", "openai", "openrouter"):
        raise ConfigError(f"unknown reader {spec!r}; it is {FORMS}")
    parse_spec(spec)


def reader_name(spec: str, llm: LLMClient | None) -> str:
    """Return the name of the model that reads: for ``auto`` that of the language model, or ``subject``.

    A server is then asked what it can do, as ``reader_from_spec`` does; models of this process can all read, and are
    not loaded to say so.
    """
    if spec != "auto":
        return spec
    return llm.name if llm is not None and not llm.simulated and _reads(llm) else "subject"


def _chosen(subject: Callable[[], Subject] | None, llm: LLMClient | None) -> Reader:
    from exegete.llm.reading_server import ServerReader

    if llm is not None and reader_name("auto", llm) == llm.name:
        return ServerReader(llm, natural=llm.natural)
    return _of_subject(subject, "auto")


def _of_subject(subject: Callable[[], Subject] | None, spec: str) -> Reader:
    if subject is None:
        raise ConfigError(f"reader {spec!r} reads with the subject, and there is none here; name another model")
    return subject_reader(subject())


def subject_reader(subject: Subject, *, name: str = "subject") -> Reader:
    """Return a loaded subject as a reader; one made by this project was not trained on natural language."""
    from exegete.llm.reading_local import LocalReader

    return LocalReader(
        subject.model,
        subject.tokenizer,
        name=name,
        natural=not _is_demo(subject),
        table=subject.token_table(),
    )


def _is_demo(subject: Subject) -> bool:
    """Tell whether a subject is the demo's, read Python only, wherever it lies, or has its weights drawn again."""
    return "@randomised" in subject.name or is_demo_hash(subject.hash)


def _of_model(spec: str, model: str) -> Reader:
    from exegete.subjects import load_subject

    return subject_reader(load_subject(model), name=spec)


def _of_server(spec: str, config: LLMConfig, folder: Path | None) -> Reader:
    from exegete.llm.open import client_from_spec

    client = client_from_spec(spec, config, folder=folder)
    if client is None:
        raise ConfigError(f"no language model is no reader; reader is {FORMS}")
    return _of_client(client)


def _of_client(client: LLMClient) -> Reader:
    from exegete.llm.reading_server import ServerReader

    if not _capabilities(client).prompt_logprobs:
        raise InputError(
            f"{client.name} gives no log probabilities of a prompt's tokens, so it cannot read; use a server that "
            "does (vLLM, llama.cpp), or reader subject"
        )
    return ServerReader(client, natural=client.natural)


def _reads(client: LLMClient) -> bool:
    return client.name.partition("/")[0] in IN_PROCESS or _capabilities(client).prompt_logprobs


def _capabilities(client: LLMClient) -> Capabilities:
    async def ask() -> Capabilities:
        try:
            return await client.capabilities()
        finally:
            await client.close()

    return run_to_end(ask)

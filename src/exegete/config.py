"""What a run is told to do: defaults < YAML file < environment (endpoints, keys) < command line.

Every field's docstring is its help text on the command line. API keys are read from the environment when a call is
made and are never part of a configuration, so they cannot be saved.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

import yaml

from exegete.errors import ConfigError, NotFoundError, unknown
from exegete.files import hash_json

Strategy = Literal["top", "random", "quantiles", "bins", "mix", "importance", "diverse"]
TestStrategy = Literal["quantiles", "bins", "random", "importance"]
Negative = Literal["near_miss", "same_token", "neighbour", "similar", "random"]
Control = Literal["other_latent", "shuffled_words", "empty"]
WHOLE = ("all", "none")
"""What may stand alone where a list of named choices is wanted."""
NEGATIVES: tuple[Negative, ...] = typing.get_args(Negative)
"""Kinds of silent windows; a window of several kinds is of the first of them."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusConfig:
    """Which text, and how it becomes token rows."""

    text: tuple[str, ...] = ()
    """Where text comes from, one or more of: files, folders and globs (.jsonl and .ndjson, one document a line; .txt,
    .md and source files, one document each; these also as .gz, .bz2 or .xz; .parquet; .npy with token ids), "stdlib"
    (the running interpreter's standard library), or hf:ORG/NAME[:CONFIG][@SPLIT] (a Hugging Face dataset, streamed; or
    hf:FOLDER for one on disk). WEIGHT*SOURCE, say 0.7*hf:org/name, mixes sources by their share of bytes; without
    weights they are read one after another."""
    column: str = "text"
    """Column of a .jsonl, .parquet or hf: source that holds the text, a list of token ids, or with chat the
    messages."""
    row_length: int = 256
    """Tokens in a row, BOS included."""
    max_tokens: int | None = None
    """Stop after this many tokens of text."""
    shuffle_buffer: int | None = None
    """Shuffle documents through a buffer of this many; by default they come in order."""
    shuffle_seed: int = 0
    """Seed of that shuffling."""
    bos: Literal["row", "document", "none"] = "row"
    """Put the tokenizer's BOS token, if it has one, before every row, before every document, or nowhere."""
    packing: bool = False
    """Fill rows with several documents instead of beginning each document in a row of its own."""
    separator: Literal["none", "eos"] = "none"
    """What stands between documents packed into one row: nothing, or the tokenizer's EOS token (never counted)."""
    attend: Literal["row", "document"] = "row"
    """What a packed document sees: everything before it in its row, or itself alone."""
    chat: Literal["none", "all", "assistant"] = "none"
    """Read the column as a conversation (a list of role and content, or from and value) and render it with the
    tokenizer's chat template; firings count at all its tokens, or at those of the assistant's messages alone. Names of
    special tokens in a message stay text: an invisible U+2060 is put after their first character."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(CorpusConfig)
        for name in ("bos", "separator", "attend", "chat"):
            _convert(hints[name], getattr(self, name), f"corpus.{name}")
        for name, least in {"row_length": 2, "max_tokens": 1, "shuffle_buffer": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"setting 'corpus.{name}' is too small; it must be at least {least}, got {value}")
        if not self.column:
            raise ConfigError("setting 'corpus.column' is empty; name the column that holds the text")
        if self.separator == "eos" and not self.packing:
            raise ConfigError("setting 'corpus.separator' stands between packed documents; set corpus.packing too")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CollectConfig:
    """How firings are computed and stored."""

    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto."""
    device_map: str | None = None
    """Spread a subject larger than one GPU over several devices: auto, balanced, sequential (needs accelerate)."""
    dtype: str = "auto"
    """Data type of the subject: float32, bfloat16, float16, or auto (float32 on a CPU)."""
    coder_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type that coders compute in."""
    compile: bool = False
    """Compile the subject's layers with torch.compile: slower to start, faster on long runs."""
    batch_tokens: int | None = None
    """Tokens in a forward pass; part of the batch plan, so it belongs to the store's identity. By default 8192 on a
    CPU and the fastest that fits on a GPU, found once and written down before the first shard."""
    sink_norm: float = 10.0
    """Positions whose activation is longer than this many times the median norm at the hookpoint (attention sinks) do
    not count; 0 lets all count."""
    other_model: bool = False
    """Allow a coder whose files name another base model than the subject, such as one made for a model that the
    subject is a fine-tune of."""
    shard_bytes: int = 1 << 26
    """Memory for a shard under construction, for each coder; 16 bytes a firing."""
    shard_rows: int | None = None
    """End shards after this many rows instead."""
    workers: int | None = None
    """Processes that collect disjoint rows: by default one, or one for each GPU when the device is cuda."""
    threads: int | None = None
    """CPU threads, all by default; workers of one run pin the same number."""
    remote_code: bool = False
    """Run Python code that a model's repository brings."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleConfig:
    """Which windows are shown to explainers and judged by scorers."""

    window: int = 32
    """Tokens in a window."""
    strategy: Strategy = "quantiles"
    """How firing train windows are drawn: top, random, quantiles (equal parts of ten deciles of rank), bins (equal
    parts of ten equally wide bins of value), mix (half top, half quantiles), importance (with probability proportional
    to the activation), or diverse (the strongest, then each time the one least like those taken)."""
    test_strategy: TestStrategy = "quantiles"
    """How firing test windows are drawn: quantiles, bins, random or importance."""
    centred: bool = False
    """Centre train windows on a firing instead of taking them from the frame; test windows always come from the
    frame."""
    keep_bos: bool = False
    """Let a window begin with the special tokens (BOS) that stand before its text."""
    n_train: int = 40
    """Firing train windows shown to an explainer."""
    n_test: int = 100
    """Firing test windows judged."""
    n_negatives: int = 100
    """Silent test windows judged."""
    negatives: tuple[Negative, ...] = ("random",)
    """Kinds of silent test windows, judged in equal parts: near_miss (the latent's best rule matches), same_token
    (holds a token that the latent fires on), neighbour (a neighbouring latent fires), similar (its text is like that of
    firing windows), random (all others). The whole test frame is divided among them, and a window of several kinds is
    of the first in this order, so that scores can be reweighted to all silent windows."""
    neighbours: Literal["cofiring", "decoder", "encoder"] = "cofiring"
    """What makes latents neighbours: firing at the same places, or like decoder or encoder directions."""
    similar: str = "tfidf"
    """What finds similar text: tfidf, or the name or folder of a sentence-transformers model."""
    silent: Literal["window", "document"] = "window"
    """Where a latent must not fire for a window to count as silent."""
    duplicates: float = 0.8
    """Near-duplicates have at least this share of their token n-grams in common (Jaccard): documents stay on one side
    of the split, and one window stands for all its near-duplicates. 0 keeps everything apart."""
    min_train: int = 10
    """A latent with fewer firing train windows is skipped."""
    min_test: int = 10
    """A latent with fewer firing test windows is skipped."""
    test_share: float = 0.4
    """Share of documents in the test split, unless the corpus fixes the split itself."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LatentConfig:
    """Which latents are interpreted."""

    count: int | None = 300
    """How many latents of each coder: a seeded uniform draw from all alive ones, fixed before explaining."""
    null_count: int | None = None
    """How many latents of each coder of a null (random_coder, random_subject); by default as many as of the others."""
    indices: tuple[int, ...] = ()
    """Exactly these latents instead."""
    min_rate: float = 1e-4
    """A latent is alive when it fires at least this often per token (10 in 100k)."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreConfig:
    """How explanations are scored. Whatever of it a scorer knows as an argument, its own argument overrides."""

    controls: tuple[Control, ...] = ("other_latent",)
    """Nulls judged beside every explanation: other_latent (explanations of other latents that fire about as often),
    shuffled_words (its own words in another order), empty (no explanation). all for these, none for no null."""
    reader: str = "auto"
    """Language model whose log probabilities surprisal and intervention read: subject (the model looked into),
    URL#MODEL (a server that gives those of prompts), hf/MODEL, or auto (--llm where it gives them, else subject)."""
    embedder: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Sentence-transformers model of the embedding scorers: a name or a folder."""
    near: int = 4
    """Nearest explained latents that an explanation is told apart from (discrimination)."""
    certify: float | None = None
    """Ask only until it is decided whether balanced accuracy is at least this, or at most this less the margin."""
    margin: float = 0.15
    """Between what --certify tells apart."""
    stop_when: float | None = None
    """Ask only until the interval of balanced accuracy is at most this wide to either side."""

    def __post_init__(self) -> None:
        if len(set(self.controls)) < len(self.controls):
            raise ConfigError(f"setting 'scoring.controls' names each null once, got {list(self.controls)}")
        if self.near < 1:
            raise ConfigError(f"setting 'scoring.near' is too small; it must be at least 1, got {self.near}")
        if self.certify is not None and not 0.5 <= self.certify - self.margin < self.certify < 1:
            raise ConfigError(
                f"setting 'scoring.certify' less 'scoring.margin' is at least 0.5, and both lie below 1, got "
                f"{self.certify} and {self.margin}"
            )
        if self.stop_when is not None and not 0 < self.stop_when < 0.5:
            raise ConfigError(f"setting 'scoring.stop_when' lies between 0 and 0.5, got {self.stop_when}")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LLMConfig:
    """Which language model explains and judges, and how hard it may be asked."""

    llm: str = "none"
    """URL#MODEL of an OpenAI-compatible server, openai/MODEL, openrouter/ORG/MODEL, vllm/MODEL or hf/MODEL (in this
    process), simulated[:tpr=0.9,fpr=0.1] (a judge that runs rules and errs at known rates, to try the pipeline), or
    none (rules only)."""
    concurrency: int = 32
    """Most requests under way at once; how many are is found out as it goes."""
    timeout: float = 120.0
    """Seconds before a request counts as failed."""
    retries: int = 5
    """How often a request is tried again when the server is busy, hangs or breaks off."""
    requests_per_minute: int | None = None
    """Most requests a minute."""
    tokens_per_minute: int | None = None
    """Most tokens a minute, prompt and reply together."""
    temperature: float = 0.0
    """Sampling temperature of explainer and judge."""
    budget: float | None = None
    """Most dollars this run may spend on the language model, in all its commands together; never exceeded."""
    budget_tokens: int | None = None
    """Most tokens this run may spend, prompt and reply together."""
    tokenizer: str | None = None
    """Folder or hub id of the model's tokenizer, for exact counts of prompt tokens; hf/ and vllm/ bring their own."""
    prices: str | None = None
    """YAML file of prices laid over the ones that are known: MODEL: {input, cached, output} in dollars a million
    tokens."""
    reply_cache: bool = True
    """Keep replies, shared between runs, so that none is paid for twice."""
    cache_days: float | None = None
    """Forget replies that were not used for so many days."""
    cache_bytes: int = 8 << 30
    """Most bytes of kept replies; the longest unused go first."""
    batch: bool = False
    """Send requests as batch files (half the price, answered within a day)."""

    def __post_init__(self) -> None:
        for name, least in {
            "concurrency": 1, "retries": 0, "requests_per_minute": 1, "tokens_per_minute": 1, "budget_tokens": 1,
            "cache_bytes": 1,
        }.items():  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"setting 'llm.{name}' is too small; it must be at least {least}, got {value}")
        for name in ("timeout", "budget", "cache_days"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"setting 'llm.{name}' is a positive number, got {value}")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"setting 'llm.temperature' is at least 0, got {self.temperature}")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """One run: subject, coders, and the settings of each stage."""

    subject: str = ""
    """Hugging Face model: a hub id or a local folder."""
    coder: tuple[str, ...] = ()
    """Coders: a folder or hub id with an optional :SUB, saelens:RELEASE:ID, or made for the subject at --hookpoints:
    neurons[:k=N], pca:components=N, directions:FILE, random:ARCHITECTURE,width=N. NAME= before one names it."""
    hookpoints: tuple[str, ...] = ()
    """Hookpoints to read a coder repository at (globs allowed); by default all that the repository holds."""
    explainer: str = "rule"
    """rule (no LLM), or default (an LLM reads train windows). Arguments follow a colon: default:n_examples=20."""
    scorers: tuple[str, ...] = ("detection", "fuzzing")
    """Scorers to run on every explanation: detection, fuzzing, execution (of rules), discrimination, surprisal,
    embedding, example_embedding, simulation, intruder, generation, intervention. Arguments follow a colon:
    fuzzing:kind=active,per_request=1."""
    nulls: tuple[str, ...] = ()
    """Controls that collect anew: random_coder (an untrained coder of the same width and k), random_subject (the same
    coders on the subject with every weight drawn anew, norms kept)."""
    donors: int = 5
    """How many other latents' explanations make up the null of each score."""
    seed: int = 0
    """Seed of every random choice; the stream of a latent and stage depends on nothing else."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    collect: CollectConfig = field(default_factory=CollectConfig)
    examples: ExampleConfig = field(default_factory=ExampleConfig)
    latents: LatentConfig = field(default_factory=LatentConfig)
    scoring: ScoreConfig = field(default_factory=ScoreConfig)
    llm: LLMConfig = field(default_factory=LLMConfig)

    def __post_init__(self) -> None:
        _check(self)

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain data that ``from_dict`` turns back into an equal configuration."""
        return typing.cast(dict[str, Any], _plain(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunConfig:
        """Build a configuration from nested data. Raises ConfigError on unknown fields or wrong types."""
        return typing.cast(RunConfig, _build(cls, data, ""))

    @classmethod
    def from_yaml(cls, path: Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
        """Read a YAML file, then lay ``overrides`` (nested, as in ``to_dict``) over it."""
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except FileNotFoundError:
            raise NotFoundError(f"there is no configuration file {path}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            detail = " ".join(str(error).split())
            raise ConfigError(f"{path} is not valid YAML: {detail}") from error
        if not isinstance(data, Mapping):
            raise ConfigError(f"{path} holds {type(data).__name__}, not settings; write lines of the form name: value")
        return cls.from_dict(merge(data, overrides or {}))

    def to_yaml(self) -> str:
        """Return the YAML text of ``config.yaml`` in a run folder."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    @property
    def hash(self) -> str:
        """Identity of the settings."""
        return hash_json(self.to_dict())


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings with those of ``over`` laid over ``base``."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _build(kind: type[Any], data: Mapping[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{where}{key}"
        if key not in known:
            raise ConfigError(str(unknown("setting", name, [f"{where}{k}" for k in known])))
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise ConfigError(f"setting {name!r} is a group of settings, got {value!r}")
            values[key] = _build(typing.cast(type[Any], hint), value, f"{name}.")
        else:
            values[key] = _convert(hint, value, name)
    return kind(**values)


def _convert(hint: Any, value: Any, name: str) -> Any:
    """Return a value as its declared type, or raise ConfigError saying what is allowed."""
    origin = typing.get_origin(hint)
    if origin is types.UnionType:
        if value is None:
            return None
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
        origin = typing.get_origin(hint)
    if origin is Literal:
        allowed = typing.get_args(hint)
        if value not in allowed:
            raise ConfigError(f"setting {name!r} is one of {', '.join(map(repr, allowed))}, got {value!r}")
        return value
    if origin is tuple:
        inner = typing.get_args(hint)[0]
        items = [value] if isinstance(value, str | int) else value
        if not isinstance(items, list | tuple):
            raise ConfigError(f"setting {name!r} is a list, got {value!r}")
        if typing.get_origin(inner) is Literal and any(item in WHOLE for item in items):
            if len(items) > 1:
                raise ConfigError(f"setting {name!r} is all or none, each alone, or a list of names; got {list(items)}")
            return typing.get_args(inner) if items[0] == "all" else ()
        return tuple(_convert(inner, item, name) for item in items)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"setting {name!r} is of type {hint.__name__}, got {value!r}")
    return value


def _check_collect(collect: CollectConfig) -> None:
    if not 0 <= collect.sink_norm < math.inf:
        raise ConfigError(f"collect.sink_norm is a multiple of the median norm, or 0 for none, got {collect.sink_norm}")
    if collect.workers is not None and collect.workers > 1:
        if collect.device_map is not None:
            raise ConfigError(
                "collect.workers copies the subject into each process, collect.device_map spreads it over "
                "all devices; give one of them"
            )
        if collect.device.startswith("cuda:"):
            raise ConfigError(f"collect.workers take one GPU each; give collect.device cuda, not {collect.device}")


def _check_examples(examples: ExampleConfig) -> None:
    if not 0 < examples.test_share < 1:
        raise ConfigError(f"examples.test_share lies between 0 and 1, got {examples.test_share}")
    if not (examples.duplicates == 0 or 0.5 <= examples.duplicates <= 1):
        raise ConfigError(f"examples.duplicates lies between 0.5 and 1, or is 0 for none, got {examples.duplicates}")
    if not examples.negatives or len(set(examples.negatives)) < len(examples.negatives):
        raise ConfigError(f"examples.negatives names each kind once, at least one, got {list(examples.negatives)}")
    if examples.n_negatives < len(examples.negatives):
        raise ConfigError(
            f"examples.n_negatives is at least 1 for each kind of examples.negatives, got {examples.n_negatives} for "
            f"{len(examples.negatives)}"
        )
    if not examples.similar:
        raise ConfigError("examples.similar is empty; write tfidf, or a sentence-transformers model")


def _check(config: RunConfig) -> None:
    positive = {
        "collect.batch_tokens": 1 if config.collect.batch_tokens is None else config.collect.batch_tokens,
        "collect.shard_bytes": config.collect.shard_bytes >> 10,
        "collect.workers": 1 if config.collect.workers is None else config.collect.workers,
        "collect.threads": 1 if config.collect.threads is None else config.collect.threads,
        "collect.shard_rows": 1 if config.collect.shard_rows is None else config.collect.shard_rows,
        "examples.window": config.examples.window,
        "examples.n_train": config.examples.n_train,
        "examples.n_test": config.examples.n_test,
        "examples.n_negatives": config.examples.n_negatives,
        "donors": config.donors,
    }
    for name, value in positive.items():
        if value < 1:
            raise ConfigError(f"setting {name!r} is too small; it must be at least 1")
    if config.examples.window >= config.corpus.row_length:
        raise ConfigError(
            f"examples.window ({config.examples.window}) must be smaller than corpus.row_length "
            f"({config.corpus.row_length})"
        )
    _check_collect(config.collect)
    _check_examples(config.examples)
    for null in config.nulls:
        if null not in ("random_coder", "random_subject"):
            raise ConfigError(f"setting 'nulls' knows random_coder and random_subject, got {null!r}")

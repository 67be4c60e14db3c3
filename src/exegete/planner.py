"""Plans: what a run still costs where its firings are collected, and an estimate before that."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import numpy as np

from exegete.config import RunConfig
from exegete.donors import choose_donors, choose_near
from exegete.explainers.explainer import Explainer, explainers
from exegete.keys import Keys, key_of
from exegete.llm.identity import IN_PROCESS
from exegete.llm.reading_server import STAGE as READING
from exegete.llm.reading_server import ServerReader
from exegete.planning import (
    BYTES_PER_TOKEN,
    EXPLANATION_TOKENS,
    SCORES,
    Asked,
    CountingClient,
    CountPrompt,
    CountTokens,
    Plan,
    StagePlan,
    count_bytes,
    count_parts,
    judged_share,
    sample,
)
from exegete.runs import Run, drawn
from exegete.scorers.judged import JudgedScorer
from exegete.scorers.scorer import Scorer, make_scorer, scorers
from exegete.scorers.sequential import Stopping, Tested
from exegete.scoring import near_of
from exegete.tokens import TokenTable
from exegete.types import Example, ExampleSet, Explanation, Firings, LatentId, LLMRequest, Rows, Split
from exegete.views import Donor, LatentView, Near, SplitData

if TYPE_CHECKING:
    from exegete.results import Results

_FIRING_BYTES = 4  # of a stored firing, see docs/stores.md
_MANY = 100  # latents among which none lacks donors
_IN_PROCESS = {"rule": "by the rule, executed", "subject": "by the subject, in this process"}
_MADE_UP = 4  # latents whose requests are counted where nothing is collected
_WORD = "abcdefghijklmnopqrstuvwxyz"


def plan(config: RunConfig, run: Run | None = None) -> Plan:
    """Return what a run will ask of its language model, and what collecting will take where it is not done.

    With a collected ``run`` the requests of a sample of its own latents are counted; else those of made-up windows of
    the configured size, for as many latents as are asked for. Raises InputError when the language model's name or its
    prices are not understood; nothing is sent.
    """
    from exegete.llm.prices import load_prices
    from exegete.llm.reading import check_reader

    made = [make_scorer(name, config) for name in config.scorers]
    if any("reader" in scorer.needs for scorer in made):
        check_reader(config.scoring.reader)
    spec = config.llm.llm
    price = None if spec == "none" else load_prices(config.llm.prices).price_of(spec)
    count, count_prompt, exact = _counter(config)
    length, remark = _explanation_tokens(run, count)
    client = CountingClient(spec, config.llm.temperature, count, count_prompt, length)
    remarks = [remark]
    if not exact:
        remarks.append(f"tokens are estimated at {BYTES_PER_TOKEN:g} bytes each; for exact counts give --llm-tokenizer")
    collected = run is not None and bool(run.coders())
    stages: Sequence[StagePlan] = ()
    if spec != "none":
        stages = _of_run(run, config, client) if run is not None and collected else _of_config(config, client)
        if not collected:
            remarks.append("nothing is collected yet: the windows are made up, and all latents are taken to be alive")
        remarks += _remarks(stages, made)
    return Plan(
        model=spec,
        stages=tuple(stages),
        exact=exact,
        price=price,
        collect={} if collected else _collecting(config),
        remarks=tuple(remarks) if spec != "none" else (),
    )


def _remarks(stages: Sequence[StagePlan], made: Sequence[Scorer]) -> list[str]:
    """Return what else the figures rest on."""
    found = []
    if any(stage.expected is not None for stage in stages):
        found.append(
            f"where judging stops early, at most what the budget allows is asked; expected is for balanced accuracies "
            f"like the paper's, Beta({SCORES[0]:g}, {SCORES[1]:g})"
        )
    if any(dict(s.spec["args"]).get("how") == "auto" for s in made if s.spec["name"] == "simulation"):
        found.append(
            "simulation is counted as one reply of JSON a window; where the server gives log probabilities of prompts "
            "it is as with how=all_at_once"
        )
    return found


def _counter(config: RunConfig) -> tuple[CountTokens, CountPrompt, bool]:
    """Return what counts the tokens of a text and of a request, and whether it is by the model's own tokenizer."""
    name = config.llm.tokenizer
    service, _, model = config.llm.llm.partition("/")
    if name is None and service in ("hf", "vllm"):
        name = model
    if name is None:
        return count_bytes, lambda request: count_parts(request, count_bytes), False
    from exegete.llm.tokenised import prompt_ids
    from exegete.subjects import load_tokenizer

    tokenizer = load_tokenizer(name)

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    def count_prompt(request: LLMRequest) -> int:
        if request.messages and not tokenizer.chat_template:
            return count_parts(request, count)
        return len(prompt_ids(tokenizer, request, config.llm.llm))

    return count, count_prompt, True


def _explanation_tokens(run: Run | None, count: CountTokens) -> tuple[int, str]:
    """Return how long explanations are taken to be, and on what ground."""
    texts: list[str] = []
    if run is not None and (run.folder / "results.db").is_file():
        results = run.results()
        try:
            texts = [e.text for e in results.explanations().values() if e.text and e.program is None]
        finally:
            results.close()
    if not texts:
        return EXPLANATION_TOKENS, f"explanations are taken to be {EXPLANATION_TOKENS} tokens long"
    mean = max(1, round(sum(map(count, texts)) / len(texts)))
    return mean, f"explanations are taken to be {mean} tokens long, as the {len(texts)} that there are"


def _of_run(run: Run, config: RunConfig, client: CountingClient) -> list[StagePlan]:
    results = run.results() if (run.folder / "results.db").is_file() else None
    try:
        stages = [stage for coder in run.coders() for stage in _of_coder(run, coder, config, client, results)]
    finally:
        if results is not None:
            results.close()
    return [stage for stage in stages if stage.left]


def _of_coder(
    run: Run, coder: str, config: RunConfig, client: CountingClient, results: Results | None
) -> Iterator[StagePlan]:
    """Yield the stages of one coder, each counted on a sample of the latents that are left for it."""
    keys, chosen = Keys(run, config), drawn(run.store(coder), coder, config)
    shown: dict[tuple[int, ...], list[LatentView]] = {}

    def views(left: Sequence[int]) -> tuple[list[LatentView], int]:
        some = tuple(sample(left))
        if some not in shown:
            shown[some] = _views(run, coder, some, config, client)
        return shown[some], len(some)

    done = _done(results, coder, key_of(keys.explain(coder, client)), failed=False)
    left = [i for i in chosen if i not in done]
    explainer = explainers.from_text(config.explainer)
    yield _explaining(coder, explainer, *views(left), len(chosen), len(left), client)
    key = keys.explained(coder, client, results)
    known = {} if results is None else results.explanations(coder=coder, key=key)
    usable = {e.latent.index: e for e in known.values() if e.status == "ok"}
    done = _done(results, coder, key, failed=False)
    without = {*sample(left)} - {view.latent.index for view in views(left)[0]}  # too few windows
    # What is skipped or unparsed is never scored.
    judged = [i for i in chosen if i in usable or (i not in done and i not in without)]
    donors = _n_donors(run, coder, judged, config.donors)
    near = _near(
        run, coder, [usable.get(i) or _planned(LatentId(coder=coder, index=i), client) for i in judged[:_MANY]], config
    )
    for name in config.scorers:
        reader = config.scoring.reader  # nobody is asked here whether it can read
        readers = ("subject", client.name) if reader == "auto" else (reader,)
        specs = [keys.score(name, client, key, among={*usable, *judged}, reader=who) for who in readers]
        done = {index for spec in specs for index in _done(results, coder, key_of(spec))}
        left = [i for i in judged if i not in done]
        some, sampled = views(left)
        items = [
            (e, _beside(v, donors[v.latent.index], e, config, near.get(v.latent, ())))
            for e, v in _explained(some, usable, client)
        ]
        yield _scoring(coder, name, config, items, sampled, len(chosen), len(left), client)


def _n_donors(run: Run, coder: str, judged: Sequence[int], wanted: int) -> Mapping[int, int]:
    """Return how many explanations of other latents each latent is judged by; among many there are always enough."""
    if len(judged) > _MANY:
        return dict.fromkeys(judged, wanted)
    those = [
        Explanation(latent=LatentId(coder=coder, index=index), text="", status="ok", explainer={"name": "planned"})
        for index in judged
    ]
    chosen = choose_donors(run.store(coder), those, count=wanted)
    return {latent.index: len(donors) for latent, donors in chosen.items()}


def _near(run: Run, coder: str, those: Sequence[Explanation], config: RunConfig) -> Mapping[LatentId, tuple[Near, ...]]:
    """Return the nearest of some latents, where a scorer takes them; among more latents there are nearer ones."""
    wanted = max((near_of(make_scorer(name, config)) for name in config.scorers), default=0)
    return choose_near(run.store(coder), those, count=wanted) if wanted and those else {}


def _done(results: Results | None, coder: str, key: str, *, failed: bool = True) -> set[int]:
    done = set() if results is None else results.done(key, failed=failed)
    return {latent.index for latent in done if latent.coder == coder}


def _explained(
    views: Sequence[LatentView], known: Mapping[int, Explanation], client: CountingClient
) -> Iterator[tuple[Explanation, LatentView]]:
    for view in views:
        yield known.get(view.latent.index) or _planned(view.latent, client), view


def _views(run: Run, coder: str, indices: Sequence[int], config: RunConfig, client: CountingClient) -> list[LatentView]:
    sets = [found for found in run.preview(coder, indices, config) if isinstance(found, ExampleSet)]
    data = run.data(coder, config)
    return [LatentView(latent=s.latent, tokens=data.tokens, examples=s, data=data, llm=client) for s in sets]


def _explaining(
    coder: str,
    explainer: Explainer,
    views: Sequence[LatentView],
    sampled: int,
    latents: int,
    left: int,
    client: CountingClient,
) -> StagePlan:
    client.begin()
    asks = "llm" in explainer.needs
    if asks:
        for _ in explainer.explain(views, concurrency=1):
            pass
    asked = _scaled(client, left, sampled)
    return StagePlan(
        coder=coder, stage="explain", latents=latents, left=left, asked=asked, by="" if asks else "in this process"
    )


def _scoring(
    coder: str,
    name: str,
    config: RunConfig,
    items: Sequence[tuple[Explanation, LatentView]],
    sampled: int,
    latents: int,
    left: int,
    client: CountingClient,
) -> StagePlan:
    client.begin()
    scorer = make_scorer(name, config)
    served = any(view.reader is not None for _, view in items) and "reader" in scorer.needs
    asked = [(e, v) for e, v in items if served or scorer.asks(v)]
    planned = {view.latent: scorer.planned(explanation, view) for explanation, view in asked}
    counted = [item for item in asked if planned[item[1].latent] is None]
    whole, stopping = _judging_all(scorer)
    if counted and not scorer.needs & {"subject", "coder"}:
        for _ in whole.score(counted, concurrency=1):
            pass
    client.count_all([request for requests in planned.values() for request in requests or ()])
    found = _scaled(client, left, sampled)
    expected = None
    if stopping is not None and counted:
        most, share = _judged_share(scorer, stopping, [view for _, view in counted])
        found, expected = found.times(most), found.times(share)
    read = READING in client.asked
    return StagePlan(
        coder=coder,
        stage=name,
        latents=latents,
        left=left,
        asked=found,
        by=_answered_by(scorer, config, client, read=read),
        elsewhere=read and len(client.asked) == 1 and config.scoring.reader != client.name,
        expected=expected,
    )


def _judging_all(scorer: Scorer) -> tuple[Scorer, Stopping | None]:
    """Return a scorer that judges every window, and when the given one stops before that; None where it does not."""
    args = dict(scorer.spec["args"])
    if not isinstance(scorer, JudgedScorer) or (args["certify"] is None and args["stop_when"] is None):
        return scorer, None
    stopping = Stopping(certify=args["certify"], margin=args["margin"], stop_when=args["stop_when"])
    return scorers.make(scorer.spec["name"], {**args, "certify": None, "stop_when": None}), stopping


def _judged_share(scorer: Scorer, stopping: Stopping, views: Sequence[LatentView]) -> tuple[float, float]:
    assert isinstance(scorer, JudgedScorer)
    tested = [Tested(seed=v.examples.seed, latent=v.latent, windows=scorer.units(v).tested) for v in views]
    return judged_share(stopping, tested, int(scorer.spec["args"]["per_request"]))


def _answered_by(scorer: Scorer, config: RunConfig, client: CountingClient, *, read: bool) -> str:
    """Return who answers where it is not the language model; ``read`` says that what a reader reads is counted."""
    judge, reader = scorer.judged_by(client), config.scoring.reader
    if judge == client.name:
        return ""
    if judge != "reader":
        return _IN_PROCESS.get(judge, "by the embedder, in this process")
    if reader == "auto" and client.name.startswith("http"):
        return "by the language model where it gives log probabilities of prompts (--reader), else by the subject"
    if reader == "auto" and client.name.partition("/")[0] in IN_PROCESS:  # which always give them
        return "by the language model, in this process"
    if reader.partition("/")[0] in ("auto", "subject", "hf"):
        return f"by {'the subject' if reader in ('auto', 'subject') else reader}, in this process"
    return f"by {reader}" if read else f"by {reader}, requests not counted"


def _scaled(client: CountingClient, left: int, sampled: int) -> Asked:
    whole = Asked()
    for asked in client.asked.values():
        whole = whole.plus(asked)
    return whole.times(left / sampled if sampled else 0.0)


def _planned(latent: LatentId, client: CountingClient) -> Explanation:
    return Explanation(latent=latent, text=client.explanation, status="ok", explainer={"name": "planned"})


def _beside(
    view: LatentView, n: int, explanation: Explanation, config: RunConfig, near: tuple[Near, ...]
) -> LatentView:
    """Return a view with as many donors as there will be, near latents, and the reader where it is a server."""
    donors = tuple(Donor(explanation=explanation, rank=rank) for rank in range(n))
    served = config.scoring.reader.partition("/")[0] not in ("auto", "subject", "hf")
    reader = ServerReader(view.require_llm()) if served else None
    return dataclasses.replace(view, donors=donors, near=near, reader=reader)


def _of_config(config: RunConfig, client: CountingClient) -> list[StagePlan]:
    """Plan for latents of made-up text."""
    coders = _coder_names(config)
    stages = []
    views = [_made_up(config, client, number) for number in range(_MADE_UP)]
    explainer = explainers.from_text(config.explainer)
    near = max((near_of(make_scorer(name, config)) for name in config.scorers), default=0)
    for coder, wanted in coders.items():
        donors = min(config.donors, max(0, wanted - 1))
        items = [
            (e, _beside(v, donors, e, config, tuple(Near(explanation=e, similarity=0.5) for _ in range(near))))
            for e, v in _explained(views, {}, client)
        ]
        stages.append(_explaining(coder, explainer, views, _MADE_UP, wanted, wanted, client))
        for name in config.scorers:
            stages.append(_scoring(coder, name, config, items, _MADE_UP, wanted, wanted, client))
    return [stage for stage in stages if stage.left]


def _coder_names(config: RunConfig) -> dict[str, int]:
    """Return the coders that will be interpreted, and how many latents of each; sizes from settings and headers."""
    known = {info["name"]: info["width"] for info in _inspected(config)}
    found: dict[str, int] = {}
    for name, width in known.items():
        count = len(config.latents.indices) or config.latents.count or width
        found[name] = min(count, width) if width else count
        nulls = config.latents.null_count or found[name]
        found |= {f"{name}@{null.replace('_', '-')}": nulls for null in config.nulls}
    return found


def _inspected(config: RunConfig) -> list[dict[str, Any]]:
    """Return name, width and k (0 where not known) of the configured coders, without their weights."""
    from exegete.coders.builtin import named_builtin
    from exegete.coders.load import CoderSpec, inspect_coders

    found: list[dict[str, Any]] = []
    for text in config.coder:
        given, builtin = named_builtin(text)
        if builtin is not None:
            places = config.hookpoints or ("the subject",)
            found.extend({"name": f"{given or builtin.kind} at {place}", "width": 0, "k": 0} for place in places)
            continue
        spec = CoderSpec.parse(text)
        for info in inspect_coders(text, config.hookpoints):
            name = spec.name or info.hookpoint or info.path
            found.append({"name": name, "width": info.width or 0, "k": info.k or 0})
    return found


def _collecting(config: RunConfig) -> dict[str, Any]:
    """Return what collecting will take, as far as it can be known without reading text or weights."""
    tokens = config.corpus.max_tokens
    infos = _inspected(config)
    if tokens is None:
        return {"collect": f"all of the text, {len(infos)} coders"}
    passes = 1 + ("random_subject" in config.nulls)
    firing = sum(info["k"] for info in infos) * (1 + len(config.nulls))
    disk = f"{tokens * firing * _FIRING_BYTES / 1e9:.2f} GB of firings" if firing else "size on disk not known before"
    return {"collect": f"{tokens:,} tokens, {passes} pass(es) through the subject, {len(infos)} coder(s), {disk}"}


def _made_up(config: RunConfig, client: CountingClient, number: int) -> LatentView:
    """Return a latent with as many windows as are asked for, of words of four bytes."""
    rng = np.random.default_rng(number)
    words = ["".join(rng.choice(list(_WORD), 3)) for _ in range(512)]
    table = TokenTable([f" {word}".encode() for word in words])
    wanted, window = config.examples, config.examples.window
    parts: tuple[tuple[Split, bool, int], ...] = (
        ("train", True, wanted.n_train),
        ("test", True, wanted.n_test),
        ("test", False, wanted.n_negatives),
    )
    examples: list[Example] = []
    for split, fires, n in parts:
        for _ in range(n):
            activations = np.zeros(window, np.float32)
            if fires:
                activations[rng.integers(window)] = 1.0
            examples.append(
                Example(
                    split=split,
                    fires=fires,
                    stratum="decile_0" if fires else "silent",
                    row=len(examples),
                    start=0,
                    tokens=rng.integers(len(words), size=window).astype(np.uint32),
                    activations=activations,
                    document=len(examples),
                    inclusion_probability=1.0,
                )
            )
    latent = LatentId(coder="made-up", index=number)
    made = ExampleSet(
        latent=latent, examples=tuple(examples), maximum=1.0, firing_rate=0.5, frame=len(examples), seed=0, table=table
    )
    return LatentView(latent=latent, tokens=table, examples=made, data=_MadeUp(table, window), llm=client)


@final
class _MadeUp(SplitData):
    """No rows, in which nothing fires."""

    def __init__(self, table: TokenTable, length: int) -> None:
        self._table, self._length = table, length

    @property
    def tokens(self) -> TokenTable:
        """The table of the made-up words."""
        return self._table

    def rows(self, split: Split) -> Rows:
        """Return no rows, whatever the split."""
        none = np.zeros((0, self._length), np.int32)
        return Rows(tokens=none.astype(np.uint32), documents=none, mask=none.astype(bool))

    def firings(self, indices: Sequence[int], split: Split) -> list[Firings]:
        """Return no firings for each latent."""
        none = np.zeros(0, np.int64)
        return [
            Firings(
                latent=LatentId(coder="made-up", index=index),
                rows=none,
                positions=none.astype(np.int32),
                values=none.astype(np.float32),
            )
            for index in indices
        ]

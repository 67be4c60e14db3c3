from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from exegete.coders.activations import TopK
from exegete.coders.coder import SparseCoder
from exegete.coders.linear import LinearCoder
from exegete.errors import ConfigError, InputError
from exegete.llm.reader import Reader
from exegete.llm.scripted import ScriptedClient
from exegete.rules.language import Clause, Rule, StateIs, TokenAt
from exegete.scorers.intervention import InterventionScorer
from exegete.scorers.intervention_effects import STEPS, Effects
from exegete.scorers.intervention_measuring import token_set
from exegete.scorers.intervention_prompts import draw_prompts
from exegete.scorers.intervention_retest import icc, reliability
from exegete.scorers.intervention_scores import mean_by_document
from exegete.scorers.scorer import Scoring, scorers
from exegete.subjects import Subject, load_subject
from exegete.subjects.continuing import Prompts
from exegete.subjects.edits import EditLatent, edited
from exegete.testing import toy_llama, toy_subject_model
from exegete.types import Array, ExampleSet, Explanation, Firings, LatentId, Rows, Score, Split
from exegete.views import Donor, LatentView, SplitData

TOKEN = 120  # what latent 0 pushes
SMALL: dict[str, Any] = {
    "n_score": 12,
    "n_explain": 6,
    "context": 8,
    "targets": "0.1+0.5",
    "headline": 0.5,
    "retest": 0,
}


class ToyData(SplitData):
    """Rows of random tokens, and where a coder's latents fire in them."""

    def __init__(self, subject: Subject, coder: SparseCoder) -> None:
        self._table = subject.token_table()
        draw = torch.Generator().manual_seed(0)
        self._rows: dict[Split, Rows] = {}
        self._values: dict[Split, Array] = {}
        for number, split in enumerate(("train", "validation", "test")):
            tokens = torch.randint(1, 300, (30, 24), generator=draw)
            tokens[:, 0] = 0
            documents = np.repeat(np.arange(30, dtype=np.int32)[:, None] + 100 * number, 24, axis=1)
            self._rows[split] = Rows(tokens=tokens.numpy().astype(np.uint32), documents=documents, mask=documents >= 0)  # type: ignore[index]
            x = subject.capture(tokens, None, [coder.point])[coder.point].reshape(-1, coder.d_in)
            code = coder.encode(x)
            dense = torch.zeros(len(x), coder.width).scatter_add_(1, code.indices, code.values).reshape(30, 24, -1)
            dense[:, 0] = 0
            self._values[split] = dense.numpy()  # type: ignore[index]

    @property
    def tokens(self) -> Any:
        return self._table

    def rows(self, split: Split) -> Rows:
        return self._rows[split]

    def firings(self, indices: Sequence[int], split: Split) -> list[Firings]:
        found = []
        for index in indices:
            rows, positions = np.nonzero(self._values[split][:, :, index] > 0)
            found.append(
                Firings(
                    latent=LatentId(coder="c", index=index),
                    rows=rows,
                    positions=positions.astype(np.int32),
                    values=self._values[split][rows, positions, index],
                )
            )
        return found


def planted(subject: Subject, hookpoint: str, **options: Any) -> LinearCoder:
    """A coder whose latent 0 writes the unembedding of TOKEN into the residual stream."""
    draw = torch.Generator().manual_seed(0)
    encoder, decoder = (torch.randn(24, 32, generator=draw) for _ in range(2))
    decoder[0] = subject.model.get_output_embeddings().weight[TOKEN].float() * 5
    return LinearCoder(
        name="c",
        hookpoint=hookpoint,
        encoder=encoder,
        encoder_bias=torch.zeros(24),
        decoder=decoder,
        decoder_bias=torch.zeros(32),
        activation=TopK(4),
        **options,
    )


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return load_subject(str(toy_llama(tmp_path_factory.mktemp("model") / "toy")), device="cpu")


@pytest.fixture(scope="module")
def coder(subject: Subject) -> LinearCoder:
    return planted(subject, "layers.2")


@pytest.fixture(scope="module")
def data(subject: Subject, coder: LinearCoder) -> ToyData:
    return ToyData(subject, coder)


class CountingReader(Reader):
    """Log p grows with the letters e in what came before; some beginnings cannot be read."""

    def __init__(self, unread: str | None = None, *, natural: bool = True) -> None:
        self.calls: list[list[tuple[str, str]]] = []
        self.closed = 0
        self._unread, self._natural = unread, natural

    @property
    def name(self) -> str:
        return "counting"

    @property
    def natural(self) -> bool:
        return self._natural

    async def logprobs(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        self.calls.append(list(pairs))
        return [None if self._unread is not None and self._unread in b else nats(b, c) for b, c in pairs]

    async def close(self) -> None:
        self.closed += 1


def nats(beginning: str, continuation: str) -> float:
    return 0.25 * beginning.count("e") * len(continuation) - 3.0


def rule(*tokens: int, offset: int = 0, negated: bool = False) -> Any:
    return Rule((Clause((TokenAt(offset, tokens, negated), StateIs("bracket")), 0.9, 1.0),)).to_json()


def explanation(index: int = 0, *tokens: int, text: str = "the text ' fox'") -> Explanation:
    return Explanation(
        latent=LatentId(coder="c", index=index),
        text=text,
        status="ok",
        explainer={"name": "rule", "args": {}},
        program=rule(*tokens) if tokens else None,
    )


def view(data: SplitData, subject: Subject, coder: SparseCoder, index: int = 0, **options: Any) -> LatentView:
    latent = LatentId(coder="c", index=index)
    examples = ExampleSet(latent=latent, examples=(), maximum=9.0, firing_rate=0.1, frame=100, seed=0)
    made: dict[str, Any] = {"subject": subject, "coder": coder, **options}
    return LatentView(latent=latent, tokens=data.tokens, examples=examples, data=data, **made)


def donors(*explanations: Explanation) -> tuple[Donor, ...]:
    return tuple(Donor(explanation=e, rank=i) for i, e in enumerate(explanations))


def run(scorer: InterventionScorer, *items: tuple[Explanation, LatentView]) -> Scoring:
    found = list(scorer.score(items))
    assert len(found) == len(items)
    return found[0]


def table(scoring: Scoring) -> dict[tuple[str, str], Score]:
    return {(s.metric, s.control): s for s in scoring.scores}


# -- tokens -----------------------------------------------------------------------------------------------------------


def test_tokens_score_what_the_edit_makes_likelier(subject: Subject, coder: LinearCoder, data: ToyData) -> None:
    given = view(data, subject, coder, donors=donors(explanation(5, 33), explanation(6, 34, 35), explanation(7)))
    scoring = run(InterventionScorer(kind="tokens", **SMALL), (explanation(0, TOKEN, 9), given))
    found = table(scoring)
    assert scoring.scores[0].metric == "mass_kl_0.5"
    assert set(found) == {
        (f"mass_{name}{lift}", control)
        for name in ("kl_0.1", "kl_0.5")
        for control in ("none", "random_direction", "other_latent")
        for lift in ("", "_lift")
        if (lift, control) != ("_lift", "none")
    }
    assert found["mass_kl_0.5", "none"].low > 0.1
    assert found["mass_kl_0.5_lift", "random_direction"].low > 0.1
    assert abs(found["mass_kl_0.5", "other_latent"].value) < 0.05
    assert all(s.scorer == "intervention_tokens" and s.n_total == s.n_scored == 12 for s in scoring.scores)
    assert {j.status for j in scoring.judgements["none"]} == {"ok"}

    prompts = draw_prompts(given, "test", 12, context=8, bos=0)
    assert [(j.row, j.start) for j in scoring.judgements["none"]] == [(p.row, p.position) for p in prompts]
    for name, at in (("kl_0.1", 0.1), ("kl_0.5", 0.5)):
        strength = scoring.detail["strengths"][name]["strength"]
        gains, random, kls = [], [], []
        for prompt in prompts:  # by hand: whole passes, one prompt at a time
            ids = torch.tensor([prompt.tokens])
            with torch.no_grad():
                clean = subject.model(ids).logits[0, -1].double().softmax(-1)
                with edited(subject, [EditLatent(coder, 0, strength=strength)], slice(len(prompt.tokens) - 1, None)):
                    after = subject.model(ids).logits[0, -1].double().softmax(-1)
            gains.append(float((after - clean)[[TOKEN, 9]].sum()))
            random.append(float((after - clean)[33] + (after - clean)[[34, 35]].sum()) / 2)
            kls.append(stats.entropy(clean.numpy(), after.numpy()))
        assert found[f"mass_{name}", "none"].value == pytest.approx(np.mean(gains), abs=1e-5)
        assert found[f"mass_{name}", "other_latent"].value == pytest.approx(np.mean(random), abs=1e-5)
        assert scoring.detail["strengths"][name]["kl"] == pytest.approx(np.mean(kls), rel=1e-3)
        assert np.mean(kls) == pytest.approx(at, rel=0.1)
        assert scoring.detail["random_direction"][name]["kl"] == pytest.approx(at, rel=0.1)
        lift = found[f"mass_{name}_lift", "random_direction"].value
        both = found[f"mass_{name}", "none"].value - found[f"mass_{name}", "random_direction"].value
        assert lift == pytest.approx(both)


def test_boosted_tokens_are_found_on_other_prompts(subject: Subject, coder: LinearCoder, data: ToyData) -> None:
    scorer = InterventionScorer(kind="tokens", explain="effect", n_tokens=1, **SMALL)
    scoring = run(scorer, (explanation(0), view(data, subject, coder)))
    assert scorer.label == "intervention_tokens_effect"
    assert scoring.detail["boosted"][0][0] == data.tokens.texts[TOKEN]
    own = run(InterventionScorer(kind="tokens", **SMALL), (explanation(0, TOKEN), view(data, subject, coder)))
    assert scoring.scores[0].value == pytest.approx(own.scores[0].value)


def test_an_explanation_without_tokens_has_no_score(subject: Subject, coder: LinearCoder, data: ToyData) -> None:
    scoring = run(InterventionScorer(kind="tokens", **SMALL), (explanation(0), view(data, subject, coder)))
    assert scoring.scores == ()
    assert "names no tokens" in scoring.reason


def test_token_sets_are_those_of_the_token_itself() -> None:
    clauses = (
        Clause((TokenAt(0, (7, 3)), StateIs("bracket")), 0.9, 1.0),
        Clause((TokenAt(1, (11,)), TokenAt(0, (3, 12))), 0.9, 1.0),
        Clause((TokenAt(0, (99,), negated=True),), 0.9, 1.0),
    )
    assert token_set(replace(explanation(), program=Rule(clauses).to_json())) == (3, 7, 12)
    assert token_set(explanation()) == ()


@pytest.mark.parametrize("edit", ["clamp", "ablate"])
def test_other_edits_are_scored_at_the_divergence_they_have(
    edit: Any, subject: Subject, coder: LinearCoder, data: ToyData
) -> None:
    scorer = InterventionScorer(kind="tokens", edit=edit, **SMALL)
    index = 0 if edit == "ablate" else 2  # to clamp latent 0 to any value changes more
    scoring = run(scorer, (explanation(index, TOKEN), view(data, subject, coder, index)))
    found = table(scoring)
    assert scorer.label == f"intervention_tokens_{edit}"
    if edit == "clamp":
        kl = scoring.detail["strengths"]["kl_0.5"]
        assert kl["kl"] == pytest.approx(0.5, rel=0.1)
        assert found["mass_kl_0.5", "none"].n_scored == 12
        return
    assert {metric for metric, _ in found} == {"mass_ablate", "mass_ablate_lift"}
    assert found["mass_ablate", "none"].value < 0  # its own token becomes less likely
    own, random = (scoring.detail[name]["ablate"]["kl"] for name in ("strengths", "random_direction"))
    assert random == pytest.approx(own, rel=0.1)


@pytest.mark.parametrize("how", ["mamba", "transcoder", "layer norm"])
def test_recurrent_subjects_and_other_coders_are_scored(how: str, subject: Subject, tmp_path: Path) -> None:
    mine = load_subject(str(toy_subject_model("mamba", tmp_path / "m")), device="cpu") if how == "mamba" else subject
    options: dict[str, Any] = {"layer norm": {"input_norm": "layer_norm"}}.get(how, {})
    if how == "transcoder":
        options = {"side": "input", "target": ("layers.2.mlp", "output")}
    coder = planted(mine, "layers.2.mlp" if how == "transcoder" else "layers.2", **options)
    data = ToyData(mine, coder)
    scoring = run(InterventionScorer(kind="tokens", **SMALL), (explanation(0, TOKEN), view(data, mine, coder)))
    assert [m["strength"] is not None for m in scoring.detail["strengths"].values()] == [True, True]
    found = table(scoring)
    assert found["mass_kl_0.5_lift", "random_direction"].value > 0.05


# -- reader -----------------------------------------------------------------------------------------------------------


def test_nats_are_what_the_explanation_gains_after_edited_text(
    subject: Subject, coder: LinearCoder, data: ToyData
) -> None:
    reader = CountingReader()
    others = donors(explanation(5, text="one"), explanation(6, text="another"))
    given = view(data, subject, coder, donors=others, reader=reader)
    scoring = run(InterventionScorer(**SMALL), (explanation(text="foxes"), given))
    found, prompts = table(scoring), draw_prompts(given, "test", 12, context=8, bos=0)
    assert scoring.scores[0].metric == "nats_kl_0.5"
    assert [len(call) for call in reader.calls] == [4] * 12 + [2] * 12  # clean, two strengths, random; donors
    assert reader.closed == 1
    effects = Effects(
        subject=subject, coder=coder, latent=given.latent, table=data.tokens, prompts=prompts, kind="add",
        targets=(0.1, 0.5), seed=0,
    )  # fmt: skip
    clean = effects.passages(effects.continuations(0)[0])
    after = [effects.passages(c) for c in effects.continuations(0, effects.own, [0, 1])]
    pushed = effects.passages(effects.continuations(0, effects.random, [1])[0])

    def mean(texts: list[str], said: list[str]) -> float:
        gained = [nats(t, s + '"') - nats(c, s + '"') for t, c, s in zip(texts, clean, said, strict=True)]
        return float(np.mean(gained))

    foxes, lent = ["foxes"] * 12, ["one", "another"] * 6
    assert found["nats_kl_0.1", "none"].value == pytest.approx(mean(after[0], foxes))
    assert found["nats_kl_0.5", "none"].value == pytest.approx(mean(after[1], foxes))
    assert found["nats_kl_0.5", "random_direction"].value == pytest.approx(mean(pushed, foxes))
    assert found["nats_kl_0.5", "other_latent"].value == pytest.approx(mean(after[1], lent))
    assert ("nats_kl_0.1", "other_latent") not in found
    for at, prompt in enumerate(prompts):
        beginning, said = reader.calls[at][0]
        assert said == 'foxes"'
        assert f'Text:\n{clean[at]}\nTheme: "' in beginning
        assert clean[at].startswith(data.tokens.decode(prompt.tokens))
    assert [c["prompt"] for c in scoring.detail["continuations"]] == [data.tokens.decode(p.tokens) for p in prompts[:3]]
    everywhere = table(run(InterventionScorer(nulls="all", **SMALL), (explanation(text="foxes"), given)))
    assert everywhere["nats_kl_0.1", "other_latent"].value == pytest.approx(mean(after[0], lent))
    assert everywhere["nats_kl_0.5", "none"] == found["nats_kl_0.5", "none"]


def test_what_cannot_be_read_is_counted_and_never_a_number(subject: Subject, coder: LinearCoder, data: ToyData) -> None:
    given = view(data, subject, coder)
    shown = [data.tokens.decode(p.tokens) for p in draw_prompts(given, "test", 12, context=8, bos=0)]
    some = run(InterventionScorer(**SMALL), (explanation(), replace(given, reader=CountingReader(shown[3]))))
    score = some.scores[0]
    assert (score.n_total, score.n_failed) == (12, 1)
    assert math.isfinite(score.value)
    assert (score.floor, score.ceiling) == (-math.inf, math.inf)
    assert [j.status for j in some.judgements["none"]].count("failed") == 1
    assert some.judgements["none"][3].value is None
    none = run(InterventionScorer(**SMALL), (explanation(), replace(given, reader=CountingReader(""))))
    assert all(math.isnan(s.value) and s.n_scored == 0 for s in none.scores)
    assert none.scores


def test_a_reader_of_no_language_reads_a_few_prompts_to_check_the_plumbing(
    subject: Subject, coder: LinearCoder, data: ToyData
) -> None:
    given, scorer = view(data, subject, coder, reader=CountingReader(natural=False)), InterventionScorer(**SMALL)
    assert scorer.plumbing(given)
    assert {s.n_total for s in run(scorer, (explanation(), given)).scores} == {5}
    tokens = InterventionScorer(kind="tokens", **SMALL)
    assert not tokens.plumbing(given)
    assert {s.n_total for s in run(tokens, (explanation(0, TOKEN), given)).scores} == {12}


def test_retests_sample_anew_and_begin_with_the_score(subject: Subject, coder: LinearCoder, data: ToyData) -> None:
    given = view(data, subject, coder, reader=CountingReader())
    scorer = InterventionScorer(seeds=4, **{**SMALL, "retest": 1.0})
    scoring = run(scorer, (explanation(text="foxes"), given))
    found = table(scoring)
    again = scoring.detail["retest"]
    assert set(again) == {"kl_0.1", "kl_0.5"}
    assert all(len(means) == 4 == len(set(means)) for means in again.values())
    assert again["kl_0.5"][0] == pytest.approx(found["nats_kl_0.5", "none"].value)
    assert run(scorer, (explanation(text="foxes"), given)) == scoring
    assert set(reliability([scoring.detail, scoring.detail, {}])) == {"kl_0.1", "kl_0.5"}


def test_the_effect_is_explained_by_a_language_model_once(subject: Subject, coder: LinearCoder, data: ToyData) -> None:
    scorer = InterventionScorer(explain="effect", **SMALL)
    reader = CountingReader()
    llm = ScriptedClient(["It says.\n[EXPLANATION]: foxes everywhere"])
    given = view(data, subject, coder, reader=reader, llm=llm)
    scoring = run(scorer, (explanation(text="own"), given))
    assert scoring.detail["effect"] == {"text": "foxes everywhere", "status": "ok", "reason": ""}
    assert {said for call in reader.calls for _, said in call} == {'foxes everywhere"'}
    assert scoring.explanation.text == "own"
    asked = llm.requests[0].messages[-1]["content"]
    assert asked.count("Gained: ") == 6
    assert data.tokens.texts[TOKEN] in asked
    assert scorer.asks(given)
    assert len(scorer.planned(explanation(), given)) == 1


@pytest.mark.parametrize(("reply", "status"), [("no marker", "unparsed"), ("", "unparsed")])
def test_an_effect_without_an_explanation_gives_no_number(
    reply: str, status: str, subject: Subject, coder: LinearCoder, data: ToyData
) -> None:
    given = view(data, subject, coder, reader=CountingReader(), llm=ScriptedClient([reply]))
    scoring = run(InterventionScorer(explain="effect", **SMALL), (explanation(), given))
    assert scoring.detail["effect"]["status"] == status
    assert {s.metric for s in scoring.scores} == {"nats_kl_0.1", "nats_kl_0.5"}
    assert all(math.isnan(s.value) and s.n_failed == 12 and status in s.method for s in scoring.scores)


def test_faithfulness_is_the_share_of_continuations_that_fit(
    subject: Subject, coder: LinearCoder, data: ToyData
) -> None:
    replies = ['{"verdicts": [0, 0, 0, 0, 1]}', '{"verdicts": [0, 0, 0, 0, 0]}', '{"verdicts": [0, 1]}'] * 2 + [
        '{"verdicts": [1, 1, 1, 1, 1]}', '{"verdicts": [1, 1, 1, 1, 0]}', '{"verdicts": [1, 1]}'
    ]  # fmt: skip
    llm = ScriptedClient(replies)
    scorer = InterventionScorer(kind="tokens", faithful=True, **SMALL)
    given = view(data, subject, coder, llm=llm)
    found = table(run(scorer, (explanation(0, TOKEN), given)))
    assert found["faithful_kl_0.1", "none"].value == 0.0
    assert found["faithful_kl_0.5", "none"].value == pytest.approx(9 / 12)
    assert next(m for m, _ in found) == "mass_kl_0.5"
    assert len(llm.requests) == 9 == len(scorer.planned(explanation(0, TOKEN), given))


# -- what cannot be scored, and how it is written ---------------------------------------------------------------------


def test_a_strength_that_cannot_be_had_gives_no_number(subject: Subject, coder: LinearCoder, data: ToyData) -> None:
    settings = {**SMALL, "targets": "0.5+50", "headline": 50.0}
    given = view(data, subject, coder, reader=CountingReader(), donors=donors(explanation(5), explanation(6)))
    found = table(run(InterventionScorer(**settings), (explanation(), given)))
    assert next(iter(found)) == ("nats_kl_50", "none")
    assert math.isfinite(found["nats_kl_0.5", "none"].value)
    for key in (("nats_kl_50", "none"), ("nats_kl_50", "random_direction"), ("nats_kl_50_lift", "random_direction")):
        assert math.isnan(found[key].value)
        assert found[key].method.startswith("no strength gives a KL of 50")
        assert (found[key].n_total, found[key].n_scored) == (12, 0)


def test_too_few_prompts_give_no_number(subject: Subject, coder: LinearCoder, data: ToyData) -> None:
    settings = {**SMALL, "n_score": 3}
    scoring = run(InterventionScorer(kind="tokens", **settings), (explanation(0, TOKEN), view(data, subject, coder)))
    assert [s.metric for s in scoring.scores] == ["mass_kl_0.5", "mass_kl_0.1"]
    assert all(s.method == "too few prompts: 3 of at least 5" and s.n_failed == 3 for s in scoring.scores)


def test_explanations_that_failed_are_not_scored(subject: Subject, coder: LinearCoder, data: ToyData) -> None:
    failed = replace(explanation(), text=None, status="failed")
    scoring = run(InterventionScorer(**SMALL), (failed, view(data, subject, coder, reader=CountingReader())))
    assert scoring.scores == ()


def test_what_a_view_lacks_is_refused(subject: Subject, coder: LinearCoder, data: ToyData) -> None:
    with pytest.raises(InputError, match="subject"):
        run(InterventionScorer(), (explanation(), replace(view(data, subject, coder), subject=None)))
    with pytest.raises(InputError, match="--reader"):
        run(InterventionScorer(**SMALL), (explanation(), view(data, subject, coder)))


def test_a_latents_score_does_not_depend_on_the_others(subject: Subject, coder: LinearCoder, data: ToyData) -> None:
    items = [(explanation(i, TOKEN), view(data, subject, coder, i, reader=CountingReader())) for i in range(4)]
    scorer = InterventionScorer(**SMALL)
    together = {s.explanation.latent: s for s in scorer.score(items)}
    for item in items:
        assert run(scorer, item) == together[item[0].latent]
    assert len({s.scores[0].value for s in together.values()}) == 4


def test_no_continuation_is_longer_than_it_may_be_or_goes_on_after_a_special_token(
    subject: Subject, coder: LinearCoder, data: ToyData
) -> None:
    from exegete.scorers.intervention_effects import _cut
    from exegete.tokens import TokenTable

    table = TokenTable([b"<bos>", b"a", b"b"], [0])
    assert _cut([[1, 2, 0, 1], [0, 1, 1, 1], [1, 2, 9, 1], [2, 2, 2, 2]], table) == [[1, 2], [], [1, 2], [2, 2, 2, 2]]
    prompts = draw_prompts(view(data, subject, coder), "test", 6, context=8, bos=0)
    effects = Effects(
        subject=subject, coder=coder, latent=LatentId(coder="c", index=0), table=data.tokens, prompts=prompts,
        kind="add", targets=(0.1,), seed=0,
    )  # fmt: skip
    assert all(len(c) <= STEPS for c in effects.continuations(0)[0])
    assert effects.continuations(0) == effects.continuations(0) != effects.continuations(1)
    clean = Prompts(subject, [p.tokens for p in prompts]).log_probabilities()
    assert torch.allclose(clean[0], effects._clean)


def test_specs_re_create_the_scorer() -> None:
    made = scorers.from_text("intervention:kind=tokens,explain=effect,targets=0.1+2,headline=2,edit=clamp,n_score=7")
    assert scorers.from_spec(made.spec).spec == made.spec
    assert made.spec["args"]["targets"] == [0.1, 2.0]
    assert made.label == "intervention_tokens_effect_clamp"
    assert made.needs == {"examples", "data", "subject", "coder", "donors"}
    assert made.prompt_hash == ""
    plain = scorers.make("intervention")
    assert plain.label == "intervention"
    assert plain.needs == {"examples", "data", "subject", "coder", "donors", "reader"}
    assert plain.prompt_hash
    assert "llm" in scorers.make("intervention", {"explain": "effect"}).needs
    assert scorers.make("intervention", {"targets": 1}).spec["args"]["targets"] == [1.0]
    assert "donors" not in scorers.make("intervention", {"controls": "none"}).needs


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"kind": "words"}, "kind is one of reader, tokens"),
        ({"explain": "best"}, "explain is one of"),
        ({"edit": "double"}, "edit is one of"),
        ({"nulls": "some"}, "nulls is one of"),
        ({"targets": "0.1+x"}, "joined by"),
        ({"targets": (0.1, 3.0)}, "the headline is one of them"),
        ({"targets": (-1.0, 1.0)}, "positive numbers"),
        ({"n_score": 0}, "at least 1"),
        ({"seeds": 1}, "at least 2"),
        ({"retest": 1.5}, "a share"),
        ({"controls": "random"}, "controls are of"),
    ],
)
def test_bad_arguments_are_refused(args: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        InterventionScorer(**args)


# -- statistics -------------------------------------------------------------------------------------------------------


def test_means_over_prompts_of_many_documents_are_students() -> None:
    values = np.random.default_rng(0).normal(1, 2, 25)
    found = mean_by_document(values, np.arange(25), (-math.inf, math.inf))
    low, high = stats.t.interval(0.95, 24, values.mean(), stats.sem(values))
    assert (found.value, found.low, found.high) == pytest.approx((values.mean(), low, high))
    assert (found.n, found.n_documents, found.flags) == (25, 25, ())


def test_prompts_of_one_document_count_together() -> None:
    """CR2 by hand: residual sums by document, each divided by the root of the share that other documents hold."""
    values = np.array([1.0, 1.2, 0.9, 3.0, 3.1, 0.0, 5.0])
    documents = np.array([4, 4, 4, 7, 7, 8, 9])
    found = mean_by_document(values, documents, (-math.inf, math.inf))
    error = math.sqrt(
        sum(
            (values[documents == d] - values.mean()).sum() ** 2 / (1 - (documents == d).mean()) for d in set(documents)
        )
    ) / len(values)  # fmt: skip
    assert found.value == pytest.approx(values.mean())
    half = found.high - found.value
    freedom = next(f for f in np.arange(1, 6, 0.001) if stats.t.ppf(0.975, f) * error <= half)
    assert 1.5 < freedom < 3.0  # fewer than the three of four equal documents
    assert found.flags == ("few_documents",)
    one = mean_by_document(values, np.zeros(7), (-1.0, 9.0))
    assert (one.low, one.high) == (-1.0, 9.0)


def test_unread_prompts_widen_the_bounds() -> None:
    values = np.array([0.1, 0.2, math.nan, 0.3, 0.15, 0.05])
    found = mean_by_document(values, np.arange(6), (-1.0, 1.0))
    known = mean_by_document(values[[0, 1, 3, 4, 5]], np.arange(5), (-1.0, 1.0))
    assert (found.value, found.low, found.high, found.n) == (known.value, known.low, known.high, 5)
    assert found.floor == mean_by_document(np.nan_to_num(values, nan=-1.0), np.arange(6), (-1.0, 1.0)).low
    assert found.ceiling == mean_by_document(np.nan_to_num(values, nan=1.0), np.arange(6), (-1.0, 1.0)).high
    none = mean_by_document(np.full(3, math.nan), np.arange(3), (-1.0, 1.0))
    assert math.isnan(none.value)
    assert none.n == 0


def test_icc_is_that_of_shrout_and_fleiss() -> None:
    """Their Table 2: six targets, four judges; ICC(1,1) = .17 (p. 423)."""
    ratings = np.array([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]], float)
    found = icc(ratings)
    assert found.value == pytest.approx(0.166, abs=0.001)
    assert (found.low, found.high) == pytest.approx((-0.133, 0.723), abs=0.001)
    assert found.n == 6


def test_icc_is_the_share_between_latents() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0, 2, (4000, 1)) + rng.normal(0, 1, (4000, 5))
    found = icc(values)
    assert found.value == pytest.approx(0.8, abs=0.01)
    assert found.low < 0.8 < found.high
    assert icc(np.repeat(rng.normal(size=(4, 1)), 3, axis=1)).value == 1.0
    assert math.isnan(icc(np.ones((4, 3))).value)
    assert math.isnan(icc(np.ones((1, 3))).value)
    with pytest.raises(InputError, match="two seeds"):
        icc(np.ones((4, 1)))


def test_icc_intervals_cover() -> None:
    rng = np.random.default_rng(1)
    found = [icc(rng.normal(0, 1, (15, 1)) + rng.normal(0, 1, (15, 5))) for _ in range(2000)]
    assert np.mean([i.low <= 0.5 <= i.high for i in found]) == pytest.approx(0.95, abs=0.02)


def test_latents_without_all_their_retests_are_left_out() -> None:
    details: list[dict[str, Any]] = [
        {"retest": {"kl_1": [1.0, 1.1]}},
        {"retest": {"kl_1": [2.0, 2.2], "kl_3": [1.0, None]}},
        {},
    ]
    found = reliability(details)
    assert set(found) == {"kl_1"}
    assert found["kl_1"].n == 2

"""Sweeps on a model whose answers are known beforehand, and the numbers that are made of them."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import scipy.stats
import torch
from matplotlib.image import imread as read_png

from exegete.errors import InputError, MismatchError, MissingExtraError, NotFoundError
from exegete.steering import (
    Question,
    Row,
    SteeringVector,
    behaviour_vector,
    generate,
    open_answers,
    sweep,
    write_sweep,
)
from exegete.steering.answers import Asked, Setting
from exegete.steering.effects import Bootstrap, halves
from exegete.steering.places import places
from exegete.steering.plots import curves_figure, sites_figure
from exegete.steering.png import png_of
from exegete.steering.questions import open_prompt, questions
from exegete.steering.reference import origin, published, published_behaviours, reference_lines
from exegete.steering.tables import csv_text, summary_lines
from exegete.steering.templates import template_of
from exegete.steering.vector import about
from exegete.subjects import Subject
from exegete.subjects.sites import residuals

LAST = places("last")
MULTIPLIERS = (-3.0, -1.0, 0.0, 1.0, 3.0)


def predicted(subject: Subject, rows: list[Row], u: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Return p(A) / (p(A) + p(B)) of the planted model when ``by`` is added at the last token: σ(8 u·norm(h + by))."""
    found = []
    for question in questions(rows, template_of("plain"), subject.tokenizer):
        h = residuals(subject, torch.tensor([question.prompt]), [1])[1][0, -1] + by
        found.append(torch.sigmoid(8 * (h / (h.square().mean() + 1e-6).sqrt()) @ u))
    return torch.stack(found)


@pytest.fixture(scope="module")
def direction(planted: tuple[Subject, torch.Tensor]) -> SteeringVector:
    subject, u = planted
    return SteeringVector(residual=dict.fromkeys((-1, 0, 1), 0.8 * u), about=about(subject, "mean"))


def test_answers_move_exactly_as_the_planted_direction_says(
    planted: tuple[Subject, torch.Tensor], direction: SteeringVector, rows: list[Row]
) -> None:
    subject, u = planted
    found = sweep(subject, direction, rows, multipliers=MULTIPLIERS, behaviour="b")
    sign = torch.tensor([1.0 if r.match == "A" else -1.0 for r in rows])
    for site in (-1, 0, 1):
        match, nonsense = found.values["b", site, "residual", ""]
        for m, shares in zip(MULTIPLIERS, match, strict=True):
            p_a = predicted(subject, rows, u, 0.8 * m * u)
            wanted = torch.where(sign > 0, p_a, 1 - p_a)
            np.testing.assert_allclose(shares, wanted.numpy(), atol=2e-6)
        assert ((nonsense > 0) & (nonsense < 1)).all()
    own = [p for p in found.points if p.control == "none" and p.site == 0]
    p_first = [float(predicted(subject, rows, u, 0.8 * m * u).mean()) for m in MULTIPLIERS]
    assert [p.first for p in own] == pytest.approx(p_first, abs=1e-6)
    assert p_first == sorted(p_first)
    assert {p.base for p in own} == {own[2].match}


def test_a_vector_of_the_behaviour_is_told_from_one_of_the_letter(
    planted: tuple[Subject, torch.Tensor], direction: SteeringVector, rows: list[Row]
) -> None:
    """All rows match with A: the letter's vector does all there is to do; on balanced rows it does nothing."""
    subject, _ = planted
    only_a = [r for r in rows if r.match == "A"]
    found = sweep(subject, direction, only_a, multipliers=MULTIPLIERS, letters=direction, controls=20)
    best = next(c for c in found.curves if not math.isnan(c.letters))
    assert best.letters == pytest.approx(best.effect.value, abs=1e-6)
    assert best.effect.value > 0.9
    assert best.spearman.value == 1.0
    assert best.random == 20
    assert best.effect.value > best.random_most >= best.random_mean
    assert best.random_as_large == 0
    drawn = [p for p in found.points if p.control == "random"]
    assert len(drawn) == 40
    weak = dataclasses.replace(direction, residual={s: 1e-3 * v for s, v in direction.residual.items()})
    here = sweep(subject, weak, rows, multipliers=(-1, 1), controls=9, behaviour="b", letters=direction)
    curve, choice = next(c for c in here.curves if c.random), here.choices[0]
    own = {(p.draw, p.multiplier): p.match for p in here.points if p.control == "random"}
    effects = [abs(own[i, 1.0] - own[i, -1.0]) for i in range(9)]
    assert curve.random_as_large == sum(e >= abs(curve.effect.value) for e in effects)
    assert curve.site == choice.site
    said = "\n".join(summary_lines(here))
    assert f"{curve.random_as_large} as large as this; letter" in said
    assert f"nonsense {here.points[0].base_nonsense:.2f} unsteered" in said
    assert "the half of the questions that the site was not chosen on" in said
    both = [*only_a, *(Row(question=r.question, match="B", other="A") for r in only_a)]
    found = sweep(subject, direction, both, multipliers=MULTIPLIERS)
    assert all(abs(c.effect.value) < 1e-6 for c in found.curves)


def test_the_order_of_multipliers_does_not_matter_and_zero_is_the_subject_as_it_is(
    mamba: Subject, rows: list[Row]
) -> None:
    vector = behaviour_vector(mamba, rows, sites=(0, 1), state=True).vector
    options: dict[str, Any] = {"behaviour": "b", "controls": 0}
    found = sweep(mamba, vector, rows, multipliers=MULTIPLIERS, **options)
    turned = sweep(mamba, vector, rows, multipliers=MULTIPLIERS[::-1], **options)
    asked = Asked(mamba, questions(rows, template_of("plain"), mamba.tokenizer), LAST, LAST)
    clean = asked.answers([None])
    for key, (match, nonsense) in found.values.items():
        assert np.array_equal(match, turned.values[key][0][::-1])
        assert np.array_equal(match[2], clean.share[0])
        assert np.array_equal(nonsense[2], clean.nonsense[0])
        assert not np.array_equal(match[0], clean.share[0])
    assert np.array_equal(asked.answers([None]).share, clean.share)


def test_residual_state_and_both_are_swept_and_every_component(mamba: Subject, rows: list[Row]) -> None:
    vector = behaviour_vector(mamba, rows, sites=(-1, 1), state=True).vector
    found = sweep(mamba, vector, rows, multipliers=(-1, 1), per_component=True, controls=2, control_sites="all")
    kinds = {(c.site, c.mode, c.components) for c in found.curves}
    state = {(s, "state", n) for s in (0, 1, 2) for n in ("conv+ssm", "conv", "ssm")}
    assert kinds == {(-1, "residual", ""), (1, "residual", ""), (1, "both", "conv+ssm")} | state
    assert all(c.random == 2 for c in found.curves)
    both = next(c for c in found.curves if c.mode == "both")
    (settings,) = [[Setting(vector=vector.only(sites=(1,)), multiplier=m) for m in (-1.0, 1.0)]]
    asked = Asked(mamba, questions(rows, template_of("plain"), mamba.tokenizer), LAST, LAST)
    share = asked.answers(settings).share
    assert both.effect.value == pytest.approx(float((share[1] - share[0]).mean()), abs=1e-6)


def test_many_settings_in_one_pass_are_what_one_at_a_time_is(mamba: Subject, rows: list[Row]) -> None:
    vector = behaviour_vector(mamba, rows, sites=(0, 1), state=True).vector
    asked = Asked(mamba, questions(rows, template_of("plain"), mamba.tokenizer), places("last:3"), places("last:2"))
    draw = np.random.default_rng(0)
    vectors = [vector, vector.only(mode="residual"), vector.only(mode="residual").random_like(draw)]
    settings = [Setting(vector=v, multiplier=m) for v in vectors for m in (2.0, -1.0)]
    found = asked.answers(settings)
    for i, setting in enumerate(settings):
        alone = asked.answers([setting])
        np.testing.assert_allclose(found.match[i], alone.match[0], rtol=1e-4)
        np.testing.assert_allclose(found.other[i], alone.other[0], rtol=1e-4)
    here = vectors[1]
    there = dataclasses.replace(here, centres={s: 3 * c for s, c in here.centres.items()})
    settings = [Setting(vector=v, multiplier=m) for v in (here, there) for m in (1.0, 0.5)]
    found = asked.answers(settings, operator="reflect")
    for i, setting in enumerate(settings):
        alone = asked.answers([setting], operator="reflect")
        np.testing.assert_allclose(found.match[i], alone.match[0], rtol=1e-4)
    assert abs(found.match[0] - found.match[2]).max() > 1e-6


@pytest.mark.parametrize("positions", ["last", "all", "onward"])
def test_answers_of_several_tokens_are_scored_whole(llama: Subject, positions: str) -> None:
    asked = [
        Question(prompt=(5, 6, 7), match=(8, 9, 10), other=(11,)),
        Question(prompt=(5, 6, 9), match=(3, 4), other=(5, 6)),
    ]
    vector = SteeringVector(residual={1: torch.linspace(-2, 2, 32)}, about=about(llama, "mean"))
    found = Asked(llama, asked, places(positions), LAST).answers([Setting(vector=vector, multiplier=1.0), None])
    from exegete.steering import steered

    for i, question in enumerate(asked):
        for answer, values in ((question.match, found.match), (question.other, found.other)):
            for setting in (0, 1):
                log_p, ids = 0.0, list(question.prompt)
                for token in answer:
                    with steered(llama, vector, 1.0 - setting, positions=positions), torch.no_grad():
                        cache = llama.model(input_ids=torch.tensor([question.prompt]), use_cache=True)
                        rest = ids[len(question.prompt) :]
                        for own in rest:
                            cache = llama.model(
                                input_ids=torch.tensor([[own]]), past_key_values=cache.past_key_values, use_cache=True
                            )
                    log_p += float(cache.logits[0, -1].double().log_softmax(-1)[token])
                    ids.append(token)
                assert values[setting, i] == pytest.approx(math.exp(log_p), rel=1e-4)


def test_intervals_slopes_and_ranks_are_those_of_numpy_and_scipy() -> None:
    draw = np.random.default_rng(0)
    multipliers = (-3.0, -1.5, -0.5, 0.5, 1.5, 3.0)
    values = draw.random((6, 40)) + np.linspace(0, 0.2, 6)[:, None]
    boot = Bootstrap(40, seed=1)
    near = np.array(multipliers[1:5])
    curve = values[1:5].mean(axis=1)
    assert boot.slope(values, multipliers).value == pytest.approx(np.polyfit(near, curve, 1)[0])
    assert boot.spearman(values, multipliers).value == pytest.approx(scipy.stats.spearmanr(near, curve).statistic)
    tied = np.array([[0.1], [0.1], [0.3], [0.2], [0.2], [0.5]]).repeat(40, 1)
    expected = scipy.stats.spearmanr(near, tied[1:5, 0]).statistic
    assert boot.spearman(tied, multipliers).value == pytest.approx(expected)
    effect = boot.effect(values, multipliers)
    difference = values[5] - values[0]
    assert effect.value == pytest.approx(difference.mean())
    theirs = scipy.stats.bootstrap((difference,), np.mean, method="percentile", random_state=0).confidence_interval
    assert effect.low == pytest.approx(theirs.low, abs=0.02)
    assert effect.high == pytest.approx(theirs.high, abs=0.02)
    assert math.isnan(boot.slope(values[:2], (-3.0, 3.0)).value)
    flat = Bootstrap(40, seed=1).spearman(np.ones((6, 40)), multipliers)
    assert (flat.value, flat.low, flat.high) == (0, 0, 0)


@pytest.mark.parametrize("n", [1, 2, 7, 50])
def test_halves_share_no_question(n: int) -> None:
    one, two = halves(n, 0)
    assert sorted([*one, *two]) == list(range(n))
    assert len(one) - len(two) in (0, 1)


def test_the_layer_is_chosen_on_one_half_and_reported_on_the_other(
    planted: tuple[Subject, torch.Tensor], rows: list[Row]
) -> None:
    subject, u = planted
    only_a = [r for r in rows if r.match == "A"]
    residual = {-1: 0.1 * u, 0: -0.8 * u, 1: 0.4 * u}
    found = sweep(subject, SteeringVector(residual=residual, about=about(subject, "mean")), only_a, behaviour="b")
    (choice,) = found.choices
    assert (choice.site, choice.n_chosen, choice.n_held_out) == (0, 4, 4)  # also where a vector works backwards
    one, two = halves(8, 0)
    match, _ = found.values["b", 0, "residual", ""]
    assert choice.chosen == pytest.approx(float((match[-1] - match[0])[one].mean()))
    assert choice.held_out.value == pytest.approx(float((match[-1] - match[0])[two].mean()))
    assert choice.chosen < -0.5
    assert choice.held_out.high < 0


def test_one_question_leaves_nothing_to_report_a_choice_on(
    planted: tuple[Subject, torch.Tensor], direction: SteeringVector, rows: list[Row]
) -> None:
    found = sweep(planted[0], direction, rows[:1], multipliers=(-1, 1), controls=0)
    (choice,) = found.choices
    assert (choice.n_chosen, choice.n_held_out) == (1, 0)
    assert math.isnan(choice.held_out.value)
    assert math.isfinite(choice.chosen)
    said = summary_lines(found)
    assert "held out – on 0 of 1" in said[0]
    assert "nan" not in " ".join(said)  # two multipliers have no rank correlation


def test_open_questions_are_answered_by_every_choice(mamba: Subject, rows: list[Row]) -> None:
    vector = behaviour_vector(mamba, rows, sites=(0, 1), state=True).vector
    found = sweep(mamba, vector, rows, multipliers=(-1, 1), per_component=True, controls=0, behaviour="b")
    asked, many = ["How big is it?", "no?"], (-40.0, 0.0)
    answers = open_answers(mamba, vector, asked, found.choices, many, max_tokens=6)
    assert [(a.mode, a.components) for a in answers[::4]] == [
        ("residual", ""),
        *(("state", names) for names in ("conv+ssm", "conv", "ssm")),
        ("both", "conv+ssm"),
    ]
    prompts = [open_prompt(text, template_of("plain"), mamba.tokenizer) for text in asked]
    for i, choice in enumerate(found.choices):
        part = vector.only(sites=(choice.site,), components=tuple(filter(None, choice.components.split("+"))) or None)
        wanted = generate(mamba, prompts, part, many, mode=choice.mode, max_tokens=6)
        own = answers[4 * i : 4 * i + 4]
        assert [(a.tokens, a.text, a.multiplier) for a in own] == [(s.tokens, s.text, s.multiplier) for s in wanted]
        assert [a.question for a in own] == [asked[0], asked[0], asked[1], asked[1]]
        assert {(a.behaviour, a.site) for a in own} == {("b", choice.site)}
    assert open_answers(mamba, vector, [], found.choices) == ()


def test_error_bars_stand_apart_on_a_scale_that_fits(mamba: Subject, rows: list[Row]) -> None:
    made = behaviour_vector(mamba, rows, sites=(0, 1, 2), state=True)
    found = sweep(mamba, made.vector, rows, multipliers=(-0.02, 0.02), controls=0, behaviour="b")
    most = max(max(abs(c.effect.low), abs(c.effect.high)) for c in found.curves)
    assert 0 < most < 0.1  # on a scale from -1 to 1 nothing would be seen
    drawn = ElementTree.fromstring(sites_figure(found, "b"))
    space = "{http://www.w3.org/2000/svg}"
    bars = [line for line in drawn.iter(f"{space}line") if line.find(f"{space}title") is not None]
    assert len(bars) == len(found.curves) == len({bar.get("x1") for bar in bars})
    zero = next(float(line.get("y1", "")) for line in drawn.iter(f"{space}line") if line.get("class") == "b")
    reach = max(abs(float(bar.get(name, "")) - zero) for bar in bars for name in ("y1", "y2"))
    labels = [t.text for t in drawn.iter(f"{space}text")]
    scale = next(s for s in (0.01, 0.02, 0.05, 0.1) if s >= most)
    assert f"{scale:g}" in labels
    assert reach == pytest.approx(most / scale * 133, abs=0.2)  # half of the axis's 266 pixels


def test_controls_are_drawn_in_the_colour_of_their_mode(mamba: Subject, rows: list[Row]) -> None:
    made = behaviour_vector(mamba, rows, sites=(0, 1), state=True)
    space = "{http://www.w3.org/2000/svg}"
    for letters, names in ((made.letters, {"random vectors as long", "the letter's vector as long"}), (None, None)):
        found = sweep(mamba, made.vector, rows, multipliers=(-1, 1), controls=3 * bool(names), letters=letters)
        drawn = ElementTree.fromstring(curves_figure(found, ""))
        curves = [line.get("stroke") for line in drawn.iter(f"{space}polyline") if line.get("class") is None]
        assert len(set(curves)) == 3
        dots = [dot.get("fill") for dot in drawn.iter(f"{space}circle")]
        squares = [square.get("stroke") for square in drawn.iter(f"{space}rect") if square.get("stroke")]
        key = ["#777"] if names else []
        assert sorted(map(str, dots)) == sorted([*key, *(str(c) for c in curves for _ in range(6) if names)])
        assert sorted(map(str, squares)) == sorted([*key, *(str(c) for c in curves for _ in range(2) if names)])
        said = {t.text for t in drawn.iter(f"{space}text")}
        assert said & {"random vectors as long", "the letter's vector as long"} == (names or set())


def test_a_sweep_is_written_as_tables_and_figures(mamba: Subject, rows: list[Row], tmp_path: Path) -> None:
    vector = behaviour_vector(mamba, rows, sites=(0, 1), state=True).vector
    found = sweep(
        mamba, vector, rows, multipliers=(-1, 0, 1.5), behaviour="big & <bad>", controls=2, per_component=True
    )
    both = found + sweep(mamba, vector, rows, multipliers=(-1, 0, 1.5), behaviour="other", controls=0)
    samples = open_answers(mamba, vector, ["How?"], found.choices, [0.0], max_tokens=2)
    files = write_sweep(both, tmp_path / "out", facts={"model": "m"}, samples=samples)
    names = {f.name for f in files}
    assert {"points.csv", "curves.csv", "choices.csv", "questions.csv", "sweep.json", "samples.jsonl"} <= names
    assert sorted(n for n in names if n.endswith(".svg"))[0] == "curves-big____bad_.svg"
    for file in files:
        if file.suffix == ".svg":
            ElementTree.parse(file)
    with (tmp_path / "out" / "points.csv").open() as stream:
        points = list(csv.DictReader(stream))
    assert len(points) == len(both.points)
    assert float(points[0]["match"]) == both.points[0].match
    with (tmp_path / "out" / "questions.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == 12 * 3 * len(both.curves)
    held = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert held["facts"] == {"model": "m"}
    assert held["curves"][0]["effect_low"] <= held["curves"][0]["effect"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [(s["question"], s["behaviour"], s["site"], s["mode"], s["components"]) for s in lines] == [
        ("How?", c.behaviour, c.site, c.mode, c.components) for c in found.choices
    ]
    assert csv_text([{"a": math.nan, "b": 1.5}]) == "a,b\n,1.5\n"
    assert "held out" in summary_lines(found)[0]
    with pytest.raises(InputError, match="other multipliers"):
        _ = found + sweep(mamba, vector, rows, multipliers=(-1, 1), controls=0)


def test_figures_are_pictures_too(
    mamba: Subject, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = behaviour_vector(mamba, rows, sites=(0, 1), state=True)
    found = sweep(mamba, made.vector, rows, multipliers=(-1, 0, 1), behaviour="$b_1$", controls=2, letters=made.letters)
    files = {file.name: file for file in write_sweep(found, tmp_path, png=True)}
    assert {"curves-_b_1_.png", "curves-_b_1_.svg", "sites-_b_1_.png", "sites-_b_1_.svg"} <= files.keys()
    for name, draw in (("curves", curves_figure), ("sites", sites_figure)):
        picture = read_png(files[f"{name}-_b_1_.png"])
        assert picture.shape == (692, 1680, 4)
        assert (picture[:4] == 1).all()  # white above the title
        svg = ElementTree.fromstring(draw(found, "$b_1$"))
        strokes = {e.get("stroke") for e in svg.iter() if e.tag.endswith("polyline") and e.get("class") is None}
        pixels = np.round(255 * picture[..., :3]).astype(int)
        assert len(strokes) == 3
        for stroke in strokes:
            assert (pixels == [int(str(stroke)[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=-1).any()
    svg_text = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><path d="M0 0" fill="#fff"/></svg>'
    with pytest.raises(AssertionError, match="no figure has the element 'path'"):
        png_of(svg_text)
    monkeypatch.setattr("exegete.steering.png.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"writing PNG figures .* pip install 'exegete\[plot\]'"):
        write_sweep(found, tmp_path / "none", png=True)
    assert not (tmp_path / "none").exists()


def test_published_numbers_ship_with_origin_and_cautions(mamba: Subject, rows: list[Row]) -> None:
    assert len(published_behaviours()) == 7
    found = published("hallucination")
    assert found.change["Hermes-Mamba-2.8b"] == (-20.8, -11.2, 11.4, 16.2)
    assert found.change["Llama-2-7b-chat"] == (-59.0, -61.9, 10.4, 4.4)
    assert found.most["Hermes-RWKV-v5-7b"] == (44.1, 31.7, 47.7)
    assert published("survival-instinct").limits == {("Hermes-Mamba-2.8b", -3.0), ("Hermes-Mamba-2.8b", 3.0)}
    assert "2404.05971" in origin()[0]
    assert len(origin()[1]) == 4
    with pytest.raises(NotFoundError, match="did you mean refusal"):
        published("refusl")
    vector = behaviour_vector(mamba, rows, sites=(1,), state=True).vector
    options: dict[str, Any] = {"multipliers": (-3, 0, 1.5), "controls": 0}
    own = sweep(mamba, vector, rows, behaviour="refusal", **options) + sweep(
        mamba, vector, rows, behaviour="x", modes=("residual",), **options
    )
    lines = reference_lines(own)
    assert any(
        line.startswith("Hermes-BTLM-3b") and line.split()[1:] == ["-2.4", "-2.3", "+4.5", "+2.5"] for line in lines
    )
    here = next(line for line in lines if line.startswith("here: residual site 1"))
    points = {p.multiplier: p for p in own.points if (p.behaviour, p.mode) == ("refusal", "residual")}
    cells = [f"{100 * (points[m].match - points[m].base):+.1f}" if m in points else "–" for m in (-3.0, -1.5, 1.5, 3.0)]
    assert here.split()[4:] == cells
    assert "x: nothing published" in lines


def test_what_cannot_be_swept_is_refused(mamba: Subject, llama: Subject, rows: list[Row]) -> None:
    vector = behaviour_vector(mamba, rows, sites=(1,), state=True).vector

    def refused(kind: type[InputError], message: str, subject: Subject = mamba, **options: Any) -> None:
        with pytest.raises(kind, match=message):
            sweep(subject, options.pop("vector", vector), options.pop("rows", rows), **options)

    refused(InputError, "no questions", rows=[])
    refused(InputError, "edit prompt tokens too", positions="generated")
    far = r"no prompt has a token to edit the {} at: the longest is of \d+ tokens, counted from 0, .* are {}; "
    refused(InputError, far.format("residual", "from:999"), positions="from:999")
    refused(InputError, far.format("state", "from:999"), state_positions="from:999")
    refused(InputError, far.format("state", "every:999"), state_positions="every:999")
    only = {"modes": ("residual",), "multipliers": (-1, 1), "controls": 0}
    assert sweep(mamba, vector, rows, positions="every:999", state_positions="from:999", **only).points  # type: ignore[arg-type]
    letters = behaviour_vector(mamba, rows, sites=(0,), state=["ssm"]).letters
    refused(MismatchError, "the letter's vector has no part residual.1 of the sizes", letters=letters)
    refused(MismatchError, r"has no part state.0.conv of the sizes", letters=letters, modes=("state",))
    other = behaviour_vector(llama, rows, sites=(1,)).letters
    refused(MismatchError, "made on", letters=other)
    refused(InputError, "at least two different multipliers", multipliers=(1.0, 1.0))
    refused(InputError, "finite", multipliers=(1.0, math.inf))
    refused(NotFoundError, "unknown mode", modes=("sideways",))
    refused(NotFoundError, r"nothing at site 9; it has the sites 0, 1, 2", sites=(9,))
    refused(InputError, "no part for the modes state", vector=vector.only(mode="residual"), modes=("state",))
    refused(MismatchError, "made on", subject=llama)
    refused(InputError, "only added to a state", operator="reflect", modes=("state",))
    with pytest.raises(InputError, match="not both"):
        sweep(mamba, vector, [rows[0], Question(prompt=(1,), match=(2,), other=(3,))])  # type: ignore[arg-type]

"""Prediction trajectories and their pictures, and text written from a site."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from exegete.errors import InputError, MissingExtraError, NotFoundError
from exegete.lens import LogitLens, Trajectory, TunedLens, generate_from_site, new_lens, prediction_trajectory
from exegete.subjects import Subject
from exegete.subjects.sites import residuals

Make = Callable[..., TunedLens]

PROMPT = (0, 5, 9, 40, 7, 61)


@pytest.fixture(scope="module")
def found(trained: Make, llama: Subject) -> Trajectory:
    return prediction_trajectory(trained(llama), PROMPT, k=4)


def test_cells_hold_what_the_lens_predicts(trained: Make, found: Trajectory, llama: Subject) -> None:
    tokens = torch.tensor([PROMPT])
    lens = trained(llama)
    assert found.sites == (-1, 0, 1, 2)
    with torch.no_grad():
        model = llama.model(tokens).logits[0].double().log_softmax(-1)
        streams = residuals(llama, tokens, (-1, 0, 1))
        rows = [lens.logits(s, streams[s][0]).double().log_softmax(-1) for s in (-1, 0, 1)] + [model]
    for s, q in enumerate(rows):
        assert found.top[s, :, 0].tolist() == q.argmax(-1).tolist()
        np.testing.assert_allclose(found.top_p[s, :, 0], q.exp().amax(-1), rtol=1e-4)
        np.testing.assert_allclose(found.entropy[s], -(q.exp() * q).sum(-1), rtol=1e-4)
        np.testing.assert_allclose(found.kl[s], (model.exp() * (model - q)).sum(-1), rtol=1e-3, atol=1e-5)
        after = torch.tensor(PROMPT[1:])
        np.testing.assert_allclose(found.ce[s, :-1], -q[torch.arange(5), after], rtol=1e-4)
        assert found.rank[s, :-1].tolist() == (q[:5] > q[torch.arange(5), after][:, None]).sum(-1).tolist()
    assert np.isnan(found.ce[:, -1]).all()
    assert (found.rank[:, -1] == -1).all()
    assert (found.kl[-1] == 0).all()


def test_what_a_picture_is_coloured_by(found: Trajectory) -> None:
    assert (found.values("probability") == found.top_p[:, :, 0]).all()
    with pytest.raises(InputError, match="probability, entropy, kl, ce"):
        found.values("colour")  # type: ignore[arg-type]


def test_sites_and_prompts_that_are_refused(llama: Subject) -> None:
    with pytest.raises(InputError, match="no token"):
        prediction_trajectory(LogitLens(llama), ())
    with pytest.raises(NotFoundError, match="sites -1"):
        prediction_trajectory(LogitLens(llama), PROMPT, sites=(7,))
    assert prediction_trajectory(LogitLens(llama), PROMPT, sites=(0,)).sites == (0, 2)


def test_texts_longer_than_the_model_reads_are_refused(llama: Subject) -> None:
    most = llama.model.config.max_position_embeddings
    with pytest.raises(InputError, match=f"reads up to {most} tokens at once, got {most + 1}"):
        prediction_trajectory(LogitLens(llama), [5] * (most + 1))
    with pytest.raises(InputError, match=f"reads up to {most} tokens at once, got {most + 2}"):
        generate_from_site(LogitLens(llama), 0, [5] * (most - 1), n=4)


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.classes: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.classes += [value or "" for name, value in attrs if name == "class"]


def hostile(found: Trajectory) -> Trajectory:
    import dataclasses

    bad = "<script>alert('&')</script>\u202e"
    tops = tuple(tuple((bad, *cell[1:]) for cell in row) for row in found.top_texts)
    return dataclasses.replace(found, subject=bad, texts=(bad, *found.texts[1:]), top_texts=tops)


def test_the_page_is_escaped_and_stands_alone(found: Trajectory) -> None:
    page = hostile(found).html("kl")
    read = Tags()
    read.feed(page)
    assert "script" not in read.tags
    assert "\u202e" not in page
    assert "⟨U+202E⟩" in page
    assert not re.search(r"(src|href)=", page)
    assert sum(style.startswith("c ") for style in read.classes) == 4 * 6
    assert 'id="by-k" checked' in page
    assert page.count(" checked>") == 1


def test_the_svg_is_escaped_and_well_formed(found: Trajectory) -> None:
    from xml.etree import ElementTree

    for colour in ("probability", "entropy", "kl", "ce"):
        root = ElementTree.fromstring(hostile(found).svg(colour))
        names = {element.tag.rpartition("}")[2] for element in root.iter()}
        assert names == {"svg", "style", "rect", "text", "g", "title"}
        assert len(root.findall("{http://www.w3.org/2000/svg}g")) == 4 * 6


def test_pictures_are_written_by_the_paths_ending(found: Trajectory, tmp_path: Path) -> None:
    for name in ("a.html", "a.svg", "a.json"):
        found.write(tmp_path / name)
    data = json.loads((tmp_path / "a.json").read_text())
    assert data["tokens"] == list(PROMPT)
    assert data["ce_nats"][0][-1] is None
    with pytest.raises(InputError, match=r"\.html, \.svg, \.png or \.json"):
        found.write(tmp_path / "a.pdf")


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs matplotlib")
def test_a_png_is_written(found: Trajectory, tmp_path: Path) -> None:
    found.write(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_a_prompt_too_long_for_a_png_is_refused(found: Trajectory, tmp_path: Path) -> None:
    import dataclasses

    with pytest.raises(InputError, match="at most 500 tokens, the prompt has 600"):
        dataclasses.replace(found, tokens=found.tokens * 100).write(tmp_path / "a.png")


def test_a_png_without_matplotlib_says_what_to_install(
    found: Trajectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'exegete\[plot\]'"):
        found.write(tmp_path / "a.png")


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_the_last_site_writes_what_the_model_writes(family: str, request: pytest.FixtureRequest) -> None:
    subject: Subject = request.getfixturevalue(family)
    made = generate_from_site(LogitLens(subject), 2, PROMPT, n=8)
    tokens = torch.tensor([PROMPT])
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    want = subject.model.generate(tokens, **options)
    assert made == want[0, len(PROMPT) :].tolist()


def test_a_site_writes_what_its_lens_predicts(trained: Make, llama: Subject) -> None:
    lens = trained(llama)
    made = generate_from_site(lens, 0, PROMPT, n=3)
    ids = list(PROMPT)
    for token in made:
        assert token == int(prediction_trajectory(lens, ids, sites=(0,)).top[0, -1, 0])
        ids.append(token)
    assert generate_from_site(lens, 0, PROMPT, n=3, stop=made[1]) == made[: made.index(made[1])]


def test_draws_are_seeded(llama: Subject) -> None:
    lens = new_lens(llama)
    one, same, other = (generate_from_site(lens, 1, PROMPT, n=12, temperature=2.0, seed=s) for s in (1, 1, 2))
    assert one == same != other
    with pytest.raises(InputError, match="temperature at least 0"):
        generate_from_site(lens, 1, PROMPT, temperature=-1)
    with pytest.raises(InputError, match="no token"):
        generate_from_site(lens, 1, ())

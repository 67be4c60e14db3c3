"""What is read of a model: against whole passes, with each answer read from a copy of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exegete.elk import Encoded, answer_log_odds, extract, extract_to, load_extraction, save_extraction
from exegete.elk.facts import Feature
from exegete.elk.stored_extraction import has_split
from exegete.errors import CorruptError, InputError, MismatchError, NotFoundError
from exegete.subjects.running import Running
from exegete.subjects.sites import residuals

FAMILIES = ("mamba", "rwkv", "llama")


def rows_of(toys: Any) -> Encoded:
    """Rows of three lengths whose answers have one or two tokens."""
    data: Encoded = toys.rows(6, lengths=(2, 3, 5))
    choices = tuple(((12,), (13, 5)) if i % 3 else ((12, 4), (13,)) for i in range(len(data)))
    return Encoded(prompts=data.prompts, choices=choices, facts=data.facts)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_of_whole_passes(toys: Any, family: str) -> None:
    subject, data = toys.subject(family), rows_of(toys)
    found = extract(subject, data, sites=(-1, 0, 1), tokens_at_once=11)
    for i, prompt in enumerate(data.prompts):
        alone = residuals(subject, torch.tensor([prompt]), (-1, 0, 1))
        for site in (-1, 0, 1):
            np.testing.assert_allclose(found.features["last"][site][i], alone[site][0, -1].numpy(), atol=1e-4)
            for which in (0, 1):
                whole = residuals(subject, torch.tensor([(*prompt, *data.choices[i][which])]), (site,))[site]
                np.testing.assert_allclose(found.features["pair"][site][i, which], whole[0, -1].numpy(), atol=1e-4)
        logits = Running.start(subject, torch.tensor([prompt])).logits[0]
        assert found.log_odds[i] == pytest.approx(float(logits[13] - logits[12]), abs=1e-4)
    np.testing.assert_allclose(answer_log_odds(subject, data), found.log_odds, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_neither_answer_sees_the_other(toys: Any, family: str) -> None:
    subject, data = toys.subject(family), rows_of(toys)
    turned = Encoded(
        prompts=data.prompts,
        choices=tuple((positive, negative) for negative, positive in data.choices),
        facts=data.facts,
    )
    kinds: tuple[Feature, ...] = ("pair",) if family == "llama" else ("pair", "state-pair")
    one, other = (extract(subject, rows, features=kinds) for rows in (data, turned))
    for kind in kinds:
        for site, x in one.features[kind].items():
            np.testing.assert_allclose(x, other.features[kind][site][:, ::-1], atol=1e-6)
    np.testing.assert_allclose(one.log_odds, -other.log_odds, atol=1e-6)


@pytest.mark.parametrize("family", ["mamba", "rwkv"])
def test_states_are_those_behind_the_statement_and_behind_each_answer(toys: Any, family: str) -> None:
    subject, data = toys.subject(family), rows_of(toys)
    found = extract(subject, data, features=("state", "state-pair"))
    for i, prompt in enumerate(data.prompts[:5]):
        behind = Running.start(subject, torch.tensor([prompt])).state()
        for block, x in found.features["state"].items():
            np.testing.assert_allclose(x[i], behind.flat(block)[0].float().numpy(), rtol=1e-3, atol=1e-4)
        after = Running.start(subject, torch.tensor([(*prompt, *data.choices[i][1])])).state()
        for block, x in found.features["state-pair"].items():
            np.testing.assert_allclose(x[i, 1], after.flat(block)[0].float().numpy(), rtol=1e-3, atol=1e-4)


def test_some_components_of_the_state_and_what_cannot_be_had(toys: Any) -> None:
    mamba, data = toys.subject("mamba"), rows_of(toys)
    conv = extract(mamba, data, features=("state",), components=("conv",), sites=(1,))
    assert {at: x.shape for at, x in conv.features["state"].items()} == {1: (12, 32 * 4)}
    for unknown in (("rnn",), ("conv", "rnn")):
        with pytest.raises(NotFoundError, match=r"component 'rnn'.*conv"):
            extract(mamba, data, features=("state",), components=unknown)
    with pytest.raises(InputError, match="at least one state component"):
        extract(mamba, data, features=("state",), components=())
    with pytest.raises(InputError, match="components are of the state"):
        extract(mamba, data, features=("last",), components=("conv",))
    with pytest.raises(InputError, match="carries no recurrent state"):
        extract(toys.subject("llama"), data, features=("state",))
    with pytest.raises(InputError, match="no rows"):
        extract(mamba, data.take(np.arange(0)))
    broken = toys.subject("mamba")
    with torch.no_grad():
        broken.model.get_input_embeddings().weight[10:12] = float("inf")
    with pytest.raises(InputError, match="NaN or infinity"):
        extract(broken, data)
    with pytest.raises(InputError, match="take fewer rows"):
        extract(mamba, data, most_bytes=100)
    with pytest.raises(NotFoundError, match="state-pair"):
        extract(mamba, data, features=("states",))  # type: ignore[arg-type]
    assert set(extract(toys.subject("llama"), data).features) == {"last", "pair"}


def test_an_extraction_comes_back_and_is_refused_where_it_does_not_fit(toys: Any, tmp_path: Path) -> None:
    subject, data = toys.subject("mamba"), rows_of(toys)
    found = extract(subject, data)
    key = {"subject": subject.hash, "sites": [0, 1]}
    assert not has_split(tmp_path, "test", key=key, data=data.hash)
    save_extraction(found, tmp_path, "test", key=key)
    save_extraction(found.take(np.arange(4)), tmp_path, "validation", key=key)
    assert has_split(tmp_path, "test", key=key, data=data.hash)
    again = load_extraction(tmp_path, "test")
    assert again.subject == subject.hash
    for kind, sites in found.features.items():
        for at, x in sites.items():
            np.testing.assert_array_equal(again.features[kind][at], x)
    np.testing.assert_array_equal(again.facts.base, found.facts.base)
    assert set(load_extraction(tmp_path, "validation", features=("last",)).features) == {"last"}
    with pytest.raises(MismatchError, match="other settings"):
        save_extraction(found, tmp_path, "test", key={**key, "sites": [0]})
    with pytest.raises(MismatchError, match="the key says that the model is another"):
        save_extraction(found, tmp_path, "test", key={**key, "subject": "another"})
    with pytest.raises(MismatchError, match="other rows"):
        has_split(tmp_path, "test", key=key, data="others")
    with pytest.raises(NotFoundError, match="no split train"):
        load_extraction(tmp_path, "train")
    with pytest.raises(NotFoundError, match="elk extract"):
        load_extraction(tmp_path / "none", "test")
    path = tmp_path / "test.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CorruptError, match="checksum"):
        load_extraction(tmp_path, "test")


def test_rows_longer_than_the_model_reads_are_refused_beforehand(toys: Any, tmp_path: Path) -> None:
    llama = toys.subject("llama")
    llama.model.config.max_position_embeddings = 5
    data = toys.rows(4, lengths=(3, 4))  # with the character 4 and 5 tokens, and one more of the answer
    assert len(answer_log_odds(llama, data)) == 8
    assert len(extract(llama, data, features=("last",))) == 8
    long = int((data.lengths[:, 0] == 5).sum())
    assert 0 < long < 8
    with pytest.raises(InputError, match=rf"reads up to 5 tokens; {long} of 8 rows .* has 6; .*--most-tokens 5"):
        extract(llama, data)
    with pytest.raises(InputError, match="has 6"):
        extract_to(llama, data, tmp_path / "out", "test", key={})
    assert not (tmp_path / "out").exists()
    other = Encoded(prompts=((1, 5000),), choices=(((12,), (13,)),), facts=data.facts.take(np.array([0])))
    for work in (extract, answer_log_odds):
        with pytest.raises(MismatchError, match="do not fit"):
            work(toys.subject("mamba"), other)

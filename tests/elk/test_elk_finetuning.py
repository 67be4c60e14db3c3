"""Training quirky models: what is learned, in which order, with which adapters, and going on after a stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exegete.elk import Encoded, FinetuneConfig, encode, finetune, quirky_set
from exegete.elk.adapters import TARGETS, lora_targets
from exegete.elk.finetuning import answer_logits
from exegete.elk.schedule import batch_rows, learned, looks, total_steps
from exegete.errors import CorruptError, InputError, MismatchError, MissingExtraError, NotFoundError
from exegete.files import fault_hook
from exegete.subjects import load_subject

FULL = FinetuneConfig(lora_rank=0, steps=6, batch=8, learning_rate=3e-3, validation_rows=12, checkpoint_every=2)


def test_the_rate_warms_up_and_falls_to_nothing() -> None:
    config = FinetuneConfig(learning_rate=1.0, warmup=0.2)
    rates = [config.rate(step, 10) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[9] == pytest.approx(1 / 8)
    assert looks(12) == {1, 2, 4, 8, 12}
    assert total_steps(100, FinetuneConfig(epochs=2, batch=32)) == 6


def test_every_epoch_reads_each_row_once_in_a_new_order() -> None:
    config = FinetuneConfig(batch=4, seed=1)
    order = np.concatenate([batch_rows(step, 10, config) for step in range(5)])
    assert sorted(order[:10].tolist()) == sorted(order[10:].tolist()) == list(range(10))
    assert order[:10].tolist() != order[10:].tolist()
    np.testing.assert_array_equal(batch_rows(3, 10, config), order[12:16])


def test_labels_are_balanced_for_each_character(toys: Any) -> None:
    facts = toys.facts(50, seed=4)
    data = Encoded(prompts=((1,),) * 100, choices=(((2,), (3,)),) * 100, facts=facts)
    rows = learned(data, FinetuneConfig()).facts
    for alice in (True, False):
        mine = rows.label[rows.alice_speaks == alice]
        assert mine.sum() * 2 == len(mine) > 0
    one = np.flatnonzero(facts.alice_speaks | facts.label)
    with pytest.raises(InputError, match="all rows of Bob"):
        learned(data.take(one), FinetuneConfig())
    only = learned(data, FinetuneConfig(pool="B", balance=False)).facts
    np.testing.assert_array_equal(only.id, facts.id[~facts.alice_speaks])


def test_prompts_of_several_lengths_are_padded_by_mask_not_by_id(toys: Any) -> None:
    """The padding's id is a token of the prompts, as where it is the end-of-text token."""
    model = toys.subject("llama").model
    prompts = [(5, 0, 0), (7,), (0, 3, 2, 0, 0)]
    found = answer_logits(model, prompts, torch.device("cpu"))
    for i, prompt in enumerate(prompts):
        alone = model(input_ids=torch.tensor([prompt])).logits[0, -1]
        torch.testing.assert_close(found[i], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["mamba", "rwkv", "llama"])
def test_a_model_learns_what_the_characters_say_and_the_given_one_stays(toys: Any, family: str) -> None:
    subject = toys.subject(family)
    train, validation = toys.rows(60, lengths=(3, 4)), toys.rows(20, seed=1, prefix="v", lengths=(3, 4))
    before = {name: p.clone() for name, p in subject.model.state_dict().items()}
    found = finetune(subject, train, validation, config=FinetuneConfig(lora_rank=0, steps=25, learning_rate=1e-2))
    assert all(torch.equal(p, before[name]) for name, p in subject.model.state_dict().items())
    losses = dict(found.history)
    assert losses[0] > 2 * min(losses.values())
    assert losses[found.best_step] == min(losses.values())
    again = finetune(subject, train, validation, config=FinetuneConfig(lora_rank=0, steps=25, learning_rate=1e-2))
    assert again.history == found.history
    assert not any(p.requires_grad for p in found.subject.model.parameters())


def test_only_the_answers_first_token_counts(toys: Any) -> None:
    """The loss of the untrained model is the mean of −log p of that token, worked out by hand."""
    subject, rows = toys.subject("mamba"), toys.rows(4)
    found = finetune(subject, toys.rows(8, prefix="t"), rows, config=FinetuneConfig(lora_rank=0, steps=1))
    wanted = []
    for prompt, label in zip(rows.prompts, rows.facts.label.tolist(), strict=True):
        logits = subject.model(input_ids=torch.tensor([prompt])).logits[0, -1]
        wanted.append(-float(logits.log_softmax(dim=-1)[13 if label else 12]))
    assert found.history[0][0] == 0
    assert found.history[0][1] == pytest.approx(np.mean(wanted), rel=1e-4)


@pytest.fixture(scope="module")
def spoken(toys: Any) -> tuple[Any, Encoded, Encoded]:
    subject = toys.subject("mamba")
    made = quirky_set("addition", train=24, validation=8, test=1, digits=1)
    return subject, encode(made, "train", subject), encode(made, "validation", subject)


class StoppedError(Exception):
    pass


def test_a_stopped_training_goes_on_to_the_same_bits(spoken: tuple[Any, Encoded, Encoded], tmp_path: Path) -> None:
    subject, train, validation = spoken
    whole = finetune(subject, train, validation, out=tmp_path / "whole", config=FULL)
    seen = 0

    def stop(name: str) -> None:
        nonlocal seen
        if name == "after rename checkpoint.pt":
            seen += 1
            if seen == 2:
                raise StoppedError

    with fault_hook(stop), pytest.raises(StoppedError):
        finetune(subject, train, validation, out=tmp_path / "parts", config=FULL)
    assert (tmp_path / "parts" / "checkpoint.pt").is_file()
    parts = finetune(subject, train, validation, out=tmp_path / "parts", config=FULL)
    assert parts.history == whole.history
    assert parts.subject.hash == whole.subject.hash
    assert not (tmp_path / "parts" / "checkpoint.pt").exists()
    loaded = load_subject(str(tmp_path / "parts" / "model"), device="cpu")
    assert loaded.hash == whole.subject.hash
    done = finetune(subject, train, validation, out=tmp_path / "parts", config=FULL)
    assert (done.history, done.subject.hash) == (whole.history, whole.subject.hash)


def test_a_folder_of_other_settings_or_a_damaged_checkpoint_is_refused(
    spoken: tuple[Any, Encoded, Encoded], tmp_path: Path
) -> None:
    subject, train, validation = spoken
    config = FinetuneConfig(lora_rank=0, steps=2, batch=4, checkpoint_every=1)
    finetune(subject, train, validation, out=tmp_path, config=config)
    with pytest.raises(MismatchError, match="seed"):
        finetune(subject, train, validation, out=tmp_path, config=FinetuneConfig(lora_rank=0, steps=2, seed=1))
    (tmp_path / "finetune.json").unlink()
    (tmp_path / "checkpoint.pt").write_bytes(b"nothing")
    with pytest.raises(CorruptError, match="train anew"):
        finetune(subject, train, validation, out=tmp_path, config=config)


def test_bad_settings_are_refused_in_one_line(toys: Any) -> None:
    data = toys.rows(4)
    with pytest.raises(InputError, match="share base examples"):
        finetune(toys.subject("mamba"), data, data, config=FULL)
    for change in ({"batch": 0}, {"learning_rate": float("nan")}, {"warmup": 1.0}, {"lora_rank": -1}, {"seed": -1}):
        with pytest.raises(InputError):
            FinetuneConfig(**change)
    with pytest.raises(NotFoundError, match="pool"):
        FinetuneConfig(pool="C")
    with pytest.raises(InputError, match="no validation rows"):
        finetune(
            toys.subject("mamba"),
            data,
            toys.rows(2, prefix="v").take(np.array([0, 2])),
            config=FinetuneConfig(pool="B", lora_rank=0, balance=False),
        )


def test_rows_longer_than_the_model_reads_are_refused_beforehand(toys: Any, tmp_path: Path) -> None:
    llama = toys.subject("llama")
    llama.model.config.max_position_embeddings = 4
    train, validation = toys.rows(8, lengths=(3,)), toys.rows(8, prefix="v", lengths=(3, 4))
    for some, others in ((train, validation), (validation, train)):
        with pytest.raises(InputError, match="reads up to 4 tokens"):
            finetune(llama, some, others, out=tmp_path / "out", config=FULL)
    assert not (tmp_path / "out").exists()


def test_adapters_go_where_they_work(toys: Any) -> None:
    assert lora_targets(toys.subject("mamba").model) == ("in_proj", "x_proj", "out_proj")
    assert lora_targets(toys.subject("rwkv").model) == ("key", "value", "receptance", "output")
    assert "o_proj" not in lora_targets(toys.subject("llama").model)
    assert TARGETS["gpt_neox"] == ("query_key_value", "dense_h_to_4h", "dense_4h_to_h")
    with pytest.raises(InputError, match="dt_proj would do nothing"):
        lora_targets(toys.subject("mamba").model, ("in_proj", "dt_proj"))
    with pytest.raises(InputError, match=r"it has: .*in_proj"):
        lora_targets(toys.subject("mamba").model, ("q_proj",))
    with pytest.raises(InputError, match="no linear module named lm_head"):  # no block has it
        lora_targets(toys.subject("mamba").model, ("in_proj", "lm_head"))
    strange = toys.subject("llama").model
    strange.config.model_type = "strange"
    with pytest.raises(InputError, match="--lora-targets"):
        lora_targets(strange)


def test_without_peft_the_install_line_is_given(toys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match="pip install"):
        finetune(toys.subject("llama"), toys.rows(4), toys.rows(2, prefix="v"), config=FinetuneConfig(steps=1))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["mamba", "rwkv", "llama"])
def test_adapters_learn_are_merged_and_are_in_pefts_format(toys: Any, family: str, tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft")
    subject = toys.subject(family)
    made = quirky_set("addition", train=24, validation=8, test=1, digits=1)
    train, validation = encode(made, "train", subject), encode(made, "validation", subject)
    config = FinetuneConfig(steps=4, batch=8, learning_rate=1e-2, lora_rank=2, lora_alpha=4)
    found = finetune(subject, train, validation, out=tmp_path, config=config)
    assert found.best_step > 0
    names = {name for name, _ in found.subject.model.named_parameters()}
    assert names == {name for name, _ in subject.model.named_parameters()}
    changed = {
        name.split(".")[-2]
        for name, p in found.subject.model.named_parameters()
        if not torch.equal(p, subject.model.get_parameter(name))
    }
    assert changed == set(lora_targets(subject.model))
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["r"] == 2
    if family != "mamba":  # peft itself refuses Mamba's out_proj
        wrapped = peft.PeftModel.from_pretrained(toys.subject(family).model, str(tmp_path / "adapter"))
        tokens = torch.tensor([train.prompts[0]])
        torch.testing.assert_close(
            wrapped(input_ids=tokens).logits, found.subject.model(input_ids=tokens).logits, atol=1e-4, rtol=1e-3
        )

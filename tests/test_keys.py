"""Scores rest on models, not on how these were named."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from exegete.config import RunConfig
from exegete.demo import assets
from exegete.keys import Keys, held_against_others, key_of
from exegete.llm.backend import Capabilities
from exegete.llm.client import LLMClient
from exegete.llm.identity import embedder_identity, is_demo, model_identity
from exegete.llm.local import TransformersBackend
from exegete.llm.reading import reader_name
from exegete.llm.scripted import ScriptedClient
from exegete.runs import Run
from exegete.types import LLMReply, LLMRequest


class Served(LLMClient):
    """A language model of a server; ``reads`` says whether it gives the log probabilities of prompts."""

    def __init__(self, name: str, *, reads: bool = False) -> None:
        self._name, self._reads = name, reads

    @property
    def name(self) -> str:
        return self._name

    async def reply(self, request: LLMRequest) -> LLMReply:
        return LLMReply(text="", finish="stop")

    async def check(self) -> None: ...

    async def capabilities(self) -> Capabilities:
        return Capabilities(prompt_logprobs=self._reads)

    async def close(self) -> None: ...


def key(scorer: str, llm: LLMClient | None = None, *, reader: str = "subject", **more: Any) -> str:
    base = RunConfig.from_dict({"subject": "s", "coder": ["c"], "scoring": {"reader": reader}})
    return key_of(Keys(Run(Path("nowhere")), base).score(scorer, llm, "explained", **more))


@pytest.fixture
def model(toy_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_folder / "model", tmp_path / "model"))


def change_a_weight(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def test_a_reader_in_a_folder_is_known_by_what_lies_there(model: Path, tmp_path: Path) -> None:
    before = key("surprisal", reader=f"hf/{model}")
    elsewhere = shutil.copytree(model, tmp_path / "elsewhere")
    assert key("surprisal", reader=f"hf/{elsewhere}") == before
    assert key("intervention", reader=f"hf/{elsewhere}") == key("intervention", reader=f"hf/{model}")
    change_a_weight(elsewhere)
    assert key("surprisal", reader=f"hf/{elsewhere}") != before
    tokenizer = next(model.glob("tokenizer*.json"))
    tokenizer.write_text(tokenizer.read_text() + " ")
    assert key("surprisal", reader=f"hf/{model}") != before


def test_a_judge_in_a_folder_is_known_by_what_lies_there(model: Path, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(model, tmp_path / "elsewhere")
    before = key("detection", Served(f"hf/{model}"))
    assert key("detection", Served(f"hf/{elsewhere}")) == before
    assert key("detection", Served(f"vllm/{elsewhere}")) != before
    change_a_weight(elsewhere)
    assert key("detection", Served(f"hf/{elsewhere}")) != before


def test_the_spec_still_says_what_the_user_named(model: Path) -> None:
    config = RunConfig.from_dict({"subject": "s", "coder": ["c"], "scoring": {"reader": f"hf/{model}"}})
    spec = Keys(Run(Path("nowhere")), config).score("surprisal", None, "explained")
    assert spec["judge"] == f"hf/{model} (reader)"
    assert spec["reader"] == f"hf/{model}"
    assert str(model) not in key_of(spec)


def test_an_embedder_in_a_folder_is_known_by_all_its_files(tmp_path: Path) -> None:
    here, there = tmp_path / "a", tmp_path / "b"
    (here / "1_Pooling").mkdir(parents=True)
    (here / "modules.json").write_text("[]")
    (here / "1_Pooling" / "config.json").write_text('{"mean": true}')
    shutil.copytree(here, there)
    scorer = "embedding:embedder={}".format
    assert key(scorer(here)) == key(scorer(there))
    (there / "1_Pooling" / "config.json").write_text('{"mean": false}')
    assert key(scorer(here)) != key(scorer(there))
    assert embedder_identity("sentence-transformers/all-MiniLM-L6-v2") is None
    assert key("embedding:embedder=x/one") != key("embedding:embedder=x/two")


def test_auto_is_who_reads_in_the_end() -> None:
    assert reader_name("auto", None) == reader_name("auto", Served("http://h/v1#m")) == "subject"
    assert reader_name("auto", Served("http://h/v1#m", reads=True)) == "http://h/v1#m"
    assert reader_name("auto", ScriptedClient([], capabilities=Capabilities(prompt_logprobs=True))) == "subject"
    subject = key("surprisal", reader="subject")
    assert key("surprisal", reader="auto") == subject
    assert key("surprisal", Served("http://h/v1#m", reads=True), reader="auto") != subject
    assert key("surprisal", Served("http://h/v1#m", reads=True), reader="auto") == key(
        "surprisal", reader="http://h/v1#m"
    )


def test_names_that_are_no_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    assert model_identity("hf/org/model") is model_identity("http://h/v1#m") is model_identity("rule") is None
    (tmp_path / "empty").mkdir()
    assert model_identity(f"hf/{tmp_path / 'empty'}") is None
    assert embedder_identity(str(tmp_path)) is None


def test_only_scorers_that_contrast_rest_on_what_else_is_explained() -> None:
    assert key("detection", among=[1, 2]) == key("detection", among=[1, 2, 3])
    assert key("discrimination", among=[1, 2]) != key("discrimination", among=[1, 2, 3])
    assert key("discrimination", among=[2, 1]) == key("discrimination", among=[1, 2])


def test_stages_that_differ_in_what_else_is_explained_are_found() -> None:
    keys = Keys(Run(Path("nowhere")), RunConfig.from_dict({"subject": "s", "coder": ["c"]}))
    fewer, more = (keys.score("discrimination", None, "x", among=range(n)) for n in (3, 4))
    older = {name: value for name, value in fewer.items() if name != "contrasted"}  # before it was part of the key
    other = keys.score("discrimination:near=2", None, "x", among=range(3))
    stages = {key_of(s): ("discrimination", s) for s in (fewer, more, older, other)} | {
        "e": ("explain", {"coder": "c"})
    }
    assert set(held_against_others(more, stages)) == {key_of(fewer), key_of(older)}
    assert held_against_others(keys.score("detection", None, "x"), stages) == []


def test_the_demos_model_is_no_model_of_natural_language_wherever_it_lies(tmp_path: Path, toy_folder: Path) -> None:
    elsewhere = shutil.copytree(assets() / "model", tmp_path / "model")
    assert is_demo(f"hf/{elsewhere}")
    assert not TransformersBackend(str(elsewhere)).natural
    assert TransformersBackend(str(toy_folder / "model")).natural
    assert TransformersBackend("org/name").natural
    assert not ScriptedClient([]).natural
    assert Served("http://h/v1#m").natural


def test_settings_of_a_reader_change_nothing_for_scorers_without_one() -> None:
    assert key("detection", reader="subject") == key("detection", reader="auto")
    base = RunConfig.from_dict({"subject": "s", "coder": ["c"]})
    spec = Keys(Run(Path("nowhere")), dataclasses.replace(base, donors=3)).score("detection", None, "x")
    assert "identities" not in spec


def test_folders_that_happen_to_be_called_so_are_no_judges(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("subject", "rule", "org/name")
    scorers = (("surprisal", None), ("detection", None), ("detection", Served("org/name")))
    before = [key(scorer, llm) for scorer, llm in scorers]
    for name in names:
        shutil.copytree(model, tmp_path / "here" / name)
    monkeypatch.chdir(tmp_path / "here")
    assert [key(scorer, llm) for scorer, llm in scorers] == before
    assert key("embedding:embedder=org/name") != key("embedding:embedder=org/other")


def test_what_a_language_model_says_beside_the_reader_rests_on_it_too(model: Path) -> None:
    one, two = Served("http://h/v1#one"), Served("http://h/v1#two")
    assert key("intervention", one) == key("intervention", two) == key("intervention")
    for variant in ("intervention:explain=effect", "intervention:faithful=true"):
        assert key(variant, one) != key(variant, two)
        elsewhere = Path(shutil.copytree(model, model.parent / f"copy of {len(variant)}"))
        assert key(variant, Served(f"hf/{model}")) == key(variant, Served(f"hf/{elsewhere}"))


@pytest.mark.parametrize("name", ["spiece.model", "sentencepiece.bpe.model", "tekken.json", "vocab.txt"])
def test_a_tokenizer_of_any_form_tells_models_apart(model: Path, name: str) -> None:
    before = key("surprisal", reader=f"hf/{model}")
    (model / name).write_text("{}")
    assert key("surprisal", reader=f"hf/{model}") != before


def test_a_model_of_this_process_is_not_loaded_to_say_that_it_can_read(monkeypatch: pytest.MonkeyPatch) -> None:
    async def loads(self: Served) -> Capabilities:
        raise AssertionError("a model was loaded for a key")

    monkeypatch.setattr(Served, "capabilities", loads)
    for name in ("hf/org/model", "vllm/org/model"):
        assert reader_name("auto", Served(name)) == name
    with pytest.raises(AssertionError):
        reader_name("auto", Served("http://h/v1#m"))

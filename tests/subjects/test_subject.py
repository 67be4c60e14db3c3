from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from exegete.errors import CorruptError, InputError, MismatchError, MissingExtraError, NotFoundError
from exegete.subjects import load_subject
from exegete.subjects.load import looks_like_path
from exegete.subjects.subject import Subject
from exegete.testing import BOS, TEXTS, toy_llama, toy_model, toy_tokenizer, toy_topk_coder

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any look-up on the hub fails at once, as on a machine without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def subject(llama: Path) -> Subject:
    return load_subject(str(llama), device="cpu")


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def test_loaded_subject(subject: Subject, llama: Path) -> None:
    assert subject.name == str(llama)
    assert subject.dtype == torch.float32
    assert subject.device.type == "cpu"
    assert not subject.model.training
    assert not any(p.requires_grad for p in subject.model.parameters())
    assert subject.bos == 0
    assert len(subject.hash) == 16
    assert subject.hookpoints()[:3] == ("embed_tokens", "layers.0", "layers.0.self_attn")
    assert "layers" not in subject.hookpoints()


def test_hash_follows_the_files(subject: Subject, llama: Path, copied: Path, tmp_path: Path) -> None:
    again = load_subject(str(copied))
    assert again.hash == subject.hash
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert load_subject(str(copied)).hash != subject.hash
    assert load_subject(str(toy_llama(tmp_path / "other", seed=1))).hash != subject.hash


def test_hash_of_a_model_without_files_is_its_tensors(subject: Subject) -> None:
    first = Subject(subject.model, subject.tokenizer, name="a")
    assert first.hash == Subject(subject.model, subject.tokenizer, name="b").hash
    config = transformers.LlamaConfig(**subject.model.config.to_dict())
    assert Subject(toy_model(config, seed=5), subject.tokenizer, name="a").hash != first.hash


def test_table_decodes_as_the_tokenizer_does(subject: Subject) -> None:
    table = subject.token_table()
    assert table.special == {0}
    assert len(table) == len(subject.tokenizer)
    assert sorted(table.pieces[1:257]) == [bytes([b]) for b in range(256)]
    for text in TEXTS:
        assert table.decode(subject.tokenizer(text)["input_ids"]) == text


@given(text=st.text(max_size=40))
@settings(max_examples=60, deadline=None)
def test_table_round_trip(text: str) -> None:
    tokenizer, table = _cached()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if 0 not in ids:
        assert b"".join(table.pieces[i] for i in ids).decode() == text


_CACHE: list[Any] = []


def _cached() -> tuple[Any, Any]:
    if not _CACHE:
        from exegete.subjects.pieces import token_table

        tokenizer = toy_tokenizer()
        _CACHE.append((tokenizer, token_table(tokenizer)))
    return _CACHE[0][0], _CACHE[0][1]


def test_table_of_added_tokens() -> None:
    from exegete.subjects.pieces import token_table

    tokenizer = toy_tokenizer()
    tokenizer.add_tokens(["  ", "Ġé"])
    table = token_table(tokenizer)
    assert table.pieces[-2:] == (b"  ", "Ġé".encode())
    assert table.pieces[0] == BOS.encode()


def test_table_of_sentencepiece_pieces() -> None:
    from tokenizers import Tokenizer, decoders, models

    from exegete.subjects.pieces import token_table

    vocabulary = {"<s>": 0, "<unk>": 1, "<0x0A>": 2, "<0xE2>": 3, "▁": 4, "▁the": 5, "é": 6, "▁▁": 7}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")
    table = token_table(tokenizer)
    assert table.pieces == (b"<s>", b"<unk>", b"\n", b"\xe2", b" ", b" the", "é".encode(), b"  ")
    assert table.special == {0, 1}
    ids = [5, 6, 2, 5]
    assert table.decode(ids).removeprefix(" ") == tokenizer.decode(ids)


def test_table_of_other_schemes() -> None:
    from exegete.subjects.pieces import token_table

    class Plain:
        name_or_path = "plain"
        added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012
        all_special_ids = (0, 99)

        def __init__(self, *texts: str | bytes) -> None:
            self.texts = texts

        def get_vocab(self) -> dict[str | bytes, int]:
            return {text: 2 * i for i, text in enumerate(self.texts)}

        def convert_tokens_to_string(self, tokens: list[str]) -> str:
            return tokens[0].upper()

    assert token_table(Plain("a", "bc")).pieces == (b"A", b"", b"BC")
    assert token_table(Plain("a", "bc")).special == {0}
    assert token_table(Plain("a", "Ġbc", "Ã")).pieces == (b"a", b"", b" bc", b"", b"\xc3")
    assert token_table(Plain("▁a", "Ġ")).pieces == (b" a", b"", "Ġ".encode())
    assert token_table(Plain("a", b"\xff")).pieces == (b"A", b"", b"\xff")
    with pytest.raises(InputError, match="no vocabulary"):
        token_table(Plain())


def test_table_of_wordpiece() -> None:
    from tokenizers import Tokenizer, decoders, models

    from exegete.subjects.pieces import token_table

    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    assert token_table(tokenizer).pieces == (b"[UNK]", b" play", b"ing")


def test_resolve(subject: Subject) -> None:
    assert subject.resolve("model.layers.*.mlp") == ("layers.0.mlp", "layers.1.mlp", "layers.2.mlp")
    assert subject.resolve("blocks.2.hook_resid_pre") == ("layers.1",)
    assert subject.resolve("blocks.1.mlp.hook_in") == ("layers.1.mlp",)
    assert subject.points("blocks.0.hook_resid_pre") == (("layers.0", "input"),)
    with pytest.raises(InputError, match=r"input of 'layers\.0'"):
        subject.resolve("blocks.0.hook_resid_pre")
    with pytest.raises(NotFoundError, match=r"layers\.2"):
        subject.resolve("layers.3")


def test_sizes(subject: Subject) -> None:
    assert subject.d("layers.1", "output") == 32
    assert subject.d("layers.1.mlp", "input") == 32
    assert subject.d("layers.1.mlp.down_proj", "input") == 64
    assert subject.d("layers.1.mlp.up_proj", "output") == 64
    assert subject.d("layers.1.mlp.act_fn", "output") == 64
    assert subject.d("blocks.1.mlp.hook_post", "output") == 64
    with pytest.raises(InputError, match="stands for 3 hookpoints"):
        subject.d("layers.*", "output")


def test_tokens_of_another_tokenizer(subject: Subject) -> None:
    with pytest.raises(MismatchError, match=r"0 to 400 do not fit the \d+ embeddings"):
        subject.capture(torch.tensor([[0, 400]]), None, [("layers.0", "output")])
    with pytest.raises(MismatchError, match="-1 to 3"):
        subject.capture(torch.tensor([[-1, 3]]), None, [("layers.0", "output")])
    with pytest.raises(InputError, match="rows, positions"):
        subject.capture(torch.tensor([1]), None, [("layers.0", "output")])
    with pytest.raises(InputError, match="differ in shape"):
        subject.capture(torch.tensor([[1]]), torch.ones(1, 2), [("layers.0", "output")])


@pytest.mark.parametrize(
    ("spec", "expected"),
    [("/a/b", True), ("./x", True), ("../x", True), ("~/x", True), ("a/b/c", True), ("x/", True), ("tests/none", True),
     ("", True), ("a b", True), ("gpt2", False), ("EleutherAI/pythia-70m", False), ("C:\\x", True), ("-x/y", True)],
)  # fmt: skip
def test_paths_and_hub_ids(spec: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests").mkdir()
    monkeypatch.chdir(tmp_path)
    assert looks_like_path(spec) == expected


def test_a_missing_folder_never_tries_the_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("the network was tried")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(NotFoundError, match="there is no folder"):
        load_subject(str(tmp_path / "none"))


def test_a_hub_that_cannot_be_reached() -> None:
    with pytest.raises(NotFoundError, match=r"ORG-THAT/IS-NOT.*check the id and the connection"):
        load_subject("ORG-THAT/IS-NOT")


def test_no_model_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        load_subject(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CorruptError):
        load_subject(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CorruptError, match="does not hold settings"):
        load_subject(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(InputError, match="nonsense"):
        load_subject(str(tmp_path))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_remote_code_is_refused_and_never_run(copied: Path, name: str) -> None:
    witness = copied / "ran"
    (copied / "code.py").write_text(f"open({str(witness)!r}, 'w')\n")
    config = json.loads((copied / name).read_text())
    (copied / name).write_text(json.dumps({**config, "auto_map": {"AutoConfig": "code.Config"}}))
    with pytest.raises(InputError, match=rf"its own Python code \(auto_map in {name}\).*remote_code"):
        load_subject(str(copied))
    assert not witness.exists()


def test_damaged_and_missing_weights(copied: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = copied / "model.safetensors"
    tensors = load_file(weights)
    save_file({n: t for n, t in tensors.items() if "layers.1.mlp.up" not in n}, weights, metadata={"format": "pt"})
    with pytest.raises(CorruptError, match=r"lacks 1 weights .*layers\.1\.mlp\.up_proj\.weight"):
        load_subject(str(copied))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises((CorruptError, InputError), match="copy"):
        load_subject(str(copied))
    weights.unlink()
    with pytest.raises(NotFoundError, match=r"copy' has a config\.json but no weights"):
        load_subject(str(copied))


@pytest.mark.parametrize("names", [["tokenizer.json", "tokenizer_config.json"], ["tokenizer.json"]])
def test_a_folder_without_tokenizer(copied: Path, names: list[str]) -> None:
    for name in names:
        (copied / name).unlink()
    with pytest.raises(InputError, match=r"copy' has no tokenizer.*tokenizer\.save_pretrained") as refused:
        load_subject(str(copied))
    assert "\n" not in str(refused.value)


def test_coders_are_no_subject(copied: Path, tmp_path: Path) -> None:
    coder = tmp_path / "release" / "blocks.3.hook_resid_pre"
    coder.mkdir(parents=True)
    (coder / "cfg.json").write_text("{}")
    (coder / "sae_weights.safetensors").touch()
    for folder in (coder, coder.parent, toy_topk_coder(tmp_path / "sparsify")):
        with pytest.raises(InputError, match="looks like a coder: give it as the coder"):
            load_subject(str(folder))


def test_a_repository_without_config(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError("jbloom/SAEs does not appear to have a file named config.json.\nCheckout 'https://…' for files.")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(NotFoundError, match=r"'jbloom/SAEs' is no model: it has no config\.json; if it holds coders"):
        load_subject("jbloom/SAEs")


def test_weights_and_config_that_do_not_belong_together(copied: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    with pytest.raises(CorruptError, match=r"other shapes than its config\.json says"):
        load_subject(str(copied))
    assert "MISMATCH" not in capfd.readouterr().err
    (copied / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json; put the config\.json of the model beside its weights"):
        load_subject(str(copied))


def test_device_maps(llama: Path, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    spread = load_subject(str(llama), device_map="auto", dtype="float32")
    assert spread.hash == subject.hash
    assert spread.device == spread.model.get_input_embeddings().weight.device
    ids = torch.tensor([[1, 2, 3]])
    point: Any = ("layers.1", "output")
    value = spread.capture(ids, None, [point])[point]
    assert value.device == spread.model.base_model.layers[1].mlp.up_proj.weight.device
    torch.testing.assert_close(value.cpu(), subject.capture(ids, None, [point])[point], rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="unknown device map 'cuda:0'; allowed: auto, balanced"):
        load_subject(str(llama), device_map="cuda:0")
    with pytest.raises(InputError, match="leave out device 'cpu'"):
        load_subject(str(llama), device_map="auto", device="cpu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'exegete\[big\]'"):
        load_subject(str(llama), device_map="auto")


def test_devices_and_dtypes(llama: Path) -> None:
    assert load_subject(str(llama), device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    assert load_subject(str(llama), device="cpu", dtype=torch.float16).dtype == torch.float16
    with pytest.raises(InputError, match="unknown dtype 'int8'; allowed: auto, float32"):
        load_subject(str(llama), dtype="int8")
    with pytest.raises(InputError, match="unknown device 'tpuu'"):
        load_subject(str(llama), device="tpuu")
    with pytest.raises(InputError, match="no device 'cuda:77'"):
        load_subject(str(llama), device="cuda:77")

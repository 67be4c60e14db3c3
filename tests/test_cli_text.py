"""Packed rows and conversations through the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exegete.cli import main
from exegete.runs import Run, open_run
from exegete.testing import toy_subject_model, toy_topk_coder

SIZES = ["--n-train", "8", "--n-test", "8", "--n-negatives", "8", "--min-train", "2", "--min-test", "2"]
FEW = ["--latents", "6", "--donors", "2", "--window", "6", "-q", *SIZES]
TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """Run a command that must be refused; return its one line."""
    assert main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("exegete: ")
    return line


def collected(model: Path, coders: Path, out: Path, *options: str) -> Run:
    few = [*FEW, "--hookpoints", "layers.0", "--batch-tokens", "512", "--threads", "1"]
    assert main(["collect", str(model), str(coders), "--out", str(out), *few, *options]) == 0
    return open_run(out)


def reported(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("explain", "score", "report"):
        assert main([command, str(run.folder), "-q"]) == 0
    assert str(run.report_path) in capsys.readouterr().out
    assert run.report_path.is_file()
    assert len(run.table("scores")["value"]) > 0


@pytest.fixture(scope="module")
def short(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents that fit into half a row."""
    texts = [json.loads(line)["text"] for line in (toy_folder / "text.jsonl").read_text().splitlines()]
    sizes = np.random.default_rng(0).integers(20, 90, 2 * len(texts))
    path = tmp_path_factory.mktemp("short") / "short.jsonl"
    path.write_text(
        "".join(json.dumps({"text": text[:n]}) + "\n" for text, n in zip(texts * 2, sizes.tolist(), strict=True))
    )
    return path


def by_document(run: Run) -> dict[int, dict[tuple[int, int], float]]:
    """Firings of each document that lies in one row whole: (place in the document, latent) to value."""
    store, rows = run.store("layers.0"), run.corpus.rows(slice(None))
    begins: dict[int, tuple[int, int]] = {}
    cut = set()
    for row, documents in enumerate(rows.documents.tolist()):
        for position, document in enumerate(documents):
            if document >= 0 and begins.setdefault(document, (row, position))[0] != row:
                cut.add(document)
    found: dict[int, dict[tuple[int, int], float]] = {document: {} for document in begins.keys() - cut}
    for index, firings in enumerate(store.block(0, store.width)):
        for row, position, value in zip(firings.rows, firings.positions, firings.values, strict=True):
            document = int(rows.documents[row, position])
            if document in found:
                found[document][int(position) - begins[document][1], index] = float(value)
    return found


def test_packed_documents_that_see_themselves_alone_fire_as_alone(
    toy_folder: Path, short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, coders = toy_folder / "model", toy_folder / "coders"
    given = ["--text", str(short), "--row-length", "64", "--bos", "document"]
    alone = collected(model, coders, tmp_path / "alone", *given)
    packed = collected(model, coders, tmp_path / "packed", *given, "--packing", "--attend", "document")
    mixed = collected(model, coders, tmp_path / "mixed", *given, "--packing")
    assert packed.corpus.n_rows < alone.corpus.n_rows / 1.5
    assert packed.config.corpus.packing
    assert packed.config.corpus.attend == "document"
    wanted, found, other = by_document(alone), by_document(packed), by_document(mixed)
    assert len(found) > len(wanted) / 2
    differing = 0
    for document, firings in found.items():
        assert firings.keys() == wanted[document].keys()
        for place, value in firings.items():
            assert value == pytest.approx(wanted[document][place], rel=2**-9)
        differing += other[document].keys() != firings.keys()
    assert differing > len(found) / 4  # what stands before a document in its row is seen without the option
    reported(packed, capsys)


@pytest.fixture(scope="module")
def chat_model(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy subject with a chat template."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(toy_folder / "model", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def talks(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [json.loads(line)["text"] for line in (toy_folder / "text.jsonl").read_text().splitlines()]
    path = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    with path.open("w") as file:
        for text in texts:
            talk = [
                {"role": "user", "content": "USER " + text[:80].strip()},
                {"role": "assistant", "content": "ASSISTANT " + text[80:300].strip()},
            ]
            file.write(json.dumps({"messages": talk, "text": text}) + "\n")
    return path


@pytest.mark.parametrize("packing", [False, True])
def test_only_the_assistants_tokens_count(
    packing: bool, toy_folder: Path, chat_model: Path, talks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--text", str(talks), "--column", "messages", "--chat", "assistant", "--row-length", "64"]
    run = collected(chat_model, toy_folder / "coders", tmp_path / "run", *given, *(("--packing",) if packing else ()))
    store, rows, table = run.store("layers.0"), run.corpus.rows(slice(None)), run.corpus.table
    fired = np.zeros(rows.tokens.shape, bool)
    for firings in store.block(0, store.width):
        fired[firings.rows, firings.positions] = True
    assert (fired == store.rows(slice(None)).mask).all()  # a TopK coder fires wherever firings count
    counted = b"".join(table.pieces[i] for i in rows.tokens[rows.mask]).decode()
    said = [json.loads(line)["messages"][1]["content"] for line in talks.read_text().splitlines()]
    assert counted.split() == " ".join(said).split()
    whole = b"".join(table.pieces[i] for i in rows.tokens[rows.documents >= 0]).decode()
    assert "USER" in whole
    reported(run, capsys)


def test_conversations_that_cannot_be_read(
    toy_folder: Path, chat_model: Path, talks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def line(model: Path, *options: str) -> str:
        where = ["--text", talks, "--row-length", "64", "--out", tmp_path / "run", *FEW]
        said = refused(capsys, "collect", model, toy_folder / "coders", *where, *options)
        assert not (tmp_path / "run" / "manifest.json").exists()
        return said

    chat = ["--column", "messages", "--chat", "all"]
    assert "the tokenizer has no chat template" in line(toy_folder / "model", *chat)
    assert "text" in line(chat_model, "--chat", "all")
    assert "speech" in line(chat_model, "--column", "speech", "--chat", "all")
    assert "messages" in line(chat_model, "--column", "messages")
    assert "set corpus.packing too" in line(chat_model, *chat, "--separator", "eos")
    assert "EOS" in line(chat_model, *chat, "--packing", "--separator", "eos")


def test_a_subject_that_mixes_packed_documents_is_refused_and_the_advice_can_be_followed(
    toy_folder: Path, short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [json.loads(line)["text"] for line in (toy_folder / "text.jsonl").read_text().splitlines()]
    model = toy_subject_model("mamba", tmp_path / "mamba", texts=texts)
    coders = toy_topk_coder(tmp_path / "coders", d=32, hookpoints=("layers.0",))
    given = ["collect", model, coders, "--text", short, "--row-length", "64", "--out", tmp_path / "run", *FEW]
    capsys.readouterr()  # of writing the model
    line = refused(capsys, *given, "--packing", "--attend", "document")
    assert not (tmp_path / "run" / "corpus").exists()
    assert "carries a state from token to token" in line
    assert "corpus.attend: row" in line
    assert main([str(a) for a in (*given, "--packing", "--attend", "row")]) == 0
    assert "firings of" in capsys.readouterr().out

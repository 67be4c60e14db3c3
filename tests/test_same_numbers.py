"""Promise 7 at small scale: with one batch plan nothing changes a firing; across plans only near ties do."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exegete import collecting
from exegete.coders import JumpReLU, LinearCoder, SparseCoder, TopK, load_coders
from exegete.coders.coder import Point
from exegete.collecting import collect_firings, passes
from exegete.collecting.job import Gathering
from exegete.collecting.passes import ReadableSubject
from exegete.config import CollectConfig, CorpusConfig
from exegete.files import fault_hook
from exegete.store import compaction
from exegete.store.corpus import Corpus, build_corpus, text_documents
from exegete.store.store import Store
from exegete.store.values import encode_values
from exegete.subjects import Subject, load_subject
from exegete.tokens import TokenTable
from exegete.types import Side, SparseCode

LENGTH, ROWS = 32, 8
NEAR = 1e-5
CONFIG = CollectConfig(batch_tokens=ROWS * LENGTH, threads=1, sink_norm=0.0)

Place = tuple[int, int]
"""Row and position."""


class Stopped(BaseException):
    """The process was stopped."""


@pytest.fixture(scope="module")
def subject(toy_folder: Path) -> Subject:
    return load_subject(str(toy_folder / "model"), device="cpu")


@pytest.fixture(scope="module")
def coders(toy_folder: Path) -> dict[str, SparseCoder]:
    loaded = load_coders(str(toy_folder / "coders"))
    own = loaded["layers.0"]
    assert isinstance(own, LinearCoder)
    jump = LinearCoder(
        name="jump",
        hookpoint=own.hookpoint,
        encoder=own.encoder,
        encoder_bias=own.encoder_bias,
        decoder=own.decoder,
        decoder_bias=own.decoder_bias,
        activation=JumpReLU(torch.full((own.width,), 1.0)),
        subtract_decoder_bias=own.subtract_decoder_bias,
    )
    return {"layers.0.mlp": loaded["layers.0.mlp"], "jump": jump}


@pytest.fixture(scope="module")
def corpus(toy_folder: Path, subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    config = CorpusConfig(text=(str(toy_folder / "text.jsonl"),), row_length=LENGTH, max_tokens=3000)
    folder = tmp_path_factory.mktemp("corpus")
    return build_corpus(folder, text_documents(config.text), subject.tokenizer, config, table=subject.token_table())


@pytest.fixture(scope="module")
def reference(
    subject: Subject, coders: dict[str, SparseCoder], corpus: Corpus, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Store]:
    return collect_firings(subject, coders, corpus, tmp_path_factory.mktemp("reference"), CONFIG)


def hashes(stores: Mapping[str, Store], corpus: Corpus) -> dict[str, str]:
    """Computed anew from the files."""
    assert all(store.manifest.complete for store in stores.values())
    return {name: Store.open(store.folder, corpus).content_hash() for name, store in stores.items()}


def in_order(order: random.Random) -> Callable[..., None]:
    def run(
        gatherings: object, subject: object, corpus: object, batches: list[int], *rest: object, **named: object
    ) -> None:
        passes.run(gatherings, subject, corpus, order.sample(batches, len(batches)), *rest, **named)  # type: ignore[arg-type]

    return run


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shard_bytes=st.sampled_from([1 << 10, 1 << 13, 1 << 15, 1 << 26]),
    shard_rows=st.none() | st.integers(1, 40),
    order=st.randoms(use_true_random=False),
    fan_in=st.sampled_from([2, 3, 16]),
    most=st.integers(1, 16),
    stops=st.lists(st.integers(1, 60), min_size=1, max_size=2),
    compacted=st.booleans(),
)
def test_one_plan_gives_one_content(
    subject: Subject,
    coders: dict[str, SparseCoder],
    corpus: Corpus,
    reference: dict[str, Store],
    tmp_path_factory: pytest.TempPathFactory,
    shard_bytes: int,
    shard_rows: int | None,
    order: random.Random,
    fan_in: int,
    most: int,
    stops: list[int],
    compacted: bool,
) -> None:
    config = dataclasses.replace(CONFIG, shard_bytes=shard_bytes, shard_rows=shard_rows)
    folder = tmp_path_factory.mktemp("other")
    with (
        mock.patch.object(compaction, "FAN_IN", fan_in),
        mock.patch.object(compaction, "MOST_SLICES", most),
        mock.patch.object(collecting, "run", in_order(order)),
    ):
        for stop in stops:
            left = itertools.count(stop, -1)

            def interrupt(point: str, left: itertools.count[int] = left) -> None:
                if next(left) == 0:
                    raise Stopped(point)

            try:
                with fault_hook(interrupt):
                    collect_firings(subject, coders, corpus, folder, config)
            except Stopped:
                pass
        stores = collect_firings(subject, coders, corpus, folder, config)
    if compacted:
        with mock.patch.object(compaction, "RANGE_FIRINGS", 500):
            for name in stores:
                compaction.compact(folder / name)
        stores = {name: Store.open(folder / name, corpus) for name in stores}
        assert all(store.manifest.by_latent for store in stores.values())
    assert hashes(stores, corpus) == hashes(reference, corpus)


def one_unit_more(code: SparseCode) -> SparseCode:
    values = torch.as_tensor(code.values).clone()
    values.view(-1)[7] *= 1 + 2**-9
    return dataclasses.replace(code, values=values)


def one_less(code: SparseCode) -> SparseCode:
    values = torch.as_tensor(code.values).clone()
    values.view(-1)[7] = 0
    return dataclasses.replace(code, values=values)


@pytest.mark.parametrize("change", [one_unit_more, one_less])
def test_the_content_hash_sees_a_single_firing(
    subject: Subject,
    coders: dict[str, SparseCoder],
    corpus: Corpus,
    reference: dict[str, Store],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[SparseCode], SparseCode],
) -> None:
    plain = Gathering.encode

    def encode(self: Gathering, start: int, x: torch.Tensor) -> SparseCode:
        code = plain(self, start, x)
        return change(code) if start == 2 * ROWS else code

    monkeypatch.setattr(Gathering, "encode", encode)
    found = hashes(collect_firings(subject, coders, corpus, tmp_path, CONFIG), corpus)
    assert all(found[name] != value for name, value in hashes(reference, corpus).items())


# Across batch plans


def fired(store: Store) -> dict[Place, dict[int, int]]:
    """The codes of all firings, by place and latent."""
    found: dict[Place, dict[int, int]] = {}
    for firings in store.block(0, store.width):
        codes = encode_values(firings.values)
        for row, position, code in zip(firings.rows, firings.positions, codes, strict=True):
            found.setdefault((int(row), int(position)), {})[firings.latent.index] = int(code)
    return found


def before_activation(subject: ReadableSubject, coder: SparseCoder, corpus: Corpus) -> torch.Tensor:
    """Pre-activations [rows, length, width], batch by batch as in the reference, then in double precision."""
    assert isinstance(coder, LinearCoder)
    parts = []
    with torch.inference_mode():
        for start in range(0, len(corpus), ROWS):
            rows = corpus.rows(slice(start, start + ROWS))
            attention = torch.from_numpy((rows.documents >= 0).astype(np.int64))
            tokens = torch.from_numpy(rows.tokens.astype(np.int64))
            x = subject.capture(tokens, attention, [coder.point])[coder.point].double()
            x = x - coder.decoder_bias.double() if coder.subtract_decoder_bias else x
            parts.append(x @ coder.encoder.double().T + coder.encoder_bias.double())
    return torch.cat(parts)


def gap(coder: LinearCoder, pre: torch.Tensor, changed: set[int]) -> float:
    """Relative distance of a position's pre-activations [width] from making ``changed`` fire otherwise."""
    own = [float(pre[latent]) for latent in changed]
    if isinstance(coder.activation, JumpReLU):
        levels = [float(coder.activation.threshold[latent]) for latent in changed]
        return max(abs(value - level) / level for value, level in zip(own, levels, strict=True))
    assert coder.k is not None
    ordered = sorted(pre.clamp_min(0).tolist(), reverse=True)
    last, following = ordered[coder.k - 1 : coder.k + 1]
    return max(last - following, *(abs(value - last) for value in own)) / last if last > 0 else float("inf")


def compare(reference: Store, other: Store, coder: SparseCoder, pre: torch.Tensor) -> tuple[int, int, float]:
    """Positions that fire otherwise, those of them that are no near ties, and the share of values within one unit."""
    assert isinstance(coder, LinearCoder)
    one, two = fired(reference), fired(other)
    differing = far = within = common = 0
    for place in one.keys() | two.keys():
        here, there = one.get(place, {}), two.get(place, {})
        changed = here.keys() ^ there.keys()
        differing += bool(changed)
        far += bool(changed) and gap(coder, pre[place], set(changed)) > NEAR
        both = here.keys() & there.keys()
        common += len(both)
        within += sum(abs(here[latent] - there[latent]) <= 1 for latent in both)
    return differing, far, within / common


@pytest.mark.parametrize(("rows", "threads"), [(1, 1), (3, 1), (16, 1), (64, 1), (ROWS, 2)])
def test_other_batches_differ_at_near_ties_only(
    subject: Subject,
    coders: dict[str, SparseCoder],
    corpus: Corpus,
    reference: dict[str, Store],
    tmp_path: Path,
    rows: int,
    threads: int,
) -> None:
    config = dataclasses.replace(CONFIG, batch_tokens=rows * LENGTH, threads=threads)
    stores = collect_firings(subject, coders, corpus, tmp_path, config)
    assert {store.manifest.batch_plan["rows"] for store in stores.values()} == {rows}
    for name, store in stores.items():
        pre = before_activation(subject, coders[name], corpus)
        _, far, within = compare(reference[name], store, coders[name], pre)
        assert far == 0
        assert within >= 0.999


class Rounded:
    """A subject on a device of other arithmetic: every activation is off by at most ``by``, relatively."""

    def __init__(self, subject: Subject, by: float) -> None:
        self.subject, self.by = subject, by
        self.name, self.device, self.dtype = subject.name, subject.device, subject.dtype
        self.hash = subject.hash

    def token_table(self) -> TokenTable:
        return self.subject.token_table()

    def d(self, hookpoint: str, side: Side) -> int:
        return self.subject.d(hookpoint, side)

    def to(self, device: str | torch.device) -> Rounded:
        return self

    def capture(
        self,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor | None,
        points: Sequence[Point],
        documents: torch.Tensor | None = None,
    ) -> dict[Point, torch.Tensor]:
        draw = torch.Generator().manual_seed(0)
        exact = self.subject.capture(tokens, attention_mask, points, documents)
        return {p: x * (1 + self.by * (2 * torch.rand(x.shape, generator=draw) - 1)) for p, x in exact.items()}


@pytest.fixture(scope="module")
def paired(toy_folder: Path) -> LinearCoder:
    """A coder whose latents come in pairs that all but agree, of which an odd number fires."""
    own = load_coders(str(toy_folder / "coders"))["layers.0"]
    assert isinstance(own, LinearCoder)
    return LinearCoder(
        name="paired",
        hookpoint=own.hookpoint,
        encoder=torch.cat([own.encoder, own.encoder + 1e-7 * own.encoder.roll(1, dims=0)]),
        encoder_bias=own.encoder_bias.repeat(2),
        decoder=own.decoder.repeat(2, 1),
        decoder_bias=own.decoder_bias,
        activation=TopK(3),
        subtract_decoder_bias=own.subtract_decoder_bias,
    )


@pytest.mark.parametrize(("by", "near"), [(3e-7, True), (0.05, False)])
def test_other_arithmetic_flips_near_ties_and_more_is_noticed(
    subject: Subject, paired: LinearCoder, corpus: Corpus, tmp_path: Path, by: float, near: bool
) -> None:
    exact = collect_firings(subject, {"paired": paired}, corpus, tmp_path / "a", CONFIG)["paired"]
    other = collect_firings(Rounded(subject, by), {"paired": paired}, corpus, tmp_path / "b", CONFIG)["paired"]
    differing, far, within = compare(exact, other, paired, before_activation(subject, paired, corpus))
    assert differing > 20
    assert (far == 0) == near
    assert (within >= 0.999) == near

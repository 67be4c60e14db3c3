"""Lenses on disk: this project's own folders, and those of the tuned-lens package, both ways.

Own: ``lens.json`` (what it is, with checksums) and ``lens.safetensors``, tensors ``sites/SITE/weight``, ``…/bias`` and,
of state-aware lenses, ``…/state/NAME``, in this project's numbering. The package's: ``config.json`` and ``params.pt``
(or ``params.safetensors``), tensors ``I.weight`` and ``I.bias``; its entry I is what block I reads, so I stands for
site I − 1: entry 0 is the embedding, and the last block's output has none.

A lens belongs to an unembedding. The package's hash of it is that of a few printed corners; own files also hold a
fingerprint, random projections of the whole matrix, which a load in another dtype does not change.
"""

from __future__ import annotations

import io
import logging
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import torch

from exegete.analysis.visible import visible_line
from exegete.coders.weights import tensors
from exegete.errors import CorruptError, InputError, MismatchError, NotFoundError
from exegete.files import atomic_file, hash_file, read_json, write_json
from exegete.lens.lens import TunedLens
from exegete.lens.trained import SiteTraining
from exegete.lens.translators import StateMap, Translator
from exegete.store.checks import read_manifest, require_same, write_manifest
from exegete.subjects.readout import Readout, read_out
from exegete.subjects.sites import n_blocks

if TYPE_CHECKING:
    from exegete.subjects import Subject

log = logging.getLogger("exegete")
FORMAT: Final = 1
_MANIFEST, _WEIGHTS = "lens.json", "lens.safetensors"
_CONFIG, _PARAMS = "config.json", ("params.safetensors", "params.pt")
_TYPE: Final = "linear_tuned_lens"
_PROJECTIONS: Final = 32
Form = Literal["exegete", "tuned-lens"]


def save_lens(
    lens: TunedLens,
    folder: str | Path,
    *,
    training: Mapping[str, Any] | None = None,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Write a lens as an own folder. ``training`` and ``record`` are kept beside it: settings, and how it went."""
    place = Path(folder)
    found = {
        f"sites/{site}/{name.replace('.', '/')}": value.detach().cpu().float().contiguous()
        for site, translator in lens.translators.items()
        for name, value in translator.state_dict().items()
    }
    _write_weights(place / _WEIGHTS, found)
    data = {
        "format": FORMAT,
        "kind": lens.kind,
        "subject": lens.subject.name,
        "d": int(lens.readout.unembedding.shape[1]),
        "blocks": lens.last + 1,
        "sites": list(lens.sites),
        "unembed_hash": lens.readout.hash,
        "fingerprint": _fingerprint(lens.readout),
        "weights": hash_file(place / _WEIGHTS),
        "training": dict(training or {}),
        "record": _record_json(record),
    }
    write_manifest(place / _MANIFEST, data)


def load_lens(path: str | Path, subject: Subject, *, first_site: int | None = None) -> TunedLens:
    """Read a lens for a subject from an own folder or one of the tuned-lens package.

    ``first_site`` is the site of the package's entry 0, −1 unless its files were written by a fork that numbers
    otherwise (that of the published Mamba lenses leaves out the embedding: 0).

    Raises NotFoundError when there is no lens, MismatchError when it is for another model or unembedding, CorruptError
    when files are damaged.
    """
    place = Path(path)
    if (place / _MANIFEST).is_file():
        return _load_own(place, subject)
    if (place / _CONFIG).is_file() and any((place / name).is_file() for name in _PARAMS):
        return _load_package(place, subject, first_site)
    raise NotFoundError(
        f"there is no lens in {place}; a lens folder holds {_MANIFEST} and {_WEIGHTS}, or {_CONFIG} and {_PARAMS[1]}"
    )


def export_lens(lens: TunedLens, folder: str | Path, *, revision: str | None = None) -> tuple[int, ...]:
    """Write a lens as a folder of the tuned-lens package and return the sites that became identities there.

    Raises InputError for what the package cannot hold: a state-aware lens, or a translator of the last block's output.
    """
    if lens.kind == "state":
        raise InputError("the tuned-lens package has no state-aware lenses; export the plain one")
    if lens.last in lens.sites:
        raise InputError(f"the tuned-lens package has no translator of site {lens.last}, the last block's output")
    d = int(lens.readout.unembedding.shape[1])
    params: dict[str, torch.Tensor] = {}
    missing = []
    for entry in range(lens.last + 1):
        own = lens.translators.get(entry - 1)
        if own is None:
            missing.append(entry - 1)
        params[f"{entry}.weight"] = torch.zeros(d, d) if own is None else own.weight.detach().cpu().float()
        # The package cannot make a lens without biases, so those that are not there are zero.
        held = None if own is None else own.bias
        params[f"{entry}.bias"] = torch.zeros(d) if held is None else held.detach().cpu().float()
    place = Path(folder)
    with atomic_file(place / _PARAMS[1]) as stream:
        torch.save(params, stream)
    config = {
        "base_model_name_or_path": lens.subject.name,
        "d_model": d,
        "num_hidden_layers": lens.last + 1,
        "bias": True,
        "base_model_revision": revision,
        "unembed_hash": lens.readout.hash,
        "lens_type": _TYPE,
    }
    write_json(place / _CONFIG, config)
    return tuple(missing)


def read_trained(folder: Path, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return how the training of the lens in a folder went, by kind, None where there is no lens that was trained.

    Raises MismatchError when it was trained with other settings, or not here at all.
    """
    if not (folder / _MANIFEST).is_file():
        return None
    data = read_manifest(folder / _MANIFEST, number=FORMAT)
    require_same(f"the lens in {folder}", data.get("training", {}).get("key", {}), dict(key))
    try:
        record = data["record"]
        kinds = [kind for kind in ("tuned", "state") if kind in record]
        return {
            "epochs": float(record["epochs"]),
            **{kind: {int(site): _site_training(one) for site, one in record[kind].items()} for kind in kinds},
        }
    except (LookupError, TypeError, ValueError, AttributeError):
        raise CorruptError(
            f"{folder / _MANIFEST} does not say how its training went; train into another folder"
        ) from None


def lens_facts(path: str | Path) -> dict[str, Any]:
    """Return what the manifest of an own folder says. Raises NotFoundError when there is none."""
    return read_manifest(Path(path) / _MANIFEST, number=FORMAT)


def _load_own(place: Path, subject: Subject) -> TunedLens:
    data = read_manifest(place / _MANIFEST, number=FORMAT)
    readout = read_out(subject)
    d = int(readout.unembedding.shape[1])
    if not {"d", "blocks", "subject", "fingerprint", "weights", "sites"} <= set(data):
        raise CorruptError(f"{place / _MANIFEST} lacks fields of a lens; train or convert it again")
    _require_shape(place, subject, d=data["d"], blocks=data["blocks"], made_for=data["subject"])
    sites = data["sites"]
    if not isinstance(sites, list) or not all(type(s) is int and -1 <= s < n_blocks(subject) for s in sites):
        raise CorruptError(f"{place / _MANIFEST} names sites that {subject.name} does not have: {repr(sites)[:80]}")
    if not sites or len(set(sites)) < len(sites):
        raise CorruptError(f"{place / _MANIFEST} names no site, or one twice: {repr(sites)[:80]}")
    if not _alike(data["fingerprint"], _fingerprint(readout)):
        raise _other_unembedding(place, subject, data["subject"])
    if not (place / _WEIGHTS).is_file():
        raise NotFoundError(f"the lens in {place} lacks its {_WEIGHTS}; copy the folder whole, or train it again")
    if hash_file(place / _WEIGHTS) != data["weights"]:
        raise CorruptError(f"{place / _WEIGHTS} is damaged: its checksum is wrong; train or convert the lens again")
    held = tensors(place / _WEIGHTS)
    made: dict[int, Translator] = {}
    for site in sites:
        state = _state_map(place / _WEIGHTS, held, site, d)
        made[site] = Translator(d, bias=f"sites/{site}/bias" in held, state=state)
        start = f"sites/{site}/"
        weights = {name.removeprefix(start).replace("/", "."): v for name, v in held.items() if name.startswith(start)}
        _fill(place / _WEIGHTS, made[site], weights, site)
    return TunedLens(subject, made)


def _load_package(place: Path, subject: Subject, first_site: int | None) -> TunedLens:
    config = read_json(place / _CONFIG)
    if not isinstance(config, dict) or not {"d_model", "num_hidden_layers"} <= set(config):
        raise NotFoundError(f"there is no lens in {place}: its {_CONFIG} does not name d_model and num_hidden_layers")
    if config.get("lens_type", _TYPE) != _TYPE:
        raise InputError(f"{place} holds a lens of type {_shown(config['lens_type'])!r}; {_TYPE} is read")
    readout = read_out(subject)
    d = int(readout.unembedding.shape[1])
    made_for = str(config.get("base_model_name_or_path"))
    blocks = config["num_hidden_layers"] if first_site is None else None
    _require_shape(place, subject, d=config["d_model"], blocks=blocks, made_for=made_for)
    if config.get("unembed_hash") is None:
        log.warning("the lens in %s does not say which unembedding it was trained with; it is not checked", place)
    elif config["unembed_hash"] != readout.hash:
        other = _other_unembedding(place, subject, made_for)
        if subject.dtype != torch.float32:  # what is printed of a matrix can change with its rounding
            raise MismatchError(f"{other}, or load it in the data type of that training, the hash depends on it")
        raise other
    path = next(place / name for name in _PARAMS if (place / name).is_file())
    held = tensors(path)
    made: dict[int, Translator] = {}
    for entry, weights in _entries(path, held):
        site = entry + (-1 if first_site is None else first_site)
        if not -1 <= site < n_blocks(subject):
            raise MismatchError(
                f"{path} has an entry {entry}, site {site}, and {subject.name} the sites -1 to "
                f"{n_blocks(subject) - 1}; another first site may fit"
            )
        made[site] = Translator(d, bias="bias" in weights)
        _fill(path, made[site], weights, site)
    if first_site is None and len(made) != n_blocks(subject):
        raise MismatchError(
            f"{path} has {len(made)} entries, and {subject.name} {n_blocks(subject)} blocks; convert it and say which "
            f"site its entry 0 stands for (first_site, --first-site: -1 the embedding, 0 the first block's output)"
        )
    return TunedLens(subject, made)


def _entries(path: Path, held: Mapping[str, torch.Tensor]) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    found: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in held.items():
        match = re.fullmatch(r"(\d{1,6})\.(weight|bias)", name)
        if match is None:
            raise CorruptError(f"{path} holds {name!r}; the translators of a tuned lens are I.weight and I.bias")
        found.setdefault(int(match[1]), {})[match[2]] = value
    if sorted(found) != list(range(len(found))):
        raise CorruptError(f"{path} lacks translators: it has {', '.join(map(str, sorted(found))) or 'none'}")
    yield from sorted(found.items())


def _state_map(path: Path, held: Mapping[str, torch.Tensor], site: int, d: int) -> StateMap | None:
    """Return the map of the size of the tensors that are there, None without any."""
    start = f"sites/{site}/state/"
    found = {name.removeprefix(start): tuple(value.shape) for name, value in held.items() if name.startswith(start)}
    if not found:
        return None
    n = found.get("mean", (0,))[-1]
    rank = found["down"][0] if len(found.get("down", ())) == 2 else None
    sizes = {"full": (d, n)} if rank is None else {"down": (rank, n), "up": (d, rank)}
    if found != {"mean": (n,), "scale": (n,), **sizes}:
        raise CorruptError(f"{path}: the map of the state at site {site} has the tensors {found}")
    return StateMap(n, d, rank=rank)


def _fill(path: Path, translator: Translator, weights: Mapping[str, torch.Tensor], site: int) -> None:
    own = translator.state_dict()
    want = {name: tuple(value.shape) for name, value in own.items()}
    have = {name: tuple(value.shape) for name, value in weights.items()}
    if want != have:
        raise CorruptError(f"{path}: the translator of site {site} has the tensors {have}, {want} are needed")
    translator.load_state_dict({name: value.float() for name, value in weights.items()})
    translator.requires_grad_(False)


def _require_shape(place: Path, subject: Subject, *, d: Any, blocks: Any, made_for: str) -> None:
    have = {"d_model": int(read_out(subject).unembedding.shape[1]), "blocks": n_blocks(subject)}
    want = {"d_model": d, "blocks": have["blocks"] if blocks is None else blocks}
    if have != want:
        raise MismatchError(
            f"the lens in {place} is for {_shown(made_for)} with {_shown(want['blocks'])} blocks of "
            f"{_shown(want['d_model'])} dimensions; "
            f"{subject.name} has {have['blocks']} of {have['d_model']}"
        )


def _other_unembedding(place: Path, subject: Subject, made_for: str) -> MismatchError:
    return MismatchError(
        f"the lens in {place} was made for {_shown(made_for)}, whose unembedding is another than that of "
        f"{subject.name}; train one for this model"
    )


def _shown(value: Any) -> str:
    """Return something out of a file that anybody may have written, fit for one line of a terminal."""
    return visible_line(str(value)[:200])


@torch.no_grad()
def _fingerprint(readout: Readout) -> list[float]:
    """Return seeded random projections of the unembedding, as numbers of a few digits."""
    weight = readout.unembedding.detach().cpu()
    draw = torch.Generator().manual_seed(0)
    left = torch.randn(_PROJECTIONS, weight.shape[0], generator=draw)
    right = torch.randn(weight.shape[1], _PROJECTIONS, generator=draw)
    found = torch.zeros(_PROJECTIONS)
    for start in range(0, len(weight), 1 << 14):
        part = slice(start, start + (1 << 14))
        found += ((left[:, part] @ weight[part].float()) * right.T).sum(dim=1)
    return [float(f"{value:.6g}") for value in found.tolist()]


def _alike(one: Any, other: list[float]) -> bool:
    """Tell whether two fingerprints agree to about one per cent, as they do across dtypes."""
    if (
        not isinstance(one, list)
        or len(one) != len(other)
        or not all(isinstance(v, int | float) and abs(v) < 1e300 for v in one)
    ):
        return False
    a, b = torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
    return bool((a - b).norm() <= 0.01 * b.norm())


def _record_json(record: Mapping[str, Any] | None) -> dict[str, Any]:
    if record is None:
        return {}
    names = SiteTraining.__slots__
    return {
        name: {str(site): {key: _plain(getattr(one, key)) for key in names} for site, one in value.items()}
        if isinstance(value, Mapping)
        else value
        for name, value in record.items()
    }


def _site_training(one: Mapping[str, Any]) -> SiteTraining:
    def loss(name: str) -> float:
        return math.nan if one[name] is None else float(one[name])

    return SiteTraining(
        untrained=loss("untrained"),
        best=loss("best"),
        last=loss("last"),
        best_step=int(one["best_step"]),
        kept_plain=bool(one.get("kept_plain", False)),
    )


def _plain(value: float) -> float | None:
    """Return a loss as JSON can hold it: None for one that has left the numbers."""
    return value if math.isfinite(value) else None


def _write_weights(path: Path, held: Mapping[str, torch.Tensor]) -> None:
    from safetensors.torch import save

    with atomic_file(path) as stream:
        stream.write(io.BytesIO(save(dict(held))).getbuffer())

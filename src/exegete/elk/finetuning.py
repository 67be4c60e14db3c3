"""Training a model to be quirky: right in Alice's context, wrong by Bob's rule in his.

The loss is that of the first token of the answer alone. Rows of recurrent models are run in groups of one length and
never padded, since padding would go through the state; others are padded behind their end, where an attention mask, not
the padding's id, says how long they are. The model is run as in evaluation (no dropout), so one seed gives one model.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
import math
import os
import pickle
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch

from exegete.elk.adapters import Adapters, lora_targets
from exegete.elk.encoding import Encoded, by_length, require_room
from exegete.elk.schedule import FinetuneConfig, batch_rows, learned, looks, total_steps
from exegete.errors import CorruptError, InputError
from exegete.files import RunLock, atomic_file, canonical_json, hash_json
from exegete.progress import Progress, Silent
from exegete.store.checks import read_manifest, require_same, write_manifest
from exegete.subjects.fast_scan import fast_scan
from exegete.subjects.load import load_subject
from exegete.subjects.subject import Subject
from exegete.types import Array

log = logging.getLogger("exegete")
FORMAT: Final = 1
MANIFEST: Final = "finetune.json"
_CHECKPOINT: Final = "checkpoint.pt"
_LOOK_AT_ONCE: Final = 4


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Finetuned:
    """A trained subject; ``history`` has a (step, loss on the validation rows) for each look, nats."""

    subject: Subject
    history: tuple[tuple[int, float], ...]
    best_step: int


def finetune(
    subject: Subject,
    train: Encoded,
    validation: Encoded,
    *,
    out: str | Path | None = None,
    config: FinetuneConfig | None = None,
    in_place: bool = False,
    progress: Progress | None = None,
) -> Finetuned:
    """Train a model to answer as the characters do, and keep the weights that were best on the validation rows.

    Args:
        subject: The model; a copy of it is trained unless ``in_place``.
        train: Rows to learn.
        validation: Rows to choose the best weights by, of other base examples.
        out: Folder for the model (``model``, complete and ready to load), adapters where there are any (``adapter``),
            and what happened (``finetune.json``). A stopped training goes on there, bit for bit as if it had not been.
        config: Settings.
        in_place: Train the subject's own model and save a copy's memory.
        progress: Told of steps.

    Raises:
        InputError: For rows that share base examples or are longer than the model reads, a rank without targets, a
            loss that is no number.
        MismatchError: When the folder holds a training with other settings, or for token ids that the model lacks.
        MissingExtraError: For LoRA without peft.
    """
    config = config or FinetuneConfig()
    if set(train.facts.base.tolist()) & set(validation.facts.base.tolist()):
        raise InputError("rows to learn and to validate share base examples; split by base example")
    rows = learned(train, config)
    looked = validation.take(validation.facts.pool(config.pool)).first(config.validation_rows, config.seed)
    if not len(looked):
        raise InputError(f"there are no validation rows in the pool {config.pool}")
    for part in (rows, looked):
        require_room(subject, part)
    targets = lora_targets(subject.model, config.lora_targets) if config.lora_rank else ()
    key = {
        **dataclasses.asdict(config),
        "lora_targets": list(targets),
        "subject": subject.hash,
        "train": rows.hash,
        "validation": looked.hash,
        "dtype": str(subject.dtype),
    }
    if out is None:
        job = _Job(subject, rows, looked, config, targets, in_place=in_place)
        job.run(progress or Silent(), None, key)
        return job.finished(None, key)
    folder = Path(out).expanduser()
    with RunLock(folder):
        if (folder / MANIFEST).is_file():
            return _done(folder, key, subject)
        job = _Job(subject, rows, looked, config, targets, in_place=in_place)
        job.run(progress or Silent(), folder, key)
        return job.finished(folder, key)


def _done(folder: Path, key: Mapping[str, Any], subject: Subject) -> Finetuned:
    data = read_manifest(folder / MANIFEST, number=FORMAT)
    try:
        stored, best_step = dict(data["key"]), int(data["best_step"])
        history = tuple((int(step), float(loss)) for step, loss in data["history"])
    except (KeyError, TypeError, ValueError):
        raise CorruptError(f"{folder / MANIFEST} is no manifest of a training; remove it to train anew") from None
    require_same(f"the model in {folder}", stored, dict(key))
    found = load_subject(str(folder / "model"), device=str(subject.device), dtype=subject.dtype)
    return Finetuned(subject=found, history=history, best_step=best_step)


@final
class _Job:
    """A training under way."""

    def __init__(
        self,
        subject: Subject,
        rows: Encoded,
        looked: Encoded,
        config: FinetuneConfig,
        targets: tuple[str, ...],
        *,
        in_place: bool,
    ) -> None:
        self._subject, self._rows, self._looked, self._config = subject, rows, looked, config
        self._model = subject.model if in_place else copy.deepcopy(subject.model)
        if self._model.config.model_type == "rwkv":
            self._model.config.rescale_every = 0  # else evaluation mode halves weights in place
        self._adapters: Adapters | None = None
        if targets:
            self._adapters = Adapters(
                subject,
                self._model,
                rank=config.lora_rank,
                alpha=config.lora_alpha,
                targets=targets,
                seed=config.seed,
            )
        else:
            self._model.requires_grad_(True)
        self._learning = {n: p for n, p in self._model.named_parameters() if p.requires_grad}
        self._optimizer = torch.optim.AdamW(
            self._learning.values(),
            lr=config.learning_rate,
            betas=(0.9, config.beta2),
            weight_decay=config.weight_decay,
        )
        self._steps = total_steps(len(rows), config)
        self._step = 0
        self._history: list[tuple[int, float]] = []
        self._best: dict[str, torch.Tensor] = {}
        self._best_step = 0

    def run(self, progress: Progress, folder: Path | None, key: Mapping[str, Any]) -> None:
        """Train from the start or from the folder's checkpoint."""
        self._model.eval()
        if folder is not None:
            self._resume(folder / _CHECKPOINT, key)
        looked = looks(self._steps)
        progress.start("finetune", self._steps, "steps")
        progress.advance(self._step)
        with _quick(self._model, self._subject.device):
            if not self._history:
                self._look()
            while self._step < self._steps:
                self._update()
                progress.advance(1)
                if self._step in looked:
                    self._look()
                if folder is not None and self._step % self._config.checkpoint_every == 0:
                    self._checkpoint(folder / _CHECKPOINT, key)
        progress.end()

    def finished(self, folder: Path | None, key: Mapping[str, Any]) -> Finetuned:
        """Put the best weights back, merge adapters, write the folder, and return the subject."""
        with torch.no_grad():
            for name, parameter in self._learning.items():
                parameter.copy_(self._best[name])
        if self._adapters is not None:
            if folder is not None:
                _whole_folder(folder / "adapter", self._adapters.save)
            self._adapters.merge()
        model = self._model
        model.requires_grad_(False)
        if folder is None:
            content = hash_json({"finetuned": key, "best_step": self._best_step})
            subject = self._subject.with_model(model, name=f"{self._subject.name}+quirky", content=content)
        else:
            self._write(folder, model, key)
            place = folder / "model"
            subject = Subject(model, self._subject.tokenizer, name=str(place), folder=place)
        return Finetuned(subject=subject, history=tuple(self._history), best_step=self._best_step)

    def _write(self, folder: Path, model: Any, key: Mapping[str, Any]) -> None:
        def save(place: str) -> None:
            with _no_bars():
                model.save_pretrained(place)
            self._subject.tokenizer.save_pretrained(place)

        _whole_folder(folder / "model", save)
        history = [[step, loss] for step, loss in self._history]
        data = {"format": FORMAT, "key": dict(key), "history": history, "best_step": self._best_step}
        write_manifest(folder / MANIFEST, {**data, "rows": len(self._rows), "steps": self._steps})
        (folder / _CHECKPOINT).unlink(missing_ok=True)

    def _update(self) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._config.rate(self._step, self._steps)
        self._optimizer.zero_grad(set_to_none=True)
        chosen = batch_rows(self._step, len(self._rows), self._config)
        total = 0.0
        for losses in self._losses(self._rows, chosen, self._config.rows_at_once):
            loss = losses.sum() / len(chosen)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if not math.isfinite(total):
            raise InputError(f"the loss is no number at step {self._step + 1}; lower the learning rate")
        torch.nn.utils.clip_grad_norm_(self._learning.values(), self._config.clip)
        self._optimizer.step()
        self._step += 1

    @torch.no_grad()
    def _look(self) -> None:
        at_once = self._config.rows_at_once * _LOOK_AT_ONCE
        parts = [part.double() for part in self._losses(self._looked, np.arange(len(self._looked)), at_once)]
        loss = float(torch.cat(parts).mean())
        if not math.isfinite(loss):
            raise InputError(
                f"the loss on the validation rows is no number after {self._step} steps; lower the learning rate, "
                f"or train in float32"
            )
        if loss < min((past for _, past in self._history), default=math.inf):
            self._best = {name: p.detach().cpu().clone() for name, p in self._learning.items()}
            self._best_step = self._step
        self._history.append((self._step, loss))
        log.info("step %d: %.4f nats on the validation rows", self._step, loss)

    def _losses(self, data: Encoded, rows: Array, rows_at_once: int) -> Iterator[torch.Tensor]:
        """Yield the losses [m] of passes over some rows, which may come several times, in nats."""
        wanted = torch.from_numpy(data.answers[np.arange(len(data)), data.facts.label.astype(np.int64)])
        for part in self._passes([data.prompts[i] for i in rows.tolist()], rows_at_once):
            some = rows[part]
            logits = answer_logits(self._model, [data.prompts[i] for i in some.tolist()], self._subject.device)
            target = wanted[torch.from_numpy(some)].to(logits.device)
            yield torch.nn.functional.cross_entropy(logits, target, reduction="none")

    def _passes(self, prompts: list[tuple[int, ...]], rows_at_once: int) -> Iterator[Array]:
        if self._subject.recurrent:
            for rows in by_length(prompts, 1 << 62):
                yield from (rows[at : at + rows_at_once] for at in range(0, len(rows), rows_at_once))
        else:
            order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
            yield from (order[at : at + rows_at_once] for at in range(0, len(order), rows_at_once))

    def _checkpoint(self, path: Path, key: Mapping[str, Any]) -> None:
        held = {
            "format": FORMAT,
            "key": canonical_json(key),
            "step": self._step,
            "history": self._history,
            "best_step": self._best_step,
            "best": self._best,
            "weights": {name: p.detach().cpu() for name, p in self._learning.items()},
            "optimizer": self._optimizer.state_dict(),
        }
        with atomic_file(path) as stream:
            torch.save(held, stream)

    def _resume(self, path: Path, key: Mapping[str, Any]) -> None:
        if not path.is_file():
            return
        try:
            held = torch.load(path, map_location="cpu", weights_only=True)
            stored = dict(json.loads(held["key"]))
        except (RuntimeError, OSError, pickle.UnpicklingError, LookupError, TypeError, EOFError, ValueError) as error:
            raise CorruptError(f"{path} cannot be read ({type(error).__name__}); remove it to train anew") from error
        require_same(f"the training in {path.parent}", stored, json.loads(canonical_json(key)))
        try:
            self._step, self._best_step, self._best = int(held["step"]), int(held["best_step"]), dict(held["best"])
            self._history = [(int(step), float(loss)) for step, loss in held["history"]]
            with torch.no_grad():
                for name, parameter in self._learning.items():
                    parameter.copy_(held["weights"][name])
                    self._best[name] = self._best[name].reshape(parameter.shape)
            self._optimizer.load_state_dict(held["optimizer"])
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise CorruptError(f"{path} does not fit the model ({type(error).__name__}); remove it") from error


def answer_logits(model: Any, prompts: list[tuple[int, ...]], device: torch.device) -> torch.Tensor:
    """Return the logits [rows, V] float32 behind the last token of each prompt, differentiable.

    Prompts of several lengths are padded behind their end and masked; give a recurrent model those of one length.
    """
    from inspect import signature

    lengths = torch.tensor([len(prompt) for prompt in prompts])
    tokens = torch.zeros((len(prompts), int(lengths.max())), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    kept, place = torch.unique(lengths - 1, return_inverse=True)
    known = signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": False}
    if len(kept) > 1:
        options["attention_mask"] = mask.long().to(device)
    partly = "logits_to_keep" in known
    if partly:
        options["logits_to_keep"] = kept.to(device)
    found = model(input_ids=tokens.to(device), **{n: v for n, v in options.items() if n in known})["logits"]
    at = place if partly and found.shape[1] == len(kept) else lengths - 1
    logits: torch.Tensor = found[torch.arange(len(prompts), device=found.device), at.to(found.device)].float()
    return logits


@contextlib.contextmanager
def _quick(model: Any, device: torch.device) -> Iterator[None]:
    """On a processor, scan faster, and take numbers too small for a float's ordinary form, which are slow, for 0."""
    if device.type != "cpu":
        yield
        return
    flushed = torch.set_flush_denormal(True)
    try:
        with fast_scan(model):
            yield
    finally:
        if flushed:
            torch.set_flush_denormal(False)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    from transformers.utils import logging as notices

    shown = notices.is_progress_bar_enabled()
    notices.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            notices.enable_progress_bar()


def _whole_folder(folder: Path, write: Any) -> None:
    """Let ``write`` fill a folder beside it, then rename it, so that a folder of this name is always complete."""
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    write(str(new))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(new, folder)

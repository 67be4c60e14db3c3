"""Training of tuned lenses: one pass of the model per batch, one translator's backward at a time.

Nothing grows with the number of sites but the translators and their optimizers: streams are captured once, logits exist
for one site and a bounded number of predictions at a time. The validation part is looked at now and then, and of every
translator the weights that were best there are kept; the untrained one, which is the logit lens, stands first in line,
and the plain translator is a candidate for the state-aware one. So on the validation part a tuned lens is nowhere worse
than the logit lens, a state-aware one nowhere worse than the plain one, and where training did not help it says so.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch

from exegete.errors import ConfigError, InputError
from exegete.files import RunLock
from exegete.lens.checkpoints import Checkpoint, clear_checkpoint, misfit, read_checkpoint, write_checkpoint
from exegete.lens.files import load_lens, read_trained, save_lens
from exegete.lens.lens import TunedLens, default_sites, new_lens
from exegete.lens.reading import Piece, cross_entropy, divergence, read_pieces
from exegete.lens.schedules import LensConfig, optimizer_of, set_rate
from exegete.lens.states import StateReader
from exegete.lens.text import LensText, Order, as_text, fixed_batches
from exegete.lens.trained import SiteTraining, Trained
from exegete.lens.translators import Moments
from exegete.progress import Progress, Silent
from exegete.subjects.readout import read_out
from exegete.subjects.sites import site_point

if TYPE_CHECKING:
    from exegete.lens.translators import Translator
    from exegete.store.corpus import Corpus
    from exegete.subjects import Subject

log = logging.getLogger("exegete")
STATE_FOLDER = "state"
_CHECKPOINT_STEPS = 25


def train_lens(
    subject: Subject,
    text: LensText | Corpus,
    *,
    out: str | Path,
    sites: Sequence[int] | None = None,
    state: bool = False,
    config: LensConfig | None = None,
    progress: Progress | None = None,
    checkpoint_every: int = _CHECKPOINT_STEPS,
) -> dict[str, Trained]:
    """Train a tuned lens and write it into a folder; go on where an interrupted training stopped.

    Args:
        subject: The model to read.
        text: What to learn from (its train part) and to choose by (its validation part). A corpus is split by the seed.
        out: Folder of the lens. With ``state`` the state-aware lens is written to ``state`` in it.
        sites: Where; by default −1 … L − 2.
        state: Train a state-aware lens beside the plain one, on the same batches.
        config: How.
        progress: Told of steps.
        checkpoint_every: Steps between checkpoints. One trained on from a checkpoint is the same, bit for bit.

    Returns:
        By kind (``tuned``, ``state``) the lens and how its training went.

    Raises:
        InputError: When the text is too little and must not be repeated, or there is no state to read.
        MismatchError: When the folder holds a lens, or a checkpoint, of other settings.
        CorruptError: When its checkpoint is damaged.
        BusyError: When another process trains into the folder.
    """
    config = config or LensConfig()
    if checkpoint_every < 1:
        raise ConfigError(f"checkpoint_every is at least 1, got {checkpoint_every}")
    text = as_text(text, seed=config.seed)
    folder, shown = Path(out), progress or Silent()
    chosen = default_sites(subject) if sites is None else tuple(sorted(set(sites)))
    for site in chosen:
        site_point(subject, site)
    if not chosen:
        raise InputError(
            "a tuned lens needs at least one site; this subject has a single block, so name site 0 as well"
        )
    key = {
        **dataclasses.asdict(config),
        "sites": list(chosen),
        "state": state,
        "subject": subject.hash,
        "corpus": text.corpus.hash,
        "dtype": str(subject.dtype),
        **{f"split_{name}": v for name, v in text.settings.items() if name not in ("text", "seed", "corpus")},
        "split_seed": text.settings["seed"],
    }
    made = {"key": key, "text": text.settings}
    with RunLock(folder):
        done = read_trained(folder, key)
        if done is not None:
            kinds = {"tuned": folder, **({"state": folder / STATE_FOLDER} if state else {})}
            return {
                kind: Trained(lens=load_lens(place, subject), sites=done[kind], epochs=done["epochs"])
                for kind, place in kinds.items()
            }
        job = _Job(subject, text, chosen, config, state=state)
        job.check_text()
        found = read_checkpoint(folder, key)
        if found is not None:
            try:
                job.resume(found)
            except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
                raise misfit(folder, error) from error
        shown.start("train the lens", config.steps, "steps")
        shown.advance(job.step)
        while job.step < config.steps:
            job.update()
            shown.advance(1)
            if job.step % checkpoint_every == 0 and job.step < config.steps:
                write_checkpoint(folder, key, job.checkpoint())
        shown.end()
        trained = job.finish()
        record = {"epochs": job.epochs, **{kind: one.sites for kind, one in trained.items()}}
        if state:
            save_lens(trained["state"].lens, folder / STATE_FOLDER, training=made)
        save_lens(trained["tuned"].lens, folder, training=made, record=record)
        clear_checkpoint(folder)
        return trained


@final
@dataclass(slots=True)
class _Best:
    """The best of one translator so far: its loss on the validation part, when that was, and its weights."""

    loss: float
    step: int
    weights: dict[str, torch.Tensor]


@final
class _Job:
    """A training under way."""

    def __init__(
        self, subject: Subject, text: LensText, sites: Sequence[int], config: LensConfig, *, state: bool
    ) -> None:
        self._subject, self._text, self._sites, self._config = subject, text, tuple(sites), config
        self._readout = read_out(subject)
        self._states = StateReader(subject, sites) if state else None
        self.lenses: dict[str, TunedLens] = {"tuned": new_lens(subject, sites, bias=config.bias)}
        if self._states is not None:
            self.lenses["state"] = new_lens(
                subject, sites, bias=config.bias, states=self._states.sizes, rank=config.rank, seed=config.seed
            )
        self._translators: dict[tuple[str, int], Translator] = {
            (kind, site): translator
            for kind, lens in self.lenses.items()
            for site, translator in lens.translators.items()
        }
        self._optimizers = {
            name: optimizer_of(config, list(translator.parameters())) for name, translator in self._translators.items()
        }
        self._order = Order(text, "train", seed=config.seed, tokens=config.batch_tokens)
        self._best: dict[tuple[str, int], _Best] = {}
        self._first: dict[tuple[str, int], float] = {}
        self._last: dict[tuple[str, int], float] = {}
        self.step = 0

    @property
    def epochs(self) -> float:
        """How often the train part is read in all."""
        return self._config.steps * self._config.batch_tokens / self._order.total

    def check_text(self) -> None:
        """Warn, or raise InputError, when there is less text than the steps read."""
        config, held = self._config, self._order.total
        wanted = config.steps * config.batch_tokens
        if wanted <= held:
            return
        told = f"the text holds {held:,} predictions to learn from, and {config.steps} steps read {wanted:,}"
        if not config.repeat:
            raise InputError(f"{told}; give more text, fewer steps or smaller batches, or let it repeat")
        log.warning("%s: it is read %.1f times", told, self.epochs)

    def update(self) -> None:
        """Make one step of every translator, and look at the validation part when it is time to."""
        if self.step == 0 and not self._first:
            self._standardise()
            self._look()
        batch = self._order.next()
        for optimizer in self._optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        for piece in read_pieces(self._subject, batch, self._sites, states=self._states):
            for (_, site), translator in self._translators.items():
                (self._losses(translator, site, piece).sum() / max(1, len(batch))).backward()  # type: ignore[no-untyped-call]
        for name, optimizer in self._optimizers.items():
            torch.nn.utils.clip_grad_norm_(self._translators[name].parameters(), self._config.clip)
            set_rate(optimizer, self._config, self.step)
            optimizer.step()
        self.step += 1
        if self.step in self._config.looks:
            self._look()

    def finish(self) -> dict[str, Trained]:
        """Put the best weights back and return the lenses with what happened at each site.

        The plain translator is a state-aware one that makes nothing of the state, so it stands in where it was better.
        """
        plain = {
            (kind, site)
            for (kind, site), best in self._best.items()
            if kind == "state" and self._best["tuned", site].loss < best.loss
        }
        for (kind, site), translator in self._translators.items():
            if (kind, site) in plain:
                self._best[kind, site] = best = self._best["tuned", site]
                translator.take_plain(best.weights)
            else:
                translator.load_state_dict(self._best[kind, site].weights)
            translator.requires_grad_(False)
        return {
            kind: Trained(
                lens=lens,
                epochs=self.epochs,
                sites={
                    site: SiteTraining(
                        untrained=self._first[kind, site],
                        best=self._best[kind, site].loss,
                        last=self._last[kind, site],
                        best_step=self._best[kind, site].step,
                        kept_plain=(kind, site) in plain,
                    )
                    for site in lens.sites
                },
            )
            for kind, lens in self.lenses.items()
        }

    def checkpoint(self) -> Checkpoint:
        """Return all that going on needs."""
        return Checkpoint(
            step=self.step,
            epoch=self._order.epoch,
            place=self._order.place,
            translators={_text(name): t.state_dict() for name, t in self._translators.items()},
            optimizers={_text(name): o.state_dict() for name, o in self._optimizers.items()},
            best={_text(n): {"loss": b.loss, "step": b.step, "weights": b.weights} for n, b in self._best.items()},
            first={_text(name): value for name, value in self._first.items()},
            last={_text(name): value for name, value in self._last.items()},
        )

    def resume(self, found: Checkpoint) -> None:
        """Take up what ``checkpoint`` gave; something else raises what it leads to."""
        self.step, epoch, place = int(found.step), int(found.epoch), int(found.place)
        if not 0 < self.step < self._config.steps:
            raise ValueError("no step of this training")
        self._order.go_to(epoch, place)
        for name, translator in self._translators.items():
            translator.load_state_dict(found.translators[_text(name)])
            self._optimizers[name].load_state_dict(found.optimizers[_text(name)])
            best: Mapping[str, Any] = found.best[_text(name)]
            weights = {key: best["weights"][key].reshape(own.shape) for key, own in translator.state_dict().items()}
            self._best[name] = _Best(loss=float(best["loss"]), step=int(best["step"]), weights=weights)
            self._first[name], self._last[name] = float(found.first[_text(name)]), float(found.last[_text(name)])

    def _losses(self, translator: Translator, site: int, piece: Piece) -> torch.Tensor:
        """Return the loss of one translator at every prediction [n], in nats."""
        state = None if translator.state is None else piece.states[site]
        logits = self._readout.logits(translator(piece.hidden[site], state))
        if self._config.loss == "ce":
            return cross_entropy(logits, piece.labels)
        return divergence(piece.target, logits.log_softmax(dim=-1))

    @torch.no_grad()
    def _look(self) -> None:
        """Take the loss of every translator on the validation part, and keep the weights of those that are best."""
        sums = dict.fromkeys(self._translators, 0.0)
        count = 0
        for batch in self._validation():
            for piece in read_pieces(self._subject, batch, self._sites, states=self._states):
                count += len(piece)
                for (kind, site), translator in self._translators.items():
                    sums[kind, site] += float(self._losses(translator, site, piece).double().sum())
        for name, translator in self._translators.items():
            loss = sums[name] / max(1, count)
            self._first.setdefault(name, loss)
            self._last[name] = loss
            if name not in self._best or (math.isfinite(loss) and not self._best[name].loss <= loss):
                weights = {key: value.detach().cpu().clone() for key, value in translator.state_dict().items()}
                self._best[name] = _Best(loss=loss, step=self.step, weights=weights)

    @torch.no_grad()
    def _standardise(self) -> None:
        """Measure mean and spread of every state on some train rows."""
        if self._states is None:
            return
        seen = {site: Moments() for site in self._states.sites}
        batch = next(fixed_batches(self._text, "train", seed=self._config.seed, most=4096, tokens=4096))
        for part in batch.pieces(self._states.rows * batch.tokens.shape[1]):
            for _, states in self._states.blocks(part):
                for site, moments in seen.items():
                    moments.add(states[site])
        for site, moments in seen.items():
            own = self._translators["state", site].state
            if own is not None:
                own.standardise(moments)

    def _validation(self) -> Sequence[Any]:
        config = self._config
        most = config.validation_tokens
        return list(fixed_batches(self._text, "validation", seed=config.seed, most=most, tokens=1 << 13))


def _text(name: tuple[str, int]) -> str:
    return f"{name[0]}/{name[1]}"

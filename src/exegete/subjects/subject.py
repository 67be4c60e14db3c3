"""A subject: any causal language model of the Hugging Face family, with named hookpoints that can be read."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch

from exegete.errors import InputError, MismatchError
from exegete.subjects import hooks
from exegete.subjects.compiling import CompiledLayers
from exegete.subjects.fast_scan import fast_scan
from exegete.subjects.identity import folder_hash, state_hash
from exegete.subjects.names import Point, expand, layers, neurons
from exegete.subjects.packing import is_packed, runs, within_documents
from exegete.subjects.pieces import token_table
from exegete.subjects.probe import carries_state, keeps_apart
from exegete.tokens import TokenTable
from exegete.types import Side

_CONTAINERS = (torch.nn.ModuleList, torch.nn.ModuleDict)


@final
class Subject:
    """A model looked into. Made by ``load_subject``; in evaluation mode, without gradients."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        folder: Path | None = None,
        content: str | None = None,
        backend: str | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.device: torch.device = _entrance(model)
        self.dtype: torch.dtype = next(model.parameters()).dtype
        self._folder = folder
        self._content = content
        self._sizes: dict[Point, int] = {}
        self._backend = backend
        if backend is not None and self.recurrent:  # a scan over tokens would be compiled step by step
            raise InputError(f"{name} carries a state from token to token, which does not compile; leave out compile")
        self._compiled = None if backend is None else CompiledLayers(self._layers, backend)

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process needs; compiled layers are compiled anew there."""
        return {**self.__dict__, "_compiled": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._compiled = None if self._backend is None else CompiledLayers(self._layers, self._backend)

    @cached_property
    def hash(self) -> str:
        """Content hash of config and weights, 16 hex digits: of the files where there are any, else of the tensors."""
        content = self._content or (folder_hash(self._folder) if self._folder else None)
        return content or state_hash(self.model, self.model.config)

    @property
    def bos(self) -> int | None:
        """Id of the token that starts a text, None when the tokenizer has none."""
        found: int | None = self.tokenizer.bos_token_id
        return found

    @property
    def context(self) -> int | None:
        """The most tokens of a row that the model was made for; None where its configuration names no limit."""
        found = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return int(found) if found else None

    @cached_property
    def _modules(self) -> dict[str, torch.nn.Module]:
        named = self.model.base_model.named_modules()
        return {name: module for name, module in named if name and not isinstance(module, _CONTAINERS)}

    @cached_property
    def _table(self) -> TokenTable:
        return token_table(self.tokenizer)

    @cached_property
    def recurrent(self) -> bool:
        """Whether any layer carries a state from token to token, rather than reading earlier ones' keys and values.

        Decided by what a pass over one token puts in the model's cache: only a model whose cache is known to hold
        nothing but keys and values is not recurrent.
        """
        return carries_state(self.model.base_model, self.device)

    @cached_property
    def _layers(self) -> dict[str, torch.nn.Module]:
        return {name: self._modules[name] for name in layers(self.hookpoints()) if name in self._modules}

    def token_table(self) -> TokenTable:
        """Return the bytes of every token id."""
        return self._table

    def to(self, device: str | torch.device) -> Subject:
        """Move the model to a device and return the subject there; a model spread over devices stays where it is."""
        if getattr(self.model, "hf_device_map", None):
            return self
        return Subject(
            self.model.to(device),
            self.tokenizer,
            name=self.name,
            folder=self._folder,
            content=self._content,
            backend=self._backend,
        )

    def hookpoints(self) -> tuple[str, ...]:
        """Return the canonical names of all hookpoints, in the model's own order."""
        return tuple(self._modules)

    def points(self, pattern: str, side: Side = "output") -> tuple[Point, ...]:
        """Return the hookpoints with their sides that a name or glob in any spelling stands for.

        ``side`` is the side of spellings that do not fix one. Raises NotFoundError with near names.
        """
        return expand(pattern, self.hookpoints(), side=side, prefix=self.model.base_model_prefix)

    def resolve(self, pattern: str) -> tuple[str, ...]:
        """Return the canonical names that a name or glob in any spelling stands for, in natural layer order.

        A name says nothing of the side, which belongs to the coder. Raises NotFoundError with near names, InputError
        for ``blocks.0.hook_resid_pre``, which only ``points`` can express: it is the input of layer 0.
        """
        points = self.points(pattern)
        if pattern.endswith("hook_resid_pre") and any(side == "input" for _, side in points):
            raise InputError(f"{pattern!r} is the input of {points[0][0]!r}; name that module, with side 'input'")
        return tuple(dict.fromkeys(name for name, _ in points))

    def neurons(self, pattern: str) -> tuple[Point, ...]:
        """Return where the neurons of MLPs are read: the inputs of their down projections, in natural layer order.

        ``pattern`` is a name or glob in any spelling for layers, MLPs or down projections (``layers.3``,
        ``layers.*.mlp``, ``blocks.3.mlp.hook_post``). Of what a glob names, layers without neurons are left out.
        Raises NotFoundError for unknown names, InputError where no MLP is or where it is a mixture of experts.
        """
        points = self.points(pattern)
        found: dict[Point, None] = {}
        refused: InputError | None = None
        for name, _ in points:
            try:
                found[neurons(name, self.hookpoints()), "input"] = None
            except InputError as error:
                refused = refused or error
        if refused is not None and not found:
            raise refused
        return tuple(found)

    def d(self, hookpoint: str, side: Side = "output") -> int:
        """Return the size of the activations at one side of a hookpoint, from a pass over one token."""
        point = self._single(hookpoint, side)
        if point not in self._sizes:
            module = self._modules[point[0]]
            if isinstance(module, torch.nn.Linear):
                self._sizes[point] = module.in_features if side == "input" else module.out_features
            else:
                probe = torch.zeros((1, 1), dtype=torch.long)
                self._sizes[point] = int(self.capture(probe, None, [point])[point].shape[-1])
        return self._sizes[point]

    def capture(
        self,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor | None,
        points: Sequence[Point],
        documents: torch.Tensor | None = None,
    ) -> dict[Point, torch.Tensor]:
        """Return the activations [rows, positions, d] at several hookpoints from one forward pass.

        The pass ends at the deepest point; the LM head is never computed.

        Args:
            tokens: [rows, positions] ids.
            attention_mask: [rows, positions], 0 at padding; None stands for all ones.
            points: Hookpoints in any spelling with their sides, the keys of what is returned.
            documents: [rows, positions], which document a token is of, −1 at padding. Given, each token attends within
                its document only, and positions count from the document's start. None: over the whole row.

        Raises:
            InputError: For ids outside the vocabulary and for points without activations.
            NotFoundError: For unknown points.
            MismatchError: When rows hold several documents and the model cannot keep them apart.
        """
        if tokens.ndim != 2:
            raise InputError(f"tokens are [rows, positions], got shape {tuple(tokens.shape)}")
        for what, other in (("mask", attention_mask), ("documents", documents)):
            if other is not None and other.shape != tokens.shape:
                raise InputError(f"tokens {tuple(tokens.shape)} and {what} {tuple(other.shape)} differ in shape")
        self.check_ids(tokens)
        wanted = {point: self._single(*point) for point in points}
        if documents is not None and attention_mask is not None:
            documents = documents.masked_fill(attention_mask.to(documents.device) == 0, -1)
        if documents is not None and is_packed(documents):
            self._check_packing()
            caught = self._pass(tokens, None, tuple(wanted.values()), documents)
        else:
            mask = attention_mask if documents is None else documents >= 0
            caught = self._pass(tokens, mask, tuple(wanted.values()), None)
        return {point: caught[canonical] for point, canonical in wanted.items()}

    def _pass(
        self,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor | None,
        points: Sequence[Point],
        documents: torch.Tensor | None,
    ) -> dict[Point, torch.Tensor]:
        """Capture canonical points; with documents, each position attends within its document."""
        ids = tokens.to(self.device, torch.long)
        mask = None if attention_mask is None else attention_mask.to(self.device, torch.long)
        places = None
        with contextlib.ExitStack() as held:
            if self._compiled is not None:
                held.enter_context(self._compiled.installed(name for name, _ in points))
            held.enter_context(fast_scan(self.model))
            if documents is not None:
                run, places = runs(documents.to(self.device))
                held.enter_context(within_documents(tuple(self._layers.values()), run, self._attention))
            base = self.model.base_model
            return hooks.capture(base, self._modules, ids, mask, tuple(dict.fromkeys(points)), places)

    def with_model(self, model: Any, *, name: str, content: str) -> Subject:
        """Return a subject with another model of the same architecture and this one's tokenizer."""
        return Subject(model, self.tokenizer, name=name, content=content, backend=self._backend)

    def _single(self, hookpoint: str, side: Side) -> Point:
        if hookpoint in self._modules:
            return hookpoint, side
        found = self.points(hookpoint, side)
        if len(found) != 1:
            raise InputError(f"{hookpoint!r} stands for {len(found)} hookpoints; name one of them")
        return found[0]

    @property
    def _attention(self) -> str:
        return str(self.model.config.get_text_config()._attn_implementation)

    def _check_packing(self) -> None:
        """Refuse a model in which documents that share a row would see each other."""
        advice = "set corpus.attend: row to read the whole row as one text, or packing: false for one document per row"
        if self.recurrent:
            raise MismatchError(
                f"{self.name} carries a state from token to token, so documents in one row would mix; {advice}"
            )
        if not self._keeps_apart:
            raise MismatchError(f"documents in one row cannot be kept apart in {self.name}; {advice}")

    @cached_property
    def _keeps_apart(self) -> bool:
        text = self.model.config.get_text_config()
        if not self._layers or getattr(text, "attention_chunk_size", None):  # chunks begin at fixed places of the row
            return False
        size = int(self.model.get_input_embeddings().weight.shape[0])
        return keeps_apart(self._pass, (list(self._layers)[-1], "output"), size)

    def check_ids(self, tokens: torch.Tensor) -> None:
        """Raise MismatchError for ids outside the vocabulary."""
        size = int(self.model.get_input_embeddings().weight.shape[0])
        low, high = (int(bound) for bound in tokens.aminmax()) if tokens.numel() else (0, 0)
        if low < 0 or high >= size:
            raise MismatchError(
                f"token ids {low} to {high} do not fit the {size} embeddings of {self.name}; "
                f"was the text encoded with another tokenizer?"
            )


def _entrance(model: Any) -> torch.device:
    """Return the device that token ids go to."""
    device: torch.device = model.get_input_embeddings().weight.device
    if device.type != "meta":
        return device
    # Weights that are fetched when needed have no device; accelerate moves what comes in.
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))

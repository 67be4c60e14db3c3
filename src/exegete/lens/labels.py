"""The latents of a run with the tokens that a lens reads off their decoder directions, as a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exegete.analysis.visible import visible_line, visible_token
from exegete.errors import InputError, unknown
from exegete.files import write_json, write_text
from exegete.lens.latents import LatentTokens, latent_tokens
from exegete.lens.report import table
from exegete.progress import Progress, Silent

if TYPE_CHECKING:
    from exegete.runs import Run
    from exegete.tokens import TokenTable

_PRINTED = 5
_Said = dict[tuple[str, int], list[tuple[str, str]]]


def label_run(
    run: str | Path | Run,
    latents: Sequence[str],
    *,
    lens: str | Path | None = None,
    site: int | None = None,
    k: int = 10,
    out: str | Path | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Write a table of the tokens that latents of a run promote and suppress, or return it as lines.

    The explanations that the run holds of a latent stand beside its tokens, in the lines and in .json.

    Args:
        run: The run, or its folder.
        latents: ``CODER/INDEX``, ``CODER/all``, or ``all``: those of all coders but controls, which are to be named.
        lens: Folder of a tuned lens; by default the logit lens reads.
        site: Where they are read; by default the site of each coder.
        k: Tokens of each kind.
        out: A .csv file, a row for each latent and token, or a .json file.
        device: Where to run; by default where the run was collected.
        progress: Told of latents.

    Raises:
        NotFoundError: For a coder that the run does not have.
        InputError: For a latent it does not have, another ending of ``out``, or a coder that writes to no site.
    """
    import dataclasses

    from exegete.lens.files import load_lens
    from exegete.lens.lens import LogitLens
    from exegete.preparing import Loader
    from exegete.runs import Run, open_run

    made = run if isinstance(run, Run) else open_run(run)
    path = None if out is None else Path(out)
    if path is not None and path.suffix not in (".csv", ".json"):
        raise InputError(f"a table is a .csv or .json file, got {str(path)!r}")
    wanted = _wanted(made, latents)
    config = made.config
    if device is not None and device != "auto":
        config = dataclasses.replace(config, collect=dataclasses.replace(config.collect, device=device))
    loader = Loader(config, made)
    shown = progress or Silent()
    found: list[LatentTokens] = []
    table_of: TokenTable | None = None
    for coder, indices in wanted.items():
        subject = loader.subject(coder)
        reads = LogitLens(subject) if lens is None else load_lens(lens, subject)
        table_of = subject.token_table()
        shown.start(f"label {coder}", len(indices), "latents")
        for one in latent_tokens(reads, loader.coder(coder), indices, site=site, k=k):
            found.append(dataclasses.replace(one, coder=coder))  # a control's coder may have the name of its model
            shown.advance(1)
        shown.end()
    texts = () if table_of is None else table_of.texts
    said = {} if path is not None and path.suffix == ".csv" else _explanations(made, wanted)
    if path is None:
        return [line for one in found for line in _lines(one, texts, said)]
    if path.suffix == ".json":
        write_json(path, [_plain(one, texts, said) for one in found])
    else:
        write_text(path, table(list(_rows(found, texts))))
    return [f"{len(found)} latents: {path}"]


def _wanted(run: Run, latents: Sequence[str]) -> dict[str, list[int]]:
    """Return the indices asked for of each coder, in the order given."""
    found: dict[str, list[int]] = {}
    for text in latents:
        own = tuple(coder for coder in run.coders() if "@" not in coder)
        coders = own if text == "all" else (text.rpartition("/")[0],)
        index = "all" if text == "all" else text.rpartition("/")[2]
        for coder in coders:
            if coder not in run.coders():
                raise unknown("coder", coder or text, run.coders())
            width = run.store(coder).width
            if index != "all" and not (index.isdecimal() and int(index) < width):
                raise InputError(
                    f"latents of {coder} are {coder}/0 to {coder}/{width - 1} or {coder}/all, got {text!r}"
                )
            found.setdefault(coder, []).extend(range(width) if index == "all" else [int(index)])
    return {coder: list(dict.fromkeys(indices)) for coder, indices in found.items()}


def _explanations(run: Run, coders: Iterable[str]) -> _Said:
    """Return by latent the explanations that the run holds, each with the name of its explainer, oldest first."""
    found: _Said = {}
    if not (run.folder / "results.db").is_file():
        return found
    with run.results() as results:
        for coder in coders:
            for _, one in sorted(results.explanations(coder).items()):
                if one.text is not None:
                    known = found.setdefault((coder, one.latent.index), [])
                    known.append((str(one.explainer.get("name")), one.text))
    return found


def _text(texts: Sequence[str], token: int) -> str:
    return texts[token] if token < len(texts) else f"[{token}]"


def _plain(one: LatentTokens, texts: Sequence[str], said: _Said) -> dict[str, Any]:
    def pairs(kind: Sequence[tuple[int, float]]) -> list[dict[str, Any]]:
        return [{"token": token, "text": _text(texts, token), "logit": value} for token, value in kind]

    return {
        "coder": one.coder,
        "latent": one.index,
        "site": one.site,
        "promoted": pairs(one.promoted),
        "suppressed": pairs(one.suppressed),
        "explanations": [{"explainer": who, "text": text} for who, text in said.get((one.coder, one.index), ())],
    }


def _rows(found: Sequence[LatentTokens], texts: Sequence[str]) -> Iterator[dict[str, Any]]:
    for one in found:
        for effect, pairs in (("promotes", one.promoted), ("suppresses", one.suppressed)):
            for rank, (token, value) in enumerate(pairs, start=1):
                yield {
                    "coder": one.coder,
                    "latent": one.index,
                    "site": one.site,
                    "effect": effect,
                    "rank": rank,
                    "token": token,
                    "text": visible_token(_text(texts, token)),
                    "logit": value,
                }


def _lines(one: LatentTokens, texts: Sequence[str], said: _Said) -> Iterator[str]:
    def listed(pairs: Sequence[tuple[int, float]]) -> str:
        return " ".join(visible_token(_text(texts, token)) for token, _ in pairs[:_PRINTED]) or "nothing"

    name = f"{one.coder}/{one.index} (site {one.site})"
    yield f"{name}: promotes {listed(one.promoted)} | suppresses {listed(one.suppressed)}"
    for who, text in said.get((one.coder, one.index), ()):
        yield f"    {who}: {visible_line(text)}"

"""The default explainer: a language model reads marked train windows and says what they share.

After arXiv 2410.13928, section 3.2 and App. B, in our own words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, final

from exegete.errors import ConfigError, InputError
from exegete.examples.render import explained_texts
from exegete.explainers.explainer import Explainer
from exegete.llm.client import run_closing
from exegete.llm.protocol import PROMPTS, explain_messages, with_strengths
from exegete.prompts import prompt_hash
from exegete.types import Explanation, LLMReply, LLMRequest, Windows
from exegete.views import LatentView, Need

_MARKER = re.compile(r"[*_#`]*\[[*_ ]*EXPLANATION[*_ ]*\][*_`]*[ \t]*:?[*_`]*:?", re.IGNORECASE)
KEPT_REPLY = 2000  # characters of an unparsed reply that are kept to look at
_REPAIR = (
    "Your answer has no line that begins with [EXPLANATION]: and says what the marked text has in common. Answer again "
    "with that one line and nothing else."
)
_NOTHING = "no firing train window to show"


@final
class DefaultExplainer(Explainer):
    """Shows up to ``n_examples`` firing train windows with marks and strengths; one request per latent.

    A reply without an explanation is asked for once more; after that the latent is ``unparsed``.

    Tokens above ``threshold`` of their window's maximum are marked. Strengths run from 0 to 10 relative to the latent's
    maximum.
    """

    def __init__(self, *, n_examples: int = 40, threshold: float = 0.3, max_tokens: int = 500) -> None:
        if n_examples < 1 or max_tokens < 1:
            raise ConfigError(f"n_examples and max_tokens are at least 1, got {n_examples} and {max_tokens}")
        if not 0.0 <= threshold < 1.0:
            raise ConfigError(f"threshold is a share of a window's maximum, at least 0 and below 1, got {threshold}")
        self._n_examples, self._threshold, self._max_tokens = n_examples, threshold, max_tokens

    @property
    def spec(self) -> Mapping[str, Any]:
        """The name and the arguments."""
        args = {"n_examples": self._n_examples, "threshold": self._threshold, "max_tokens": self._max_tokens}
        return {"name": "default", "args": args}

    @property
    def needs(self) -> frozenset[Need]:
        """Examples and a language model."""
        return frozenset({"examples", "llm"})

    @property
    def prompt_hash(self) -> str:
        """That of the explaining prompt."""
        return prompt_hash(PROMPTS["explain"])

    def explain(self, views: Sequence[LatentView], *, concurrency: int = 16) -> Iterator[Explanation]:
        """Yield one explanation per view as replies arrive. Raises LLMError when the server cannot be used at all."""
        yield from run_closing(views, self._one, concurrency, [view.require_llm() for view in views])

    def request(self, view: LatentView) -> LLMRequest:
        """Return the request that asks for a view's explanation. Nothing is sent, and no language model needed.

        Raises InputError when no train window fires.
        """
        shown = self._shown(view)
        if not len(shown):
            raise InputError(f"{view.latent}: {_NOTHING}")
        return self._request(view, shown)

    def _shown(self, view: LatentView) -> Windows:
        return view.examples.part("train", fires=True)[: self._n_examples]

    def _request(self, view: LatentView, shown: Windows) -> LLMRequest:
        texts = explained_texts(shown.tokens, shown.activations, view.examples.maximum, view.tokens, self._threshold)
        return LLMRequest(
            messages=explain_messages([with_strengths(text, active) for text, active in texts]),
            temperature=0.0 if view.llm is None else view.llm.temperature,
            max_tokens=self._max_tokens,
            stage="explain",
        )

    async def _one(self, view: LatentView) -> Explanation:
        llm = view.require_llm()
        shown = self._shown(view)
        if not len(shown):
            return self._explanation(view, shown, None, "failed", {"reason": _NOTHING})
        request = self._request(view, shown)
        reply = await llm.reply(request)
        if reply.finish in ("stop", "length") and parse_explanation(reply.text or "") is None:
            said = reply.text or "(no answer)"  # several chat templates refuse an empty message
            repair = ({"role": "assistant", "content": said}, {"role": "user", "content": _REPAIR})
            reply = await llm.reply(replace(request, messages=(*request.messages, *repair)))
        detail = {
            "model": llm.name,
            **({"simulated": True} if llm.simulated else {}),
            "finish": reply.finish,
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
        }
        return self._read(view, shown, reply, detail)

    def _read(self, view: LatentView, shown: Windows, reply: LLMReply, detail: dict[str, Any]) -> Explanation:
        if reply.finish == "error":
            return self._explanation(view, shown, None, "failed", detail | {"reason": reply.error})
        if reply.finish == "refused":
            return self._explanation(view, shown, None, "refused", detail)
        text = parse_explanation(reply.text or "")
        if text is None:
            kept = {"reason": "the reply has no [EXPLANATION]: line", "reply": (reply.text or "")[:KEPT_REPLY]}
            return self._explanation(view, shown, None, "unparsed", detail | kept)
        return self._explanation(view, shown, text, "ok", detail)

    def _explanation(
        self, view: LatentView, shown: Windows, text: str | None, status: Any, detail: Mapping[str, Any]
    ) -> Explanation:
        return Explanation(
            latent=view.latent,
            text=text,
            status=status,
            explainer=self.spec,
            prompt_hash=prompt_hash(PROMPTS["explain"]),
            examples=tuple(zip(shown.row.tolist(), shown.start.tolist(), strict=True)),
            detail=detail,
        )


def parse_explanation(reply: str) -> str | None:
    """Return what stands after the last ``[EXPLANATION]:``; None without the marker, or with nothing after it.

    Case, bold type, headings, and a missing colon or line break before or after the marker do not matter.
    """
    found = list(_MARKER.finditer(reply))
    if not found:
        return None
    text = reply[found[-1].end() :].strip()
    return text or None

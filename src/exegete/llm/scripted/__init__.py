"""Shipped fakes: scripted replies, and simulated judges and readers with known errors, for tests and `validate`.

What is simulated reads our own prompts, so what it measures is the whole path: rendering, batching, the protocol,
parsing, metrics and their intervals. Its errors are known, and so are the scores that must come out.
"""

from exegete.llm.scripted.evidence import Evidence
from exegete.llm.scripted.fakes import ScriptedClient
from exegete.llm.scripted.judge import SimulatedJudge, simulated_from_spec
from exegete.llm.scripted.predicates import (
    Predicate,
    Spans,
    TokenPredicate,
    greedy_tokens,
    known_windows,
    quoted_text,
    rule_predicate,
)

__all__ = [
    "Evidence",
    "Predicate",
    "ScriptedClient",
    "SimulatedJudge",
    "Spans",
    "TokenPredicate",
    "greedy_tokens",
    "known_windows",
    "quoted_text",
    "rule_predicate",
    "simulated_from_spec",
]

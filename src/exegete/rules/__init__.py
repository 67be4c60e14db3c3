"""Executable explanations: small causal programs over tokens, searched, scored exactly, and written as English."""

from exegete.rules.baselines import BaselineMetrics, baseline_auprc
from exegete.rules.classes import Vocabulary, vocabulary
from exegete.rules.english import parse, render
from exegete.rules.evaluate import (
    RuleMetrics,
    average_precision,
    average_precision_of_blocks,
    context_of,
    evaluate,
    evaluate_many,
)
from exegete.rules.execute import TokenContext, clause_positions, execute, holds, matches
from exegete.rules.language import (
    ClassAt,
    Clause,
    Condition,
    PositionIn,
    Rule,
    StateIs,
    TokenAt,
    TokenOf,
    TokenWithin,
)
from exegete.rules.search import search_rules

__all__ = [
    "BaselineMetrics",
    "ClassAt",
    "Clause",
    "Condition",
    "PositionIn",
    "Rule",
    "RuleMetrics",
    "StateIs",
    "TokenAt",
    "TokenContext",
    "TokenOf",
    "TokenWithin",
    "Vocabulary",
    "average_precision",
    "average_precision_of_blocks",
    "baseline_auprc",
    "clause_positions",
    "context_of",
    "evaluate",
    "evaluate_many",
    "execute",
    "holds",
    "matches",
    "parse",
    "render",
    "search_rules",
    "vocabulary",
]

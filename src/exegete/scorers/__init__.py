"""Explanation and examples in, judgements and scores out: one small file per scorer, and a registry of their names."""

from exegete.scorers.scorer import Scorer, Scoring, scorers

__all__ = ["Scorer", "Scoring", "scorers"]

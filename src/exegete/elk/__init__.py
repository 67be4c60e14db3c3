"""Eliciting latent knowledge: models made to say what is false in one character's context, and probes for what is true.

Importing this package imports no torch; the parts are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exegete.elk.anomaly import Anomaly, anomalies
    from exegete.elk.encoding import Encoded, encode
    from exegete.elk.extraction import answer_log_odds, extract
    from exegete.elk.facts import Facts
    from exegete.elk.features import Extraction
    from exegete.elk.finetuning import Finetuned, finetune
    from exegete.elk.gap import Recovered, mean_share, recovered
    from exegete.elk.intervention import Intervention, Reflect, intervene
    from exegete.elk.named_probes import Making, make_probe
    from exegete.elk.probes import Probe
    from exegete.elk.questions import Question, Questions, quirky_set
    from exegete.elk.reference import published, reference_lines
    from exegete.elk.schedule import FinetuneConfig
    from exegete.elk.stored_extraction import extract_to, load_extraction, save_extraction
    from exegete.elk.stored_questions import load_questions, read_published, save_questions
    from exegete.elk.tables import summary_lines, write_probes
    from exegete.elk.templates import quirky_sets
    from exegete.elk.transfers import Transfers, run_transfers

_HOMES = {
    "Anomaly": "anomaly",
    "Encoded": "encoding",
    "Extraction": "features",
    "Facts": "facts",
    "FinetuneConfig": "schedule",
    "Finetuned": "finetuning",
    "Intervention": "intervention",
    "Making": "named_probes",
    "Probe": "probes",
    "Question": "questions",
    "Questions": "questions",
    "Recovered": "gap",
    "Reflect": "intervention",
    "Transfers": "transfers",
    "anomalies": "anomaly",
    "answer_log_odds": "extraction",
    "encode": "encoding",
    "extract": "extraction",
    "extract_to": "stored_extraction",
    "finetune": "finetuning",
    "intervene": "intervention",
    "load_extraction": "stored_extraction",
    "load_questions": "stored_questions",
    "make_probe": "named_probes",
    "mean_share": "gap",
    "published": "reference",
    "quirky_set": "questions",
    "quirky_sets": "templates",
    "read_published": "stored_questions",
    "recovered": "gap",
    "reference_lines": "reference",
    "run_transfers": "transfers",
    "save_extraction": "stored_extraction",
    "save_questions": "stored_questions",
    "summary_lines": "tables",
    "write_probes": "tables",
}

__all__ = [
    "Anomaly",
    "Encoded",
    "Extraction",
    "Facts",
    "FinetuneConfig",
    "Finetuned",
    "Intervention",
    "Making",
    "Probe",
    "Question",
    "Questions",
    "Recovered",
    "Reflect",
    "Transfers",
    "anomalies",
    "answer_log_odds",
    "encode",
    "extract",
    "extract_to",
    "finetune",
    "intervene",
    "load_extraction",
    "load_questions",
    "make_probe",
    "mean_share",
    "published",
    "quirky_set",
    "quirky_sets",
    "read_published",
    "recovered",
    "reference_lines",
    "run_transfers",
    "save_extraction",
    "save_questions",
    "summary_lines",
    "write_probes",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

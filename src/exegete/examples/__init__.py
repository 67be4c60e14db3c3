"""Which text to show: documents are split, windows drawn around what fires and what is silent, and rendered."""

from exegete.examples.build import select, select_many
from exegete.examples.data import StoreData
from exegete.examples.proxy import Proxy
from exegete.examples.render import (
    marks,
    parse_marked,
    render_for_explainer,
    render_marked,
    render_plain,
    transplant_marks,
)
from exegete.examples.split import split_documents, split_segments

__all__ = [
    "Proxy",
    "StoreData",
    "marks",
    "parse_marked",
    "render_for_explainer",
    "render_marked",
    "render_plain",
    "select",
    "select_many",
    "split_documents",
    "split_segments",
    "transplant_marks",
]

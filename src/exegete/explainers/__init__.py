"""Examples in, explanation out: one small file per explainer, and the registry that names them."""

from exegete.explainers.explainer import Explainer, explainers

__all__ = ["Explainer", "explainers"]

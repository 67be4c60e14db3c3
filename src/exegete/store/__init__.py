"""Text as token rows, and firings on disk: what a run knows of its corpus and of every latent."""

from exegete.store.corpus import Corpus, Document, TextDocument, build_corpus, copy_corpus, open_corpus, text_documents
from exegete.store.manifest import ShardEntry, StoreManifest
from exegete.store.store import Store

__all__ = [
    "Corpus",
    "Document",
    "ShardEntry",
    "Store",
    "StoreManifest",
    "TextDocument",
    "build_corpus",
    "copy_corpus",
    "open_corpus",
    "text_documents",
]

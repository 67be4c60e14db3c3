"""Where OpenAI-compatible models are served, how they are named, and which key belongs to whom.

Keys come from the environment and nowhere else. A key is sent only to the service it belongs to: a server named by URL
gets ``EXEGETE_API_KEY``, never ``OPENAI_API_KEY``.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import final
from urllib.parse import urlsplit, urlunsplit

from exegete.errors import InputError

FORMS = (
    "URL#MODEL (http://127.0.0.1:8000/v1#model), openai/MODEL, openrouter/ORG/MODEL, vllm/MODEL, hf/MODEL (in this "
    "process), or none"
)
NO_KEY = "none"
"""What is sent where there is no key: the SDK insists on some, and local servers ignore it."""
_KEY_LIKE = re.compile(r"\b(sk|key|hf|gsk)[-_][\w-]{8,}")
_VERSION = re.compile(r"v\d+\w*")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a model is served: ``base_url`` with its version part, and the environment variable that holds the key."""

    spec: str
    base_url: str
    model: str
    key_variable: str
    key_required: bool

    def key(self) -> str:
        """Return the key from the environment. Raises InputError when a service that needs one has none."""
        value = os.environ.get(self.key_variable, "").strip()
        if not value and self.key_required:
            raise InputError(f"{self.spec} needs a key; set {self.key_variable} in the environment")
        if not value.isascii() or not value.isprintable():
            raise InputError(f"{self.key_variable} holds no key: it has characters that no key has; set it anew")
        return value or NO_KEY


def parse_spec(spec: str) -> Endpoint | None:
    """Read the name of a language model behind a server; None for ``none``. Raises InputError on an unknown form."""
    if spec == "none":
        return None
    if spec.startswith(("http://", "https://")):
        return _url_endpoint(spec)
    service, _, model = spec.partition("/")
    if service == "openai" and model:
        return Endpoint(spec=spec, base_url="https://api.openai.com/v1", model=model, key_variable="OPENAI_API_KEY",
                        key_required=True)  # fmt: skip
    if service == "openrouter" and model.partition("/")[2]:
        return Endpoint(spec=spec, base_url="https://openrouter.ai/api/v1", model=model,
                        key_variable="OPENROUTER_API_KEY", key_required=True)  # fmt: skip
    raise InputError(f"unknown language model {spec!r}; write {FORMS}")


def _url_endpoint(spec: str) -> Endpoint:
    url, _, model = spec.partition("#")
    if not model:
        raise InputError(f"{url.split('@')[-1]} names a server but no model; write URL#MODEL")
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query:
        # Specs are written into run folders and logs, so nothing secret may be part of one.
        raise InputError("a server's URL holds no user, password or query; put a key into EXEGETE_API_KEY")
    if not parts.hostname:
        raise InputError(f"{spec!r} names no server; write {FORMS}")
    path = parts.path.rstrip("/").removesuffix("/chat/completions").removesuffix("/completions")
    if not any(_VERSION.fullmatch(piece) for piece in path.split("/")):
        path += "/v1"
    base = urlunsplit((parts.scheme, parts.netloc, path, "", ""))
    return Endpoint(spec=spec, base_url=base, model=model, key_variable="EXEGETE_API_KEY", key_required=False)


def without_keys(text: str, key: str) -> str:
    """Return a short single line without this key or anything that looks like one."""
    if key != NO_KEY:
        text = text.replace(key, "[key]")
    return " ".join(_KEY_LIKE.sub("[key]", text[:4096]).split())[:300]

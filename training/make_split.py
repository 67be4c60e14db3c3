"""Choose the held-out standard-library modules and write ``src/exegete/demo/split.txt``.

Run once; the table is shipped, so that the side of a file depends on its module path alone. Held out are whole files
drawn with a seed from the library proper (no test folders), never one with a near copy elsewhere (share of common
three-line shingles above ``NEAR``), together with the test files named after them.

    python training/make_split.py
"""

from __future__ import annotations

import collections
import fnmatch
import hashlib
import random
import tokenize
from itertools import combinations
from pathlib import Path

from exegete.demo.stdlib import source_paths

SEED = 20241017
HELD_OUT_BYTES = 1_900_000
LARGEST = 120_000  # one very large file would dominate the held-out figures
NEAR = 0.2
TABLE = Path(__file__).parent.parent / "src/exegete/demo/split.txt"

FAMILIES = (
    ("encodings/*", "one generated table a file"),
    ("pydoc_data/*", "generated from the reference manual"),
    ("html/entities.py", "a table"),
    ("stringprep.py", "unicode tables"),
    ("lib2to3/*", "holds near copies of tokenize, token and of the grammar tests"),
    ("distutils/*", "near copies of one another, and vendored by setuptools"),
    ("ensurepip/*", "near copies of one another"),
    ("idlelib/*", "an application, absent from slim images"),
    ("turtledemo/*", "absent from slim images"),
    ("tkinter/*", "absent from slim images"),
    ("turtle.py", "absent from slim images"),
    ("_sysconfigdata*", "generated at build time"),
    ("__phello__/*", "a test fixture"),
    ("re/_casefix.py", "a table"),
)


def is_test(key: str) -> bool:
    """Say whether a module path lies in a test folder."""
    parts = key.split("/")
    return any(part in {"test", "tests", "idle_test", "testmock"} for part in parts[:-1])


def near_copies(texts: dict[str, str]) -> set[str]:
    """Return the keys that share more than ``NEAR`` of their three-line shingles with some other file."""
    where: dict[bytes, set[str]] = collections.defaultdict(set)
    size: dict[str, int] = {}
    for key, text in texts.items():
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        joined = {"\n".join(lines[i : i + 3]) for i in range(len(lines) - 2)}
        shingles = {hashlib.blake2b(s.encode(), digest_size=8).digest() for s in joined if len(s) > 42}
        size[key] = len(shingles)
        for shingle in shingles:
            where[shingle].add(key)
    shared: collections.Counter[tuple[str, str]] = collections.Counter()
    for keys in where.values():
        if len(keys) < 30:
            shared.update(combinations(sorted(keys), 2))
    near: set[str] = set()
    for (a, b), count in shared.items():
        if count > 5 and count > NEAR * min(size[a], size[b]):
            near |= {a, b}
    return near


def tests_of(key: str, keys: list[str]) -> list[str]:
    """Return the test files named after a module (``test/test_NAME.py`` and ``test/test_NAME/…``)."""
    stem = key.removesuffix(".py").removesuffix("/__init__").split("/")
    names = {"test_" + stem[-1].lstrip("_"), "test_" + "_".join(stem)}
    if len(stem) == 1:
        names.add("test_" + stem[0])
    hits = []
    for other in keys:
        if is_test(other):
            parts = other.removesuffix(".py").split("/")
            if names & set(parts):
                hits.append(other)
    return hits


def main() -> None:
    """Draw the held-out files and write the table."""
    texts: dict[str, str] = {}
    for key, path in source_paths():
        try:
            with tokenize.open(path) as stream:
                texts[key] = stream.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
    near = near_copies(texts)
    candidates = [
        key
        for key, text in sorted(texts.items())
        if not is_test(key)
        and key not in near
        and 400 < len(text) < LARGEST
        and not any(fnmatch.fnmatchcase(key, pattern) for pattern, _ in FAMILIES)
    ]
    random.Random(SEED).shuffle(candidates)
    held: list[str] = []
    total = 0
    for key in candidates:
        if total >= HELD_OUT_BYTES:
            break
        held.append(key)
        total += len(texts[key].encode())
    keys = sorted(texts)
    tests = sorted({test for key in held for test in tests_of(key, keys)})
    lines = [
        "# Sides of the standard library's source files, keyed by module path. Made by training/make_split.py; do not",
        "# edit by hand: the demo models were trained without the held-out files.",
        *(f"excluded {pattern}  # {why}" for pattern, why in FAMILIES),
        *(f"excluded {key}  # near copy of another file" for key in sorted(near)),
        *(f"held_out {key}" for key in sorted(held)),
        "# tests named after held-out modules: not trained on, and in no figure",
        *(f"held_out {key}" for key in tests),
    ]
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(held)} held-out files, {total} bytes; {len(tests)} of their tests; {len(near)} near copies left out")


if __name__ == "__main__":
    main()

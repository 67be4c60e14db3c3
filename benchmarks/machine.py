"""What was measured on, and where the tables are kept."""

from __future__ import annotations

import datetime
import os
import platform
import re
from pathlib import Path

import numpy as np
import torch
import transformers

RESULTS = Path(__file__).parent / "results"


def describe() -> str:
    """Say date, processor, cores, memory, library versions and load."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = ", ".join(f"{one:.2f}" for one in os.getloadavg())
    return (
        f"{datetime.date.today().isoformat()}; {_processor()}, {os.cpu_count()} cores, {total:.0f} GiB, no GPU used; "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"numpy {np.__version__}; load average at the start {load}."
    )


def _processor() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return found.group(1) if found else platform.machine()


def save_section(file: Path, title: str, body: str) -> None:
    """Put ``body`` under the heading ``title`` of a Markdown file, in the place of what stood there before."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    parts = re.split(r"(?m)^(?=# )", text)
    new = f"# {title}\n\n{body.strip()}\n"
    kept = [part.strip() + "\n" for part in parts if part.strip()]
    places = [number for number, part in enumerate(kept) if part.startswith(f"# {title}\n")]
    if places:
        kept[places[0]] = new
    else:
        kept.append(new)
    file.write_text("\n".join(kept), encoding="utf-8")

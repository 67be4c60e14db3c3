"""Run the studies of recurrent models and write their page.

    python -m studies.recurrent [--out studies/recurrent/out] [--page docs/studies/recurrent.md]

Results lie in ``--out``, one file for each study, family and seed; what is there is not run again while settings, the
study's code and library versions are the same. The page and its figures are made of what is there.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from studies.recurrent.page import write_page
from studies.recurrent.work import FULL, STUDIES, TINY, collected, run_all, units


def main(arguments: list[str] | None = None) -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description="Studies of recurrent models.")
    parser.add_argument("--out", type=Path, default=Path("studies/recurrent/out"), help="folder of results")
    parser.add_argument("--page", type=Path, default=Path("docs/studies/recurrent.md"), help="page to write")
    parser.add_argument("--processes", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES), help="which to run")
    parser.add_argument("--tiny", action="store_true", help="a size that shows that everything runs, nothing more")
    parser.add_argument("--page-only", action="store_true", help="run nothing; write the page of what is there")
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by the processes that are started
    size = TINY if options.tiny else FULL
    if not options.page_only:
        run_all(options.out, units(size, tuple(options.studies)), processes=options.processes, tell=_tell)
    write_page(options.page, collected(options.out, units(size)), size)
    _tell(f"wrote {options.page}")


def _tell(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()

"""``python -m exegete`` is the command line."""

from __future__ import annotations

import sys

from exegete.cli import main

sys.exit(main())

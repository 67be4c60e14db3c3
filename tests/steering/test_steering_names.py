from __future__ import annotations

import subprocess
import sys

import pytest

from exegete import steering


def test_the_public_names_are_those_listed() -> None:
    assert steering.__all__ == sorted(steering.__all__)
    for name in steering.__all__:
        assert getattr(steering, name) is not None
        assert getattr(steering, name).__module__.startswith("exegete.steering.")
    assert dir(steering) == steering.__all__
    with pytest.raises(AttributeError):
        _ = steering.nothing


def test_reading_behaviours_and_published_numbers_imports_no_torch() -> None:
    code = (
        "import sys; from exegete.steering import load_rows, balanced, load_pairs, published, Question;"
        "import exegete.cli.steer; published('refusal'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

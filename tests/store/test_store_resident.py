"""Reading a whole store back does not keep its files in the process's memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys
from pathlib import Path
import numpy as np
from exegete.store import shards
from exegete.store.manifest import ShardEntry

folder, n, width, files = Path(sys.argv[1]), 1 << 20, 64, 8
entries = []
for i in range(files):
    builder = shards.ShardBuilder(row_start=i * (n // 256), row_length=256, width=width)
    latents = np.tile(np.arange(0, width, 8, dtype=np.int32), n)
    builder.add(np.full(n, 8, np.int32), latents, np.full(8 * n, 7, np.uint16))
    file = f"shard-{i}.bin"
    sha = builder.write(folder / file)
    entries.append(ShardEntry(file=file, row_start=i * (n // 256), row_stop=(i + 1) * (n // 256), latent_start=0,
                              latent_stop=width, n_positions=n, n_firings=8 * n, tier=0, sha256=sha))
size = sum(path.stat().st_size for path in folder.iterdir())

def mapped():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile:"))

opened = shards.OpenShards(folder, 256)
before = mapped()
for entry in entries:
    opened.get(entry).codes.sum()
    opened.get(entry).positions.max()
full = mapped() - before
opened.release()
left = mapped() - before
assert full > 0.9 * size, (full, size)
assert left < 0.1 * size, (left, size)
assert opened.get(entries[3]).piece(0, width)[2].sum() == 7 * 8 * n
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_released_shards_leave_the_memory_and_read_the_same(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], check=True)

"""Put the trained parts together as the package's assets, and write their model card from the measured figures.

python training/card.py --work OUT --assets src/exegete/demo/assets
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
from pathlib import Path

import torch

FLOORS = {
    "llama": {"bits_per_byte_512": 1.40, "layers.2": 0.15, "layers.2.mlp": 0.30, "alive": 0.80},
    "mamba": {"bits_per_byte_512": 1.60, "layers.2": 0.30, "alive": 0.80},
}
HEADS = {
    "llama": """# The embedded default's models

Made by `make train`, which can be re-run on two CPU cores: a byte-level BPE tokenizer, a Llama-architecture causal
language model, and one TopK sparse coder each on two of its hookpoints.""",
    "mamba": """# The recurrent demo's models

Made by `make train-recurrent`, which can be re-run on two CPU cores: a Mamba-architecture causal language model on the
embedded default's tokenizer, and a TopK sparse coder on its residual stream.""",
}

CARD = """{head} All were trained on the source text of the
Python standard library ({train_files} files, {train_tokens:,} tokens, Python {python}); the files that
`src/exegete/demo/split.txt` holds out were never seen. Families of near copies and tables are in no figure below.

| language model | |
|---|---|
| parameters | {parameters:,} ({layers} layers, width {width}, vocabulary {vocabulary}) |
| tokens seen in training | {seen_tokens:,} |
| held-out text | {held_out_files} files, {held_out_bytes:,} bytes |
| bits per byte, rows of 512 tokens | **{bits_per_byte_512:.3f}** (floor: at most {floor_lm:.2f}) |
| bits per byte, rows of 256 tokens | {bits_per_byte_256:.3f} |

| coder | latents | k | FVU, held out | latents alive | floor on FVU |
|---|---|---|---|---|---|
{coders}

FVU is the fraction of variance unexplained over {positions:,} held-out positions (rows of 256 tokens, BOS left out). A
latent is alive when it fires at least 10 times per 100,000 held-out tokens; the floor is {floor_alive:.0%} alive.

{note}The model writes Python-like text and knows nothing else. It is here so that every part of exegete can be tried,
tested and shown on real latents of a real model with no network. Licence: Apache-2.0, as the project; the training
text is the Python standard library (PSF licence).
"""


def main() -> None:
    """Copy, check the floors, write the card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--note", default="", help="a sentence on how this training differed from the defaults")
    arguments = parser.parse_args()
    language = json.loads((arguments.work / "lm/metrics.json").read_text())
    coders = json.loads((arguments.work / "coders/metrics.json").read_text())
    settings = json.loads((arguments.work / "lm/hf/config.json").read_text())
    floors = FLOORS[settings["model_type"]]
    assets: Path = arguments.assets
    for name in ("model", "coders"):
        shutil.rmtree(assets / name, ignore_errors=True)
    (assets / "model").mkdir(parents=True)
    weights = ("config.json", "model.safetensors", "generation_config.json")
    for name in (*weights, "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(arguments.work / "lm/hf" / name, assets / "model" / name)
    lines = []
    for hookpoint, found in coders.items():
        shutil.copytree(arguments.work / "coders" / hookpoint, assets / "coders" / hookpoint)
        lines.append(
            f"| `{hookpoint}` | {found['width']:,} | {found['k']} | **{found['fvu']:.3f}** | {found['alive']:.1%} "
            f"| {floors[hookpoint]:.2f} |"
        )
    failures = [h for h, c in coders.items() if c["fvu"] > floors[h] or c["alive"] < floors["alive"]]
    if language["bits_per_byte_512"] > floors["bits_per_byte_512"] or failures:
        raise SystemExit(f"below the floors: {language['bits_per_byte_512']:.3f} bits per byte, coders {failures}")
    (assets / "README.md").write_text(
        CARD.format(
            **language,
            head=HEADS[settings["model_type"]],
            layers=settings["num_hidden_layers"],
            width=settings["hidden_size"],
            vocabulary=settings["vocab_size"],
            python=platform.python_version(),
            coders="\n".join(lines),
            positions=next(iter(coders.values()))["held_out_positions"],
            note=f"{arguments.note}\n\n" if arguments.note else "",
            floor_lm=floors["bits_per_byte_512"],
            floor_alive=floors["alive"],
        )
    )
    made = {
        "language_model": language,
        "coders": coders,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    (assets / "metrics.json").write_text(json.dumps(made, indent=2, sort_keys=True) + "\n")
    total = sum(p.stat().st_size for p in assets.rglob("*") if p.is_file())
    print(f"{total / 1e6:.2f} MB in {assets}")


if __name__ == "__main__":
    main()

"""Train the small vision transformer that the package carries, and store its weights with how they were made.

    OMP_NUM_THREADS=1 python tools/pretrain_vision.py

Half a minute on one core. Writes ``orthokit/assets/vit_garments/``: ``model.safetensors``, ``record.json``
(configuration, command, figures) and the hashes of both in ``PROVENANCE.json``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
from pretrain import _described
from safetensors.torch import save_file

from orthokit.lab import fit
from orthokit.lab.image_tasks import some_classes
from orthokit.lab.vision import SmallViT

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "orthokit" / "assets" / "vit_garments"
CLASSES = (0, 1, 2, 3, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=800)
    steps = parser.parse_args().steps
    model, task = SmallViT(len(CLASSES), seed=0), some_classes("fashion", CLASSES, batch=64, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    with tempfile.TemporaryDirectory() as root:
        run = fit(model, task, optimizer, steps=steps, schedule="cosine", warmup=50, run="pretrain", root=root)
        config = dict(run.config)
    figures = task.evaluate(model.eval())
    TARGET.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, TARGET / "model.safetensors.tmp")
    record = {
        "name": "vit-garments",
        "licence": "Apache-2.0",
        "model": {
            "classes": len(CLASSES),
            "sizes": model.sizes,
            "parameters": sum(p.numel() for p in model.parameters()),
        },
        "run": config,
        "command": f"OMP_NUM_THREADS={torch.get_num_threads()} python tools/pretrain_vision.py --steps {steps}",
        **figures,
    }
    (TARGET / "record.json.tmp").write_text(json.dumps(record, indent=1) + "\n")
    shutil.copy(ROOT / "LICENSE", TARGET / "LICENCE.txt")
    for name in ("model.safetensors", "record.json"):
        shutil.move(TARGET / f"{name}.tmp", TARGET / name)
        (TARGET / name).chmod(0o644)
    described = {
        "asset": "vit_garments",
        "description": "SmallViT trained on the first five classes of Fashion-MNIST; how is in record.json",
        "licence": "Apache-2.0",
        "built_by": "tools/pretrain_vision.py",
        "files": {name: _described(TARGET / name) for name in ("model.safetensors", "record.json")},
    }
    (TARGET / "PROVENANCE.json").write_text(json.dumps(described, indent=1) + "\n")
    print(f"{TARGET}: {figures}")


if __name__ == "__main__":
    main()

"""Train the TinyGPT that the package carries, and store its weights with the record of how they were made.

    OMP_NUM_THREADS=1 python tools/pretrain.py --steps 6000

Resumes after an interruption. Writes ``orthokit/assets/tinygpt_addresses/``: ``model.safetensors``, ``record.json``
(configuration, command, figures), ``curve.csv`` (training loss every 20 steps, validation every 500) and the hashes of
all three in ``PROVENANCE.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from orthokit.lab import Run, TinyGPT, fit, language_modelling
from orthokit.optim import for_model

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "orthokit" / "assets" / "tinygpt_addresses"


def train(steps: int, size: str, root: Path) -> tuple[TinyGPT, Run]:
    """The pretraining itself: Muon on the matrices, AdamW on the rest."""
    model = TinyGPT(size, seed=0)
    optimizer = for_model(model, "muon", lr=1e-2, fallback_lr=6e-3, weight_decay=0.05)
    task = language_modelling("addresses", context=256, batch=8, seed=0, validation_windows=512)
    run = fit(
        model,
        task,
        optimizer,
        steps=steps,
        schedule="wsd",
        warmup=100,
        clip=1.0,
        evaluate_every=500,
        log_every=20,
        run=f"pretrain-{size}",
        root=root,
        resume="auto",
    )
    return model, run


def export(model: TinyGPT, run: Run, steps: int, size: str) -> None:
    """Weights, record and curve, each written beside and renamed."""
    TARGET.mkdir(parents=True, exist_ok=True)
    weights = {name: t.detach().contiguous() for name, t in model.state_dict().items()}
    save_file(weights, TARGET / "model.safetensors.tmp", metadata={"config": json.dumps(vars(model.config))})
    at, bits = run.series("validation_bits_per_byte")
    wall = run.scalars("loss")["wall"]
    record = {
        "name": "tinygpt-addresses",
        "licence": "Apache-2.0",
        "model": {"size": size, **vars(model.config), "parameters": sum(p.numel() for p in model.parameters())},
        "run": {**run.config, "steps": steps},
        "command": f"OMP_NUM_THREADS={torch.get_num_threads()} python tools/pretrain.py --steps {steps} --size {size}",
        "validation_bits_per_byte": float(bits[-1]),
        "bytes_seen": steps * int(run.config["batch"]) * int(run.config["context"]),
        "hours": round(float(wall.iloc[-1] - wall.iloc[0]) / 3600, 2),
    }
    (TARGET / "record.json.tmp").write_text(json.dumps(record, indent=1) + "\n")
    shutil.copy(ROOT / "LICENSE", TARGET / "LICENCE.txt")
    steps_seen, loss = run.series("loss")
    rows = [f"{s},training_loss_nats,{v:.5f}" for s, v in zip(steps_seen, loss, strict=True)]
    rows += [f"{s},validation_bits_per_byte,{v:.5f}" for s, v in zip(at, bits, strict=True)]
    (TARGET / "curve.csv.tmp").write_text("step,quantity,value\n" + "\n".join(rows) + "\n")
    for name in ("model.safetensors", "record.json", "curve.csv"):
        shutil.move(TARGET / f"{name}.tmp", TARGET / name)
        (TARGET / name).chmod(0o644)
    described = {
        "asset": "tinygpt_addresses",
        "description": "TinyGPT trained on the training split of the addresses; how is in record.json",
        "licence": "Apache-2.0",
        "built_by": "tools/pretrain.py",
        "files": {name: _described(TARGET / name) for name in ("model.safetensors", "record.json", "curve.csv")},
    }
    (TARGET / "PROVENANCE.json").write_text(json.dumps(described, indent=1) + "\n")
    print(f"{TARGET}: {bits[-1]:.3f} bits per byte on validation after {steps} steps")


def _described(path: Path) -> dict[str, object]:
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--size", default="1M")
    parser.add_argument("--root", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    model, run = train(arguments.steps, arguments.size, arguments.root)
    export(model, run, arguments.steps, arguments.size)


if __name__ == "__main__":
    main()

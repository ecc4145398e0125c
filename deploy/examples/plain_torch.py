"""A student from a store, in plain PyTorch: python plain_torch.py MANIFEST SNAPSHOT MODEL OUT [STEPS]

`stillroom train` leaves the first two in a run's folder: corpus.parquet and students/<name>/snapshot.parquet.
"""

import sys

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from stillroom.pipeline.student.api import Distillation


def main(manifest: str, snapshot: str, model_name: str, out: str, steps: str = "200") -> list[float]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32).to(device).train()
    distillation = Distillation(manifest, snapshot, losses={"alpha": 0.7, "temperature": 2.0}, device=device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-5)
    losses: list[float] = []
    for batch in DataLoader(distillation.packs(seed=0), batch_size=4, collate_fn=distillation.collate):
        loss = distillation.loss(student, {name: tensor.to(device) for name, tensor in batch.items()})
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) == int(steps):
            break
    student.save_pretrained(out)
    return losses


if __name__ == "__main__":
    if len(sys.argv) not in (5, 6):
        sys.exit(__doc__)
    print(*(f"{loss:.4f}" for loss in main(*sys.argv[1:])), sep="\n")

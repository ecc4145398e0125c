"""A student from a store, in Hugging Face's Trainer: python hf_trainer.py MANIFEST SNAPSHOT MODEL OUT [STEPS]

`stillroom train` leaves the first two in a run's folder: corpus.parquet and students/<name>/snapshot.parquet. Needs
`accelerate`.
"""

import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from stillroom.pipeline.student.api import Distillation


class DistillationTrainer(Trainer):
    """Trainer with the loss of a store in place of the model's own."""

    distillation: Distillation

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        assert not return_outputs, "the logits of a batch never exist as a whole; evaluate with `stillroom evaluate`"
        # Over all batches of a step and all processes, of which Trainer then takes the mean.
        if num_items_in_batch is None:
            return self.distillation.loss(model, inputs)
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return self.distillation.loss(model, inputs, positions=num_items_in_batch) * processes


def main(manifest: str, snapshot: str, model_name: str, out: str, steps: str = "200") -> list[float]:
    arguments = TrainingArguments(
        output_dir=out, max_steps=int(steps), per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=3e-5, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,  # the store's tensors are no arguments of the model
        accelerator_config={"dispatch_batches": False},  # they have a row for each position, not for each sequence
    )  # fmt: skip
    distillation = Distillation(
        manifest, snapshot, losses={"alpha": 0.7, "temperature": 2.0}, device=arguments.device
    )  # fmt: skip
    trainer = DistillationTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32), args=arguments,
        train_dataset=distillation.packs(seed=0), data_collator=distillation.collate,
    )  # fmt: skip
    trainer.distillation = distillation
    trainer.train()
    trainer.save_model(out)
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


if __name__ == "__main__":
    if len(sys.argv) not in (5, 6):
        sys.exit(__doc__)
    print(*(f"{loss:.4f}" for loss in main(*sys.argv[1:])), sep="\n")

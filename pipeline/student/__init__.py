"""The student's room: a process of its own that trains from a manifest and a pinned snapshot.

    python -m stillroom.pipeline.student JOB.json

    config ─► session ─► model, packing ─► trainer ─► evaluate ─► export
                             │                │
                             collate, losses, schedules, checkpoint, runlog

Enters: a job file (`config.StudentJob`). Leaves: a folder with `export/` (a Hugging Face model with its
tokenizer), `result.json`, `log.jsonl`, `tensorboard/` and `checkpoints/`. Costs: importing this package costs
nothing; `config` needs pydantic only. Nothing in it can import a teacher: no workers, ray, vllm or deltalake.
"""

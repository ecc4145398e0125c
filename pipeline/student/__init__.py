"""The student's room: a process of its own that trains from a manifest and a pinned snapshot.

    python -m stillroom.pipeline.student JOB.json

    config ─► session ─► prepare, streams ─► training ─► export
                                                │
                        trainer (one step), held_out (evaluation), checkpoint

    to change              look in
    the model              prepare, model, lora, compiled, precision
    what is read           streams, mix, curriculum, collate, packing, waiting
    a step                 trainer, forward, losses/, features/, teaching, schedules
    evaluation             held_out (when, on what), evaluate and metrics (what)
    stopping and choosing  advance (end early), best (which weights), signals; training (their order between steps)
    checkpoints            checkpoint (the folder), progress (what is in its state), bindings (whose it is)
    what is told           runlog, watch (advice), export (the result)
    several processes      distributed, places, launcher

Enters: a job file (`config.StudentJob`). Leaves: a folder with `export/` (a Hugging Face model with its
tokenizer), `result.json`, `log.jsonl`, `tensorboard/` and `checkpoints/`. Costs: importing this package costs
nothing; `config` needs pydantic only. Nothing in it can import a teacher: no workers, ray, vllm or deltalake.
"""

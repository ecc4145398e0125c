"""A student's own words: its greedy answers to prompts.

Enters: a transformers causal LM, its tokenizer, prompts as token ids. Leaves: an `Answer` to each. Costs: one forward
of a batch for each token of its longest answer; the cache of keys and values of one batch.
"""

from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import GenerationConfig

#: Prompts that are answered at a time.
BATCH = 16


@dataclass(frozen=True)
class Answer:
    """text: without special tokens and the stop string. tokens: as they were generated, the one that ends included.
    ended: by that token or a stop string, not by the most tokens that are allowed."""

    text: str
    tokens: int
    ended: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.inference_mode()
def greedy_answers(
    model: Any, tokenizer: Any, prompts: Seq[Seq[int]], *, max_tokens: int, stop: Seq[str] = (), batch: int = BATCH
) -> list[Answer | None]:
    """One for each prompt, in the order given; None for a prompt that leaves no room for max_tokens in the model.

    Prompts of a batch are padded on the left. In float32 an answer is that of its prompt alone, but for two tokens
    whose logits are tied to some 1e-5. The model's own settings for generating (a repetition penalty, say) do not
    count.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    fitting = [n for n, ids in enumerate(prompts) if limit is None or len(ids) + max_tokens <= limit]
    fitting.sort(key=lambda n: len(prompts[n]))  # little padding
    found: list[Answer | None] = [None] * len(prompts)
    held, ends = model.generation_config, _ends(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    model.generation_config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_tokens, eos_token_id=sorted(ends) or None, pad_token_id=pad
    )
    try:
        for at in range(0, len(fitting), batch):
            numbers = fitting[at : at + batch]
            written = _written(model, [prompts[n] for n in numbers], pad)
            for number, ids in zip(numbers, written, strict=True):
                found[number] = _answer(tokenizer, ids, ends, stop)
    finally:
        model.generation_config = held
    return found


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end an answer: as vLLM has it, the tokenizer's and those of the model's settings."""
    stated = getattr(model.generation_config, "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *(stated if isinstance(stated, list) else [stated])}
    return {int(i) for i in ids if i is not None}


def _written(model: Any, prompts: list[Seq[int]], pad: int) -> list[list[int]]:
    """What follows each prompt; after the end, padding."""
    width = max(len(ids) for ids in prompts)
    ids_BT = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask_BT = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, ids in enumerate(prompts):
        ids_BT[row, width - len(ids) :] = torch.tensor(list(ids), dtype=torch.long)
        mask_BT[row, width - len(ids) :] = 1
    out_BT = model.generate(ids_BT.to(model.device), attention_mask=mask_BT.to(model.device))
    written: list[list[int]] = out_BT[:, width:].tolist()
    return written


def _answer(tokenizer: Any, ids: list[int], ends: set[int], stop: Seq[str]) -> Answer:
    end = next((at + 1 for at, token in enumerate(ids) if token in ends), None)
    text = str(tokenizer.decode(ids[:end], skip_special_tokens=True))
    cuts = [text.index(word) for word in stop if word in text]
    return Answer(text[: min(cuts)] if cuts else text, len(ids[:end]), end is not None or bool(cuts))

"""Small real parts for tests: a byte-level BPE tokenizer and random transformers models, saved as folders.

Nothing is faked: they are loaded through the same `from_pretrained` as a teacher of any size.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

WORDS = (
    "the still drips into a clear glass while the copper cools and the cellar keeps its jars of thyme "
    "mint rose and anise every drop is weighed twice before it is written down in the book of waters "
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@lru_cache
def _trained(vocabulary: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|pad|>", "<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 4, trainer)
    return str(tokenizer.to_str())


def tiny_tokenizer(folder: Path, *, vocabulary: int = 320) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocabulary` ids (at least 259), with a chat template, saved in `folder`."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(vocabulary)),
        bos_token="<|start|>", eos_token="<|end|>", pad_token="<|pad|>",
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def tiny_model(folder: Path, *, arch: str = "llama", vocabulary: int = 320, layers: int = 2, seed: int = 0,
               **config: Any) -> Any:  # fmt: skip
    """A random causal LM of 32 channels, saved as safetensors in `folder`; weights spread so that logits differ.

    vocabulary: of the config; give more than the tokenizer's for a padded head.
    """
    common: dict[str, Any] = {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    if arch == "gpt2":
        common = {"vocab_size": vocabulary, "n_embd": 32, "n_layer": layers, "n_head": 4, "n_positions": 256,
                  "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **(common | config)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    return model.eval()


def tiny_teacher(folder: Path, *, arch: str = "llama", vocabulary: int = 320, padded: int = 0, **config: Any) -> Path:
    """Tokenizer and model in one folder; the model's head has `padded` columns more than the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer(folder, vocabulary=vocabulary)
    tiny_model(folder, arch=arch, vocabulary=len(tokenizer) + padded, **config)
    return folder

"""What a model's files are, hashed: the weights, and the architecture.

Enters: a model folder. Leaves: two digests. Costs: one read of the weights (1.5 GB/s), the first time; a file's
SHA-256 is then remembered in the cache by path, size and time of change.
"""

import hashlib
import json
from pathlib import Path
from typing import Any
from uuid import uuid4

from stillroom.storage.errors import TeacherError
from stillroom.storage.identity import canonical_json, real_vocabulary, tokenizer_digest
from stillroom.storage.records import digest128

#: Keys of config.json that say who wrote it and how it is run, not what is computed.
VOLATILE = frozenset({
    "transformers_version", "_name_or_path", "_model_name_or_path", "torch_dtype", "dtype", "use_cache",
    "_attn_implementation", "_attn_implementation_autoset", "output_attentions", "output_hidden_states", "return_dict",
})  # fmt: skip

#: `TeacherSpec.quantisation` by its name in an identity. What the names stand for, group sizes too, never changes.
QUANTISED = {"int8": "torchao-int8", "int4": "torchao-int4", "fp8": "torchao-fp8"}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors that make up the model, by name: those of the index where there is one.

    Raises TeacherError if there are none, or one of the index is missing. Pickled weights are never read.
    """
    if not (folder / "config.json").is_file():
        raise TeacherError(f"{folder} has no config.json, expected a model folder as save_pretrained writes it")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    elif (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    else:
        files = sorted(folder.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise TeacherError(
            f"{folder} lacks {len(missing)} of {len(files)} weight files, e.g. {missing[0]}; fetch it anew"
        )
    if not files:
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        held = f"only pickled weights ({pickled[0]}), and reading a pickle runs code" if pickled else "no weights"
        raise TeacherError(f"{folder} has {held}; convert them to safetensors (save_pretrained writes them)")
    return files


def identity_parts(
    folder: Path, tokenizer_json: str, *, dtype: str, quantisation: str | None = None, cache_dir: Path
) -> dict[str, Any]:
    """All fields of an `Identity` but `teacher` and `signal`, from the folder's files; no weight is loaded.

    tokenizer_json: the fast tokenizer's own serialisation. dtype: of the forward pass. quantisation: of
        `TeacherSpec`. Raises TeacherError where the folder's weights are quantised already.
    """
    weights, config = model_digests(folder, cache_dir=cache_dir)
    settings = json.loads((folder / "config.json").read_text()).get("quantization_config")
    held = settings.get("quant_method") if settings else None
    if held and quantisation:
        raise TeacherError(
            f"teacher.quantisation is {quantisation}, but the weights in {folder} are quantised already ({held}): "
            "leave it out, or give the folder of the whole weights"
        )
    return {
        "weights": weights,
        "config": config,
        "tokenizer": tokenizer_digest(tokenizer_json),
        "vocabulary": real_vocabulary(tokenizer_json),
        "dtype": dtype,
        # By name only: its settings are part of config.json, hence of `config`.
        "quantisation": QUANTISED[quantisation] if quantisation else held,
    }


def hidden_width(folder: Path) -> int:
    """D, the width of the final hidden state, from config.json."""
    config = json.loads((folder / "config.json").read_text())
    config = config.get("text_config", config)
    width = config.get("hidden_size") or config.get("n_embd") or config.get("d_model")
    if not isinstance(width, int):
        raise TeacherError(f"{folder}/config.json states no hidden_size, n_embd or d_model")
    return width


def layers_and_heads(folder: Path) -> tuple[int, int]:
    """Layers and attention heads, from config.json."""
    config = json.loads((folder / "config.json").read_text())
    config = config.get("text_config", config)
    layers = config.get("num_hidden_layers") or config.get("n_layer") or 0
    return int(layers), int(config.get("num_attention_heads") or config.get("n_head") or 0)


def model_digests(folder: Path, *, cache_dir: Path) -> tuple[str, str]:
    """(weights, config): of the safetensors' names and contents, and of config.json less what is volatile."""
    parts = [(file.name.encode(), file_sha256(file, cache_dir).encode()) for file in weight_files(folder)]
    weights = digest128(b"stillroom.weights.1", *(part for pair in parts for part in pair))
    config = _lasting(json.loads((folder / "config.json").read_text()))
    return weights, digest128(b"stillroom.config.1", canonical_json(config))


def file_sha256(file: Path, cache_dir: Path) -> str:
    """A file's SHA-256, from the cache if path, size and time of change are those of the last time."""
    file = file.resolve()
    stat = file.stat()
    key = digest128(b"stillroom.file.1", str(file).encode(), str(stat.st_size).encode(), str(stat.st_mtime_ns).encode())
    note = cache_dir / "sha256" / key
    if note.is_file():
        return note.read_text()
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    temporary = note.with_name(f".{key}.{uuid4().hex}")
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(found)
        temporary.replace(note)
    except OSError as error:
        raise TeacherError(
            f"cannot write {note.parent}: {error.strerror}; set STILLROOM_CACHE to a folder that can be"
        ) from error
    return found


def _lasting(value: Any) -> Any:
    """`value` without the volatile keys, at every depth: multimodal configs hold a text_config."""
    if isinstance(value, dict):
        return {key: _lasting(inner) for key, inner in value.items() if key not in VOLATILE}
    return value

"""A causal LM in two halves: its body, run once per batch, and all the rest, run on slices of positions.

Enters: a transformers model. Leaves: hidden states [B, T, D], and logits [S, V] of any S of them. Costs: three
passes over 16 tokens when it is made; then never more logits in memory than the slice asked for ([B, T, V] in
float32 is 5 GB at 8 × 1,024 × 151,936).

Logits must be what the model's own forward returns, after Gemma's soft-capping, Cohere's or Granite's scale, a bias.
So nothing of that is written here again: a shallow copy of the model gets, in the place of its body, a module that
replays given hidden states, and the model's own forward does the rest. When made, this is compared with `.logits`
on a small input, and the model is tested for looking ahead. Tried on 37 causal architectures, all bit-equal.
"""

import copy
from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.storage.errors import BadLogits, TeacherError
from stillroom.workers.transfer import to_device

PROBE_TOKENS = 16

#: Fewer rows than this never enter a matrix product alone: on a CPU, products of 5, 6, 7, 9, 10 or 11 rows differ in
#: the last bits between thread counts, whatever their other sizes; of 12 and more they do not (tried up to 500).
FEWEST_ROWS = 16

#: Where blocks lie on several devices, accelerate puts a `forward` of its own on each module, bound to that module: a
#: copy would run the original. What it does there, moving inputs, each module inside does again.
_OF_THE_ORIGINAL = ("forward", "_old_forward", "_hf_hook")


class SlicedModel:
    """`hidden` then `logits` give what `model(...).logits` gives. Raises TeacherError where that does not hold.

    model: a causal LM, in eval mode, on `device`. vocabulary: V; the head may be wider, not narrower.
    """

    def __init__(self, model: Any, *, device: torch.device, vocabulary: int) -> None:
        self.model, self.device, self.vocabulary = model, device, vocabulary
        self._require_columns(model.config.get_text_config().vocab_size)
        with torch.inference_mode():
            path, output = _find_body(model, device)
            self.body: nn.Module = model.get_submodule(path)
            self._replay = _Replay(copy.copy(output))
            rest = _with_module(model, path.split("."), self._replay)
            self._rest = _with_kept_memory(rest, model.get_output_embeddings()) if device.type == "cpu" else rest
            try:
                self._verify()
            except AttributeError as error:  # Falcon-H1 reads a multiplier off its body
                raise TeacherError(
                    f"{_name(model)}: its forward asks its body for more than hidden states ({error}), so its head "
                    "cannot be applied in slices; this architecture cannot be scored yet"
                ) from error

    def hidden(self, ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
        """The body's last hidden states [B, T, D].

        mask_BT: 1 on tokens, 0 on padding; None if there is no padding, which is faster.
        """
        mask = {} if mask_BT is None else {"attention_mask": to_device(mask_BT, self.device)}
        ids_BT = to_device(ids_BT, self.device)
        hidden_BTD: Tensor = self.body(input_ids=ids_BT, use_cache=False, **mask).last_hidden_state
        return hidden_BTD

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """What the model makes of S hidden states: [S, V or wider], in the model's dtype.

        In inference mode on a CPU they lie where those of the last call did: take what you need before the next one.
        """
        size = len(hidden_SD)
        hidden_1SD = nn.functional.pad(hidden_SD, (0, 0, 0, max(0, FEWEST_ROWS - size)))[None]
        self._replay.output["last_hidden_state"] = hidden_1SD
        no_ids_1S = torch.zeros(hidden_1SD.shape[:2], dtype=torch.long, device=self.device)
        logits_1SV: Tensor = self._rest(input_ids=no_ids_1S, use_cache=False).logits
        return logits_1SV[0, :size]

    def _own(self, ids_BT: Tensor) -> Tensor:
        logits_BTV: Tensor = self.model(input_ids=ids_BT.to(self.device), use_cache=False).logits
        self._require_columns(logits_BTV.shape[-1])
        return logits_BTV[..., : self.vocabulary].float()

    def _require_columns(self, columns: int) -> None:
        if columns < self.vocabulary:
            raise TeacherError(
                f"{_name(self.model)} has {columns:,} output columns, its tokenizer {self.vocabulary:,} ids; "
                "model and tokenizer do not belong together, give a folder whose two parts do"
            )

    def _verify(self) -> None:
        generator = torch.Generator().manual_seed(0)
        ids_BT = torch.randint(self.vocabulary, (1, PROBE_TOKENS), generator=generator)
        own_BTV = self._own(ids_BT)
        if not bool(own_BTV.isfinite().all()):
            raise BadLogits(
                f"{_name(self.model)} gives NaN or infinite logits in {self.model.dtype} to any input; "
                "its weights are damaged, or it overflows there: try teacher.dtype float32"
            )
        sliced_TV = self.logits(self.hidden(ids_BT, None)[0])[:, : self.vocabulary].float()
        off = float((sliced_TV - own_BTV[0]).abs().max())
        # Same shapes, same kernels: bit-equal in every architecture tried. A scale that is missed is off by far more.
        if not off <= 1e-5 * max(1.0, float(own_BTV.abs().max())):
            raise TeacherError(
                f"{_name(self.model)}: logits made in slices are off by {off:.3g} from the model's own; it does more "
                "between its body and its logits than its forward shows, and cannot be scored in slices"
            )
        half = PROBE_TOKENS // 2
        changed_BT = torch.cat([ids_BT[:, :half], (ids_BT[:, half:] + 1) % self.vocabulary], -1)
        moved = float((self._own(changed_BT) - own_BTV)[:, :half].abs().mean() / own_BTV.std())
        # 0 in causal models, 3e-7 in mixtures of experts, 3e-2 in a BERT with random weights.
        if not moved <= (1e-3 if self.model.dtype == torch.float32 else 1e-2):
            raise TeacherError(
                f"{_name(self.model)} is not causal: other later tokens move earlier logits by {moved:.2g} of their "
                "spread; only a left-to-right model has next-token distributions, give one"
            )


class _Replay(nn.Module):
    """Stands where the body was and returns what it is told to."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


class _KeptMemory(nn.Linear):
    """A linear head on a CPU whose products lie in the same memory, one after the other.

    glibc hands freed blocks of more than 32 MiB back to the system, and each page of a new one is faulted in again:
    98,000 of them for 2,048 rows at V = 49,152, where head and extraction took 906 µs a row instead of 767.
    """

    _memory: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        if not torch.is_inference_mode_enabled():  # elsewhere a tensor may be needed again, to go back through it
            return super().forward(hidden)
        rows_RD, weight_DV = hidden.flatten(0, -2), self.weight.t()
        if self._memory is None or len(self._memory) < len(rows_RD):
            self._memory = None  # before the larger one is made
            self._memory = rows_RD.new_empty(len(rows_RD), weight_DV.shape[1])
        out_RV = self._memory[: len(rows_RD)]
        bias: Tensor | None = self.bias
        if bias is None:
            torch.mm(rows_RD, weight_DV, out=out_RV)
        else:
            torch.addmm(bias, rows_RD, weight_DV, out=out_RV)
        return out_RV.view(*hidden.shape[:-1], -1)


def _with_kept_memory(rest: nn.Module, head: Any) -> nn.Module:
    """`rest` with this head of its so, where that is a linear layer of plain weights with nothing hooked to it."""
    plain = type(head) is nn.Linear and type(head.weight.data) is Tensor and "forward" not in vars(head)
    paths = [name for name, module in rest.named_modules() if module is head]
    if not plain or not paths or head._forward_hooks or head._forward_pre_hooks:
        return rest
    twin = copy.copy(head)  # of the same weights; Mamba's forward asks for their dtype
    twin.__class__ = _KeptMemory
    return _with_module(rest, paths[0].split("."), twin)


def _find_body(model: Any, device: torch.device) -> tuple[str, Any]:
    """The path of the module that the model's forward calls for hidden states, and what it returned.

    It lies under the model's `base_model_prefix`; OPT calls `model.decoder`.
    """
    prefix = str(getattr(model, "base_model_prefix", ""))
    outputs: dict[str, Any] = {}
    names = [name for name, _ in model.named_modules() if name and name in (prefix, f"{prefix}.decoder")]

    def remember(name: str) -> Any:
        return model.get_submodule(name).register_forward_hook(lambda _m, _a, out: outputs.setdefault(name, out))

    handles = [remember(name) for name in names]
    model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
    for handle in handles:
        handle.remove()
    for name in names:
        if hasattr(outputs.get(name), "last_hidden_state"):
            return name, outputs[name]
    raise TeacherError(
        f"{_name(model)} has no body that returns last_hidden_state, so its head cannot be applied in slices; "
        "give a model that transformers implements as a causal LM"
    )


def _with_module(module: nn.Module, path: Seq[str], new: nn.Module) -> nn.Module:
    """A shallow copy of `module` in which `path` leads to `new`; all other modules and all weights are shared."""
    if not path:
        return new
    twin = copy.copy(module)
    if "_hf_hook" in twin.__dict__:
        for name in _OF_THE_ORIGINAL:
            twin.__dict__.pop(name, None)
    child = module.get_submodule(path[0])
    twin._modules = {**module._modules, path[0]: _with_module(child, path[1:], new)}
    return twin


def _name(model: Any) -> str:
    return f"teacher {model.name_or_path} ({type(model).__name__})"

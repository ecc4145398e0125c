"""A student's hidden states and attention maps, taken while its forward runs.

Enters: the student. Leaves: tensors of the running graph, as transformers numbers them. Costs: three passes over a few
tokens when it is made; then references alone, so memory is that of what autograd keeps anyway, and of what gradient
checkpointing would have given up for the layers that are taken.

Which modules these are is found, not known (as for teachers, in workers/hooks.py): a `ModuleList` as long as the model
has layers, and modules that return [B, H, T, T]. What they give is compared with `output_hidden_states` and
`output_attentions` of the same input; a model where it differs is refused.
"""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.storage.errors import StudentError

#: Tokens of the probe; a number that no other size of a model is likely to have.
PROBE_TOKENS = 13


@dataclass
class Captured:
    """Of one forward. states: [B, T, D], by index into `hidden_states`. maps: [B, H, T, T], by index into
    `attentions`."""

    states: dict[int, Tensor] = field(default_factory=dict)
    maps: dict[int, Tensor] = field(default_factory=dict)


class Capture:
    """Where a student's states and maps come by.

    states, maps: which are wanted. Raises StudentError where they cannot be found or are not what transformers returns,
    and where a map in training is not what the softmax gave.
    """

    def __init__(self, model: Any, *, states: Seq[int], maps: Seq[int], device: torch.device) -> None:
        self._states, self._maps = sorted(set(states)), sorted(set(maps))
        self._model = model
        self._body: nn.Module = model.get_decoder()
        config = model.config.get_text_config()
        self._layers: int = config.num_hidden_layers
        self._blocks: list[nn.Module] = []
        self._places: list[tuple[nn.Module, int]] = []
        generator = torch.Generator().manual_seed(0)
        probe_BT = torch.randint(config.vocab_size, (1, PROBE_TOKENS), generator=generator).to(device)
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                self._find(probe_BT)
                if self._maps:
                    self._require_softmax(probe_BT)
        finally:
            model.train(was_training)

    @contextmanager
    def listening(self) -> Iterator[Captured]:
        """While the student's forward runs inside, take what is wanted."""
        captured = Captured()
        with ExitStack() as stack:
            for index in self._states:
                stack.callback(self._hook(index, captured.states).remove)
            for index in self._maps:
                module, place = self._places[index]
                stack.callback(module.register_forward_hook(_keep(captured.maps, index, place)).remove)
            yield captured

    def _hook(self, index: int, into: dict[int, Tensor]) -> Any:
        if index == self._layers:
            return self._body.register_forward_hook(_keep(into, index, 0))
        if index == 0:
            return self._blocks[0].register_forward_pre_hook(_keep_input(into), with_kwargs=True)
        return self._blocks[index - 1].register_forward_hook(_keep(into, index, 0))

    def _find(self, probe_BT: Tensor) -> None:
        wants_maps = bool(self._maps)
        own = self._model(
            input_ids=probe_BT, use_cache=False, output_hidden_states=True, output_attentions=wants_maps or None
        )
        if self._states:
            self._find_blocks(own.hidden_states, probe_BT)
        if wants_maps:
            self._find_maps(own.attentions, probe_BT)

    def _find_blocks(self, own: Any, probe_BT: Tensor) -> None:
        every = range(self._layers + 1)
        if own is not None and len(own) == len(every):
            for module in self._body.modules():
                if not isinstance(module, nn.ModuleList) or len(module) != self._layers:
                    continue
                self._blocks = list(module)
                found: dict[int, Tensor] = {}
                with ExitStack() as stack:
                    for index in every:
                        stack.callback(self._hook(index, found).remove)
                    self._model(input_ids=probe_BT, use_cache=False)
                if all(i in found and _same(found[i], state) for i, state in enumerate(own)):
                    return
        raise StudentError(
            f"{self._name}: what its {self._layers} blocks return is not what transformers calls its hidden states; "
            "this architecture cannot learn from a teacher's layers"
        )

    def _find_maps(self, own: Any, probe_BT: Tensor) -> None:
        seen: list[tuple[nn.Module, int, Tensor]] = []

        def look(module: nn.Module, _: Any, output: Any) -> None:
            for place, value in enumerate(output if isinstance(output, tuple) else ()):
                if isinstance(value, Tensor) and value.ndim == 4 and value.shape[2:] == (PROBE_TOKENS, PROBE_TOKENS):
                    seen.append((module, place, value))

        with ExitStack() as stack:
            for module in self._body.modules():
                stack.callback(module.register_forward_hook(look).remove)
            self._model(input_ids=probe_BT, use_cache=False)
        for number, maps_BHTT in enumerate(own or ()):
            match = next((s for s in seen if maps_BHTT is not None and _same(s[2], maps_BHTT)), None)
            if match is None:
                raise StudentError(
                    f"{self._name}: no module returns the attention map of layer {number}; this architecture cannot "
                    "learn from a teacher's maps"
                )
            self._places.append(match[:2])
        if len(self._places) <= max(self._maps):
            raise StudentError(
                f"{self._name}: transformers returns {len(self._places)} attention maps of it, {max(self._maps) + 1} "
                "are learned from; this architecture cannot learn from a teacher's maps"
            )

    def _require_softmax(self, probe_BT: Tensor) -> None:
        """In training, dropout on attention would hide a part of each map and enlarge the rest."""
        self._model.train()
        with torch.random.fork_rng(), self.listening() as captured:
            self._model(input_ids=probe_BT, use_cache=False)
        for index, maps_BHTT in captured.maps.items():
            off = float((maps_BHTT.float().sum(-1) - 1).abs().max())
            if not off <= 1e-2:
                raise StudentError(
                    f"{self._name}: in training, the attention weights of layer {index} sum to 1 ± {off:.2g}: it drops "
                    "some (attention_dropout, attn_pdrop). Set that to 0 in the student's config to learn from maps"
                )

    @property
    def _name(self) -> str:
        return f"the student ({type(self._model).__name__})"


def _keep(into: dict[int, Tensor], index: int, place: int) -> Callable[..., None]:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        # A model's output, a tuple, or the tensor itself.
        into[index] = output if isinstance(output, Tensor) else output[place]

    return hook


def _keep_input(into: dict[int, Tensor]) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        into[0] = args[0] if args else kwargs["hidden_states"]

    return hook


def _same(found: Any, own: Tensor) -> bool:
    """Of one input in one shape: bit-equal in every architecture tried."""
    if not isinstance(found, Tensor) or found.shape != own.shape:
        return False
    return float((found.float() - own.float()).abs().max()) <= 1e-5 * max(1.0, float(own.float().abs().max()))

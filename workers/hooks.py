"""Hidden states and attention maps of chosen layers, taken while the body runs.

Enters: the body of a causal LM, and which rows of a batch are wanted. Leaves: host arrays of those rows. Costs: two
passes over 16 tokens when it is made; then, while a pass runs, what was asked for on the host, and beside the model's
own working memory one layer's rows of one batch.

`output_hidden_states` keeps every layer of every padded position on the device until the pass is over, and
`output_attentions` all maps: [L, B, H, T, T]. Here a hook on a module takes the wanted rows as they are made, lets them
go to the host, and keeps nothing else.

Which modules these are is found, not known: a `ModuleList` as long as the model has layers, and modules that return a
tensor [B, H, T, T]. What they give is compared with what `transformers` returns for the same input, layer by layer,
before anything is scored; a model where it differs is refused.
"""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stillroom.storage.attention import Attention
from stillroom.storage.errors import BadLogits, TeacherError
from stillroom.storage.records import AttentionSpec, Float32, LayersSpec, Sequence
from stillroom.workers.sliced import PROBE_TOKENS
from stillroom.workers.transfer import Landing, to_device, to_host

#: Takes a layer's index and its states [B, T, D] or maps [B, H, T, T].
Take = Callable[[int, Tensor], None]

NameRow = Callable[[int], str]


@dataclass(frozen=True)
class Span:
    """A sequence in a batch: its row there, and the positions first … stop − 1 of it that are wanted."""

    row: int
    first: int
    stop: int


class Hooks:
    """Where a body's hidden states and attention maps come by.

    body: in eval mode, what `SlicedModel.body` is. layers: of the model. maps: whether attention maps are wanted, too.
    Raises TeacherError where they cannot be found, or are not what `transformers` returns.
    """

    def __init__(self, body: nn.Module, *, layers: int, vocabulary: int, device: torch.device, maps: bool) -> None:
        self._body, self.layers = body, layers
        generator = torch.Generator().manual_seed(0)
        self._probe_BT = torch.randint(vocabulary, (1, PROBE_TOKENS), generator=generator).to(device)
        with torch.inference_mode():
            own = body(
                input_ids=self._probe_BT, use_cache=False, output_hidden_states=True, output_attentions=maps or None
            )
            self._blocks = self._find_blocks(own.hidden_states)
            self._maps = self._find_maps(own.attentions) if maps else []

    @property
    def maps(self) -> int:
        """Attention maps that the model has: as many as it has layers, or fewer where some are not of attention."""
        return len(self._maps)

    @contextmanager
    def listening(self, layers: Seq[int], take_layer: Take, maps: Seq[int], take_map: Take) -> Iterator[None]:
        """While the body runs inside, hand over each of these layers' states and maps. The last hidden state is what
        the body returns, and comes by no hook."""
        with ExitStack() as stack:
            for layer in layers:
                if layer == self.layers:
                    continue
                block = self._blocks[max(layer - 1, 0)]
                hook = _on_input(layer, take_layer) if layer == 0 else _on_output(layer, take_layer)
                handle = (
                    block.register_forward_pre_hook(hook, with_kwargs=True)
                    if layer == 0
                    else block.register_forward_hook(hook)
                )
                stack.callback(handle.remove)
            for layer in maps:
                module, place = self._maps[layer]
                stack.callback(module.register_forward_hook(_on_output(layer, take_map, place)).remove)
            yield

    def _find_blocks(self, own: Any) -> list[nn.Module]:
        if not own or len(own) != self.layers + 1:
            raise TeacherError(
                f"{self._name}: transformers returns {len(own or ())} hidden states of it, expected {self.layers + 1}; "
                "layers cannot be kept of this architecture"
            )
        for module in self._body.modules():
            if isinstance(module, nn.ModuleList) and len(module) == self.layers:
                self._blocks = list(module)
                found: dict[int, Tensor] = {}
                with self.listening(range(self.layers), _keeper(found), (), _ignore):
                    found[self.layers] = self._run()
                if all(i in found and _same(found[i], state) for i, state in enumerate(own)):
                    return self._blocks
        raise TeacherError(
            f"{self._name}: what its {self.layers} blocks return is not what transformers calls its hidden states; "
            "layers cannot be kept of this architecture"
        )

    def _find_maps(self, own: Any) -> list[tuple[nn.Module, int]]:
        """(module, place in what it returns) of each map, in the order of `own`."""
        seen: list[tuple[nn.Module, int, Tensor]] = []

        def look(module: nn.Module, _: Any, output: Any) -> None:
            for place, value in enumerate(output if isinstance(output, tuple) else ()):
                if isinstance(value, Tensor) and value.ndim == 4 and value.shape[2:] == (PROBE_TOKENS, PROBE_TOKENS):
                    seen.append((module, place, value.clone()))

        with ExitStack() as stack:
            for module in self._body.modules():
                stack.callback(module.register_forward_hook(look).remove)
            self._run()
        found: list[tuple[nn.Module, int]] = []
        for number, maps_BHTT in enumerate(own or ()):
            match = next((s for s in seen if maps_BHTT is not None and _same(s[2], maps_BHTT)), None)
            if match is None:
                raise TeacherError(
                    f"{self._name}: no module returns the attention map of layer {number}; attention cannot be kept of "
                    "this architecture"
                )
            found.append(match[:2])
        if not found:
            raise TeacherError(f"{self._name}: transformers returns no attention maps of it; none can be kept")
        return found

    def _run(self) -> Tensor:
        last_BTD: Tensor = self._body(input_ids=self._probe_BT, use_cache=False).last_hidden_state
        return last_BTD

    @property
    def _name(self) -> str:
        return f"teacher {getattr(self._body, 'name_or_path', '')} ({type(self._body).__name__})"


class Capture:
    """What is taken out of one batch.

    layers, attention: what is wanted, None for nothing of the kind. spans: the batch's sequences, in order.
    width: T, to which they are padded.

        capture = Capture(...)
        with capture.of(hooks):
            hidden_BTD = …  # the pass
        capture.layers(hidden_BTD, name_row), capture.attention(name_row)
    """

    def __init__(
        self, layers: LayersSpec | None, attention: AttentionSpec | None, spans: Seq[Span], width: int
    ) -> None:
        self._layers, self._attention, self._spans = layers, attention, spans
        rows = [np.arange(s.row * width + s.first, s.row * width + s.stop) for s in spans]
        self._rows_N = torch.from_numpy(np.concatenate(rows))
        self._states: dict[int, Landing] = {}
        self._maps: dict[int, list[Landing]] = {}

    @contextmanager
    def of(self, hooks: Hooks) -> Iterator[None]:
        """While a pass runs inside, take what is wanted. Raises TeacherError for layers that the model lacks."""
        layers = self._layers.layers if self._layers else ()
        maps = self._attention.layers if self._attention else ()
        for what, wanted, most in (("layers", layers, hooks.layers), ("attention", maps, hooks.maps - 1)):
            if wanted and wanted[-1] > most:
                raise TeacherError(f"signal.{what} asks for layer {wanted[-1]}, the teacher's are 0 … {most}")
        with hooks.listening(layers, self._take_layer, maps, self._take_maps):
            yield

    def layers(self, last_BTD: Tensor, name_row: NameRow) -> Float32 | None:
        """float32 [N, n, D], rounded as they will be stored. last_BTD: what the pass gave.

        name_row: one of the N in words. Raises BadLogits where a number is not finite.
        """
        if self._layers is None:
            return None
        wanted = self._layers.layers
        if wanted[-1] not in self._states:
            self._take_layer(wanted[-1], last_BTD)
        layers_NnD = torch.stack([self._states[layer].wait().float() for layer in wanted], 1).numpy()
        bad_N = np.flatnonzero(~np.isfinite(layers_NnD).all(axis=(1, 2)))
        if len(bad_N):
            raise BadLogits(
                f"NaN or infinite hidden states between layers at {len(bad_N)} of {len(layers_NnD)} positions, the "
                f"first is {name_row(int(bad_N[0]))}"
            )
        return layers_NnD

    def attention(self, name_row: NameRow) -> Attention | None:
        """Of all N positions. Raises BadLogits as `layers` does."""
        if self._attention is None:
            return None
        blocks = []
        for number, span in enumerate(self._spans):
            maps_nHRT = torch.stack([self._maps[layer][number].wait().float() for layer in self._attention.layers])
            blocks.append(Attention.of(maps_nHRT.numpy(), span.first))
        whole = Attention.concatenate(blocks)
        if not np.isfinite(whole.values).all():
            place = int(np.argmin(np.isfinite(whole.values).all(axis=0)))
            row = int(np.searchsorted(np.cumsum(whole.widths * whole.heads), place, side="right"))
            raise BadLogits(f"NaN or infinite attention weights, the first is {name_row(row)}")
        return whole

    def _take_layer(self, layer: int, states_BTD: Tensor) -> None:
        assert self._layers is not None
        rows_ND = states_BTD.flatten(0, 1)[to_device(self._rows_N, states_BTD.device)]
        if rows_ND.shape[-1] != self._layers.width:
            raise TeacherError(
                f"signal.layers asks for layer {layer}, which has {rows_ND.shape[-1]} channels, expected "
                f"{self._layers.width}"
            )
        self._states[layer] = to_host(rows_ND.to(getattr(torch, self._layers.dtype)))

    def _take_maps(self, layer: int, maps_BHTT: Tensor) -> None:
        assert self._attention is not None
        if self._attention.heads == "mean":
            maps_BHTT = maps_BHTT.mean(1, keepdim=True, dtype=torch.float32)
        elif maps_BHTT.shape[1] != self._attention.rows:
            raise TeacherError(
                f"signal.attention asks for {self._attention.rows} heads, layer {layer} has {maps_BHTT.shape[1]}"
            )
        spans = (maps_BHTT[s.row, :, s.first : s.stop, : s.stop] for s in self._spans)
        # Copies: what a module returns is its own, and may be overwritten.
        self._maps[layer] = [to_host(span_HRT.clone(memory_format=torch.contiguous_format)) for span_HRT in spans]


def require_attended(spec: AttentionSpec, sequence: Sequence) -> None:
    """Raises TeacherError with the cost, if a sequence is longer than its attention maps may be."""
    tokens = len(sequence.input_ids)
    if tokens > spec.max_tokens:
        raise TeacherError(
            f"sequence {sequence.digest} has {tokens:,} tokens, signal.attention.max_tokens is {spec.max_tokens:,}: "
            f"its maps would take {spec.bytes_per_token(tokens):,.0f} bytes a token before compression; set "
            "corpus.window to at most max_tokens, or raise max_tokens"
        )


def _on_input(layer: int, take: Take) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        take(layer, args[0] if args else kwargs["hidden_states"])

    return hook


def _on_output(layer: int, take: Take, place: int = 0) -> Any:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        take(layer, output[place] if isinstance(output, tuple) else output)

    return hook


def _keeper(found: dict[int, Tensor]) -> Take:
    def keep(layer: int, states_BTD: Tensor) -> None:
        found[layer] = states_BTD.clone()

    return keep


def _ignore(_: int, __: Tensor) -> None:
    pass


def _same(found: Any, own: Tensor) -> bool:
    """Of one input in one shape: bit-equal in every architecture tried."""
    if not isinstance(found, Tensor) or found.shape != own.shape:
        return False
    return float((found.float() - own.float()).abs().max()) <= 1e-5 * max(1.0, float(own.float().abs().max()))

"""Any model that vLLM runs, as a generator. The one file that imports vllm.

Enters: a `GeneratorSpec`, prompts as token ids. Leaves: responses with the logprob of each token. Costs: starting the
engine (SmolLM2 on two busy CPU cores: 38 to 51 s, half of it importing vllm), the weights, and the cache of keys and
values. `python -m stillroom.workers.vllm_generator` is the process of `generator.require_settings`: 6 to 15 s.

What vLLM says and what is kept (0.32): `token_ids` of an output include the end-of-sequence token and the tokens of a
stop string, its `text` neither. With `logprobs=0` and `raw_logprobs` each position has one number, log p of the chosen
token at T = 1 before any sampling filter. Each sample is a request of its own, with a seed of its own: with vLLM's `n`
a response would depend on how many others were asked for. Prefix caching makes the prompt cost once.
"""

import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np

from stillroom.storage.errors import TeacherError, first_line
from stillroom.storage.generations.records import Decoding, Finish, Generation
from stillroom.storage.records import Sequence
from stillroom.workers.digests import identity_parts
from stillroom.workers.generator import EngineDead, GeneratorSpec, require_vllm
from stillroom.workers.source import cache_folder, load_tokenizer

#: How often an engine in a process of its own is looked after.
WATCH_S = 1.0


class VllmGenerator:
    """A `Generator` (see workers/generator.py). Raises TeacherError where the engine cannot be started.

    on_death: called from a thread when an engine in a process of its own is gone. vLLM (0.32) notices it, but a
    `generate` that waits for it waits for ever, so that no exception comes of it.
    """

    def __init__(self, spec: GeneratorSpec, on_death: Callable[[], None] | None = None) -> None:
        require_vllm()
        _set_environment(spec)
        self.spec = spec
        tokenizer = load_tokenizer(spec.folder, trust_remote_code=spec.trust_remote_code)
        text = tokenizer.backend_tokenizer.to_str()
        parts = identity_parts(spec.folder, text, dtype=spec.dtype, cache_dir=cache_folder())
        self._parts = parts | {"quantisation": spec.quantization or parts["quantisation"]}
        self._engine: Any = _start(spec)
        resources = getattr(self._engine.llm_engine.engine_core, "resources", None)  # none in this process
        if on_death is not None and resources is not None:
            threading.Thread(target=self._watch, args=(resources, on_death), daemon=True).start()

    def _watch(self, resources: Any, on_death: Callable[[], None]) -> None:
        while self._engine is not None:
            if resources.engine_dead:
                on_death()
                return
            time.sleep(WATCH_S)

    def identity_parts(self) -> dict[str, Any]:
        return dict(self._parts)

    def generate(self, prompts: Seq[Sequence]) -> list[Generation]:
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            if self.spec.decoding.method == "beam":
                return self._beam(prompts)
            return self._sampled(prompts)
        except EngineDeadError as error:
            raise EngineDead(first_line(error)) from error
        except (VLLMClientError, ValueError) as error:  # such as a prompt beyond max_model_len
            raise TeacherError(f"vLLM refuses a request: {first_line(error)}") from error

    def _sampled(self, prompts: Seq[Sequence]) -> list[Generation]:
        decoding = self.spec.decoding
        wanted = [(prompt, sample) for prompt in prompts for sample in range(decoding.n)]
        outputs = self._engine.generate(
            [_ids_prompt(prompt) for prompt, _ in wanted],
            [_sampling(decoding, prompt, sample) for prompt, sample in wanted],
            use_tqdm=False,
        )
        return [
            _generation(prompt, sample, output.outputs[0])
            for (prompt, sample), output in zip(wanted, outputs, strict=True)
        ]

    def _beam(self, prompts: Seq[Sequence]) -> list[Generation]:
        """The n best of the beams and of the greedy response: a beam search may lose that on its way, and then ends
        with something less likely."""
        from vllm.sampling_params import BeamSearchParams

        decoding = self.spec.decoding
        assert decoding.beams is not None
        assert decoding.length_penalty is not None
        # Its own ranking by length counts the prompt; all beams come back, and are ranked here.
        params = BeamSearchParams(beam_width=decoding.beams, max_tokens=decoding.max_tokens, length_penalty=0.0)
        greedy = Decoding(method="greedy", max_tokens=decoding.max_tokens)
        asked = [_ids_prompt(prompt) for prompt in prompts]
        beams = self._engine.beam_search(asked, params)
        first = self._engine.generate(asked, [_sampling(greedy, prompt, 0) for prompt in prompts], use_tqdm=False)
        tokenizer = self._engine.get_tokenizer()
        found: list[Generation] = []
        for prompt, searched, output in zip(prompts, beams, first, strict=True):
            candidates = [_of_beam(prompt, beam, tokenizer) for beam in searched.sequences]
            best = _generation(prompt, 0, output.outputs[0])
            if not any(np.array_equal(best.response_ids, c.response_ids) for c in candidates):
                candidates.append(best)
            ranked = sorted(candidates, key=lambda c: _score(c, decoding.length_penalty or 0.0), reverse=True)
            found += [
                Generation(c.prompt_ids, sample, c.response_ids, c.logprobs, c.finish, c.text)
                for sample, c in enumerate(ranked[: decoding.n])
            ]
        return found

    def provenance(self) -> dict[str, Any]:
        """Versions, device and settings: no times, hosts or paths."""
        import torch
        import transformers
        import vllm
        from vllm.platforms import current_platform

        spec = self.spec
        return {
            "engine": "vllm",
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": str(current_platform.get_device_name() if current_platform.is_cuda() else "cpu"),
            "dtype": spec.dtype,
            "quantization": spec.quantization,
            "tensor_parallel_size": spec.tensor_parallel_size,
            "max_model_len": spec.max_model_len,
            "max_num_seqs": spec.max_num_seqs,
            "prefix_caching": True,
        }

    def release(self) -> None:
        self._engine = None
        gc.collect()


def _set_environment(spec: GeneratorSpec) -> None:
    """Before vllm is imported. What is set already holds."""
    settings = {
        # One device: the engine in this process, which starts in a tenth of the time and dies with it.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if spec.tensor_parallel_size == 1 else "1",
        "VLLM_CPU_KVCACHE_SPACE": str(spec.cpu_kv_cache_gib),
        # Threads are not tied to cores: Ray's actors share them.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    if spec.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(spec.threads)


def _start(spec: GeneratorSpec) -> Any:
    try:
        from vllm import LLM
        from vllm.platforms import current_platform
    except ImportError as error:
        raise _not_imported(error) from error
    on_cpu = current_platform.is_cpu()
    try:
        return LLM(**_options(spec, on_cpu=on_cpu))
    except _refusals() as error:
        # Kernels are looked for when the model is built: until then nothing says that a GPU is missing.
        gpu = "; many quantisations need a GPU, and this vLLM is for CPUs" if on_cpu and spec.quantization else ""
        raise TeacherError(f"vLLM cannot start on {spec.folder} (generate.engine): {_said(error)}{gpu}") from error


def refusal(spec: GeneratorSpec) -> str | None:
    """What vLLM has against these settings for this model, by its own configuration: the names that it knows, what the
    model's config and the platform allow. No weights are read. None: nothing. Raises TeacherError where vllm cannot be
    imported.

    Where a quantisation has no kernel for a CPU, no configuration says so: that is told when the model is built.
    """
    _set_environment(spec)
    try:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform
    except ImportError as error:
        raise _not_imported(error) from error
    try:
        EngineArgs(**_options(spec, on_cpu=current_platform.is_cpu())).create_engine_config()
    except _refusals() as error:
        return _said(error)
    return None


def _not_imported(error: ImportError) -> TeacherError:
    return TeacherError(
        f"vllm cannot be imported: {first_line(error)}. Beside a CPU build of torch, remove torchvision, torchaudio "
        "and torchcodec"
    )


def _refusals() -> tuple[type[Exception], ...]:
    """How vLLM (0.32) refuses; a TypeError where a quantisation takes its settings from the model's config alone."""
    from vllm.exceptions import VLLMError

    return VLLMError, ValueError, RuntimeError, AssertionError, ImportError, LookupError, OSError, TypeError


def _options(spec: GeneratorSpec, *, on_cpu: bool) -> dict[str, Any]:
    """Of `vllm.LLM`."""
    options: dict[str, Any] = {
        "model": str(spec.folder),
        "dtype": spec.dtype,
        "quantization": spec.quantization,
        "tensor_parallel_size": spec.tensor_parallel_size,
        # Inside a placement group vLLM would choose Ray, and ask it for actors of its own.
        "distributed_executor_backend": "mp" if spec.tensor_parallel_size > 1 else "uni",
        "max_model_len": spec.max_model_len,
        "max_num_seqs": spec.max_num_seqs,
        "enforce_eager": spec.enforce_eager or on_cpu,
        "enable_prefix_caching": True,
        "logprobs_mode": "raw_logprobs",
        "max_logprobs": max(20, 2 * (spec.decoding.beams or 0)),
        "trust_remote_code": spec.trust_remote_code,
        "disable_log_stats": True,
        "seed": 0,
    }
    if not on_cpu:
        options["gpu_memory_utilization"] = spec.gpu_memory_utilization
    return options


def _said(error: BaseException) -> str:
    """What is wrong on one line; pydantic's first line only counts the errors, and it names none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if "validation error" in lines[0]:
        lines = lines[1:2] if lines[1].startswith("Value error") else lines[1:3]
    return " ".join(lines[:2]).split(" [type=")[0].removeprefix("Value error, ")


def _ids_prompt(prompt: Sequence) -> Any:
    return {"prompt_token_ids": prompt.input_ids.tolist()}


def _sampling(decoding: Decoding, prompt: Sequence, sample: int) -> Any:
    from vllm import SamplingParams

    common: dict[str, Any] = {
        "max_tokens": decoding.max_tokens,
        "min_tokens": decoding.min_tokens,
        "stop": list(decoding.stop) or None,
        "logprobs": 0,
        "flat_logprobs": True,
    }
    if decoding.method == "greedy":
        return SamplingParams(temperature=0.0, **common)
    return SamplingParams(
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        top_k=decoding.top_k,
        seed=decoding.sample_seed(prompt.digest, sample),
        **common,
    )


def _generation(prompt: Sequence, sample: int, output: Any) -> Generation:
    ids = np.array(output.token_ids, np.int32)
    flat = output.logprobs
    logprobs = np.array([flat.logprobs[at] for at in flat.start_indices], np.float32)
    if len(logprobs) != len(ids) or [flat.token_ids[at] for at in flat.start_indices] != ids.tolist():
        raise TeacherError(f"vLLM gave {len(logprobs)} logprobs for {len(ids)} tokens: a release with other semantics?")
    return Generation(prompt.input_ids, sample, ids, logprobs, _finish(output), output.text)


def _finish(output: Any) -> Finish:
    if output.finish_reason == "length":
        return "length"
    if output.finish_reason == "stop":  # stop_reason: a stop string, the number of a further end token, or nothing
        return "stop" if isinstance(output.stop_reason, str) else "eos"
    raise TeacherError(f"vLLM ended a response with {output.finish_reason!r}, expected stop or length")


def _of_beam(prompt: Sequence, beam: Any, tokenizer: Any) -> Generation:
    """vLLM's own text of a beam begins with the prompt."""
    ids = np.array(beam.tokens[len(prompt.input_ids) :], np.int32)
    logprobs = [step[token].logprob for step, token in zip(beam.logprobs, ids.tolist(), strict=True)]
    finish: Finish = "eos" if len(ids) and ids[-1] == tokenizer.eos_token_id else "length"
    text = tokenizer.decode(ids.tolist(), skip_special_tokens=True)
    return Generation(prompt.input_ids, 0, ids, np.array(logprobs, np.float32), finish, text)


def _score(response: Generation, length_penalty: float) -> float:
    total = float(np.sum(response.logprobs, dtype=np.float64))
    return total / float(max(len(response.response_ids), 1) ** length_penalty)


def main() -> None:
    """Reads a `GeneratorSpec` as JSON, writes a JSON object as the last line: `refused`, or `error`."""
    try:
        answer = {"refused": refusal(GeneratorSpec.from_json(sys.stdin.read()))}
    except TeacherError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()

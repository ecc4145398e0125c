"""Which responses are kept, and why the others are not.

Enters: the responses to one prompt, a `QualityConfig`. Leaves: a `Verdict` for each. Costs: a pass over the tokens, and
what a user's function takes.
"""

from collections.abc import Sequence as Seq
from dataclasses import replace

from stillroom.pipeline.corpus.verdicts import KEPT, Verdict
from stillroom.pipeline.quality.own_function import Judge
from stillroom.pipeline.quality.scores import agrees, repetition
from stillroom.pipeline.recipe.generate_schema import QualityConfig
from stillroom.storage.generations.records import Generation

#: Of dropped responses, in the order in which they are looked for: the first that holds is the reason.
REASONS = ("too short", "too long", "truncated", "repetitive", "unlikely", "wrong answer", "low score", "duplicate",
           "not the best")  # fmt: skip


def judge_prompt(
    responses: Seq[Generation],
    config: QualityConfig,
    *,
    unit: str,
    prompt: str,
    reference: str | None,
    function: Judge | None,
) -> list[Verdict]:
    """Verdicts on all responses to one prompt, in their order. prompt: its text, for the user's function.

    A duplicate is one of the same prompt only: one answer may be right to two prompts, and a verdict that depended on
    other prompts would change with what a recipe asks beside this one.
    """
    found: list[Verdict] = []
    seen: set[str] = set()
    for response in responses:
        verdict = _alone(response, config, unit, prompt, reference, function)
        if verdict.kept and config.duplicates == "drop" and response.text in seen:
            verdict = replace(verdict, reason="duplicate")
        if verdict.kept:
            seen.add(response.text)
        found.append(verdict)
    if config.keep == "best":
        best = max((v for v in found if v.kept), key=lambda v: _worth(v, config), default=None)
        found = [replace(v, reason="not the best") if v.kept and v is not best else v for v in found]
    return found


def _worth(verdict: Verdict, config: QualityConfig) -> tuple[float, int]:
    """Of two that are equal, the first."""
    value = {
        "mean_logprob": verdict.mean_logprob,
        "total_logprob": verdict.mean_logprob * verdict.tokens,
        "score": verdict.score or 0.0,
    }[config.best_by]
    return value, -verdict.sample


def _alone(
    response: Generation,
    config: QualityConfig,
    unit: str,
    prompt: str,
    reference: str | None,
    function: Judge | None,
) -> Verdict:
    tokens = len(response.response_ids)
    repeated = repetition(response.response_ids, config.ngram)
    right = None
    if config.reference is not None and reference is not None:
        right = agrees(response.text, reference, config.reference)
    answer = None if function is None else function(prompt, response.text, reference)
    faults = {
        "too short": tokens < config.min_tokens,
        "too long": config.max_tokens is not None and tokens > config.max_tokens,
        "truncated": config.truncated == "drop" and response.finish == "length",
        "repetitive": config.max_repetition is not None and repeated > config.max_repetition,
        "unlikely": config.min_mean_logprob is not None and response.mean_logprob < config.min_mean_logprob,
        "wrong answer": right is False,
        "low score": answer is False
        or (config.min_score is not None and answer is not None and float(answer) < config.min_score),
    }
    return Verdict(
        prompt=response.prompt,
        sample=response.sample,
        sequence=response.sequence.digest,
        unit=unit,
        tokens=tokens,
        mean_logprob=response.mean_logprob,
        repetition=repeated,
        agrees=right,
        score=None if answer is None else float(answer),
        reason=next((reason for reason, holds in faults.items() if holds), KEPT),
    )

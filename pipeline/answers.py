"""Held-out prompts with what the teacher said to them, and a student's answers beside that.

Enters: a corpus manifest with generations, the tables of verdicts that it was made of, a student's answers. Leaves:
`Question`s; BLEU, ROUGE-L, and a JSONL of every prompt with both sides' words. Costs: reading the responses once.

A prompt is asked as the ids that the store of generations carries. Only for another tokenizer than the teacher's its
text is tokenised, which is said.
"""

import json
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stillroom.pipeline.corpus.config import CorpusConfig
from stillroom.pipeline.corpus.encode import Encoder
from stillroom.pipeline.corpus.generations import PREFIX, Kept, kept_responses
from stillroom.pipeline.corpus.ingest import is_heldout
from stillroom.pipeline.corpus.render import Rendered, content_of_prompt
from stillroom.pipeline.corpus.verdicts import read_verdicts
from stillroom.pipeline.quality.likeness import likeness, rouge_l
from stillroom.storage.files import LocalFiles
from stillroom.storage.generations.store import open_generations
from stillroom.storage.manifest import Manifest

#: In the run's folder: a JSONL for each student.
FOLDER = "answers"


@dataclass(frozen=True)
class Question:
    """prompt: digest of its ids as the teacher has them. text: what it says. ids: as the student is asked. references:
    the teacher's responses that are kept. stop: strings that ended them. retokenised: ids are made of the text."""

    prompt: str
    text: str
    ids: tuple[int, ...]
    references: tuple[str, ...]
    stop: tuple[str, ...]
    retokenised: bool


def questions(manifest: Manifest, tokenizer: Any, most: int) -> list[Question]:
    """Held-out prompts with a kept response: the first `most` by their digests, whatever the order of the corpus.

    manifest: says which are held out. tokenizer: the one that made it. Raises RecipeError, IdentityMismatch where the
    responses are not those by now, CorruptShard, StoreError.
    """
    config = CorpusConfig.model_validate(manifest.meta.config)
    found: dict[str, list[Question]] = {}
    for source in config.sources:
        if source.path.startswith(PREFIX):
            for question in _of_table(Path(source.path.removeprefix(PREFIX)), config, Encoder(config, tokenizer)):
                found.setdefault(question.prompt, []).append(question)
    asked = [found[prompt] for prompt in sorted(found)[:most]]
    return [replace(first, references=first.references + tuple(r for q in rest for r in q.references))
            for first, *rest in asked]  # fmt: skip


def _of_table(path: Path, config: CorpusConfig, encoder: Encoder) -> Iterator[Question]:
    """One for each kept response to a held-out prompt."""
    stop = tuple(open_generations(read_verdicts(path)[1]["store"]).identity.decoding.stop)
    for _, kept in kept_responses(path):
        prompt = kept.generation.prompt
        if is_heldout(content_of_prompt(prompt), share=config.heldout, seed=config.split_seed):
            same = kept.tokenizer == encoder.digest
            yield Question(
                prompt=prompt,
                text=kept.prompts.said(prompt)[0],
                ids=tuple(kept.generation.prompt_ids.tolist()) if same else _tokenised(kept, config, encoder),
                references=(kept.generation.text,),
                stop=stop,
                retokenised=not same,
            )


def _tokenised(kept: Kept, config: CorpusConfig, encoder: Encoder) -> tuple[int, ...]:
    """The prompt's text as this corpus renders it for another tokenizer, opened for the answer."""
    text, conversation = kept.prompts.said(kept.generation.prompt)
    rendered = Rendered("text", b"", text, None, special=True, eos=False)
    if conversation is not None:
        messages = json.loads(conversation)
        if config.pairs_as != "plain" and encoder.template is not None:
            rendered = replace(rendered, text=encoder.template(messages, True), special=False)
        else:
            rendered = replace(rendered, text="\n\n".join(turn["content"] for turn in messages))
    return tuple(encoder.encode([rendered])[0].input_ids.tolist())


def request(asked: Seq[Question], *, max_tokens: int) -> dict[str, Any]:
    """What the process that measures a student is told."""
    stop = sorted({word for question in asked for word in question.stop})
    return {"prompts": [list(q.ids) for q in asked], "max_tokens": max_tokens, "stop": stop}


def compared(
    asked: Seq[Question], given: Seq[Mapping[str, Any] | None], run_dir: Path, student: str
) -> dict[str, Any] | None:
    """Measures of the answers, and the file that holds them; None where there is none.

    given: as `Answer.as_dict` has them; None for a prompt that the student has no room for.
    """
    pairs = [(question, answer) for question, answer in zip(asked, given, strict=True) if answer is not None]
    if not pairs:
        return None
    found = likeness([answer["text"] for _, answer in pairs], [question.references for question, _ in pairs])
    lines = [
        {
            "prompt": question.prompt,
            "said": question.text,
            "student": answer["text"],
            "teacher": list(question.references),
            "tokens": answer["tokens"],
            "ended": answer["ended"],
            "rouge_l": rouge_l(answer["text"], question.references),
        }
        for question, answer in pairs
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    LocalFiles(run_dir / FOLDER).write(f"{student}.jsonl", text.encode())
    return {
        "prompts": len(pairs),
        "references": sum(len(question.references) for question, _ in pairs),
        "left_out": len(asked) - len(pairs),
        "ended": sum(answer["ended"] for _, answer in pairs) / len(pairs),
        **found.as_dict(),
        "file": f"{FOLDER}/{student}.jsonl",
    }

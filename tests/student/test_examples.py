"""The public API, and the two examples as they stand in deploy/, each trained for some steps."""

import importlib.util
import math
import runpy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from stillroom.pipeline.student.api import IGNORED, Distillation
from stillroom.pipeline.student.trainer import Trainer
from stillroom.storage.errors import RecipeError, UnsupportedSignal
from tests.student.world import World

EXAMPLES = Path(__file__).parents[2] / "deploy" / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def student_of(world: World) -> Any:
    """The teacher with noise on its weights."""
    model = AutoModelForCausalLM.from_pretrained(world.teacher, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def student_folder(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    student_of(world).save_pretrained(folder)
    return folder


def one_batch(distillation: Distillation, count: int = 3) -> dict[str, torch.Tensor]:
    loader = DataLoader(distillation.packs(epochs=1), batch_size=count, collate_fn=distillation.collate)
    return dict(next(iter(loader)))


def test_plain_torch_lowers_its_loss_and_is_short(world: World, student_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = example("plain_torch")
    losses = module.main(str(world.manifest), str(world.snapshot), str(student_folder), str(tmp_path), steps="40")
    assert len(losses) == 40
    assert sum(losses[-10:]) < sum(losses[:10])
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len((EXAMPLES / "plain_torch.py").read_text().splitlines()) < 40


@pytest.mark.parametrize("name", ["plain_torch", "hf_trainer"])
def test_an_example_without_arguments_says_how_it_is_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = EXAMPLES / f"{name}.py"
    monkeypatch.setattr("sys.argv", [str(path)])
    with pytest.raises(SystemExit, match=f"python {name}.py MANIFEST SNAPSHOT MODEL OUT"):
        runpy.run_path(str(path), run_name="__main__")


def test_the_trainer_of_hugging_face_lowers_its_loss(world: World, student_folder: Path, tmp_path: Path) -> None:
    module = example("hf_trainer")
    losses = module.main(str(world.manifest), str(world.snapshot), str(student_folder), str(tmp_path), steps="20")
    assert len(losses) == 20
    assert sum(losses[-5:]) < sum(losses[:5])
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_accumulated_steps_of_hugging_face_weigh_every_position_alike(
    world: World, student_folder: Path, tmp_path: Path
) -> None:
    """Its first logged loss, of two batches of two packs, is that of the four packs together."""
    module = example("hf_trainer")
    (first,) = module.main(str(world.manifest), str(world.snapshot), str(student_folder), str(tmp_path), steps="1")
    distillation = Distillation(world.manifest, world.snapshot, losses={"alpha": 0.7, "temperature": 2.0})
    model = AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float32)
    with torch.no_grad():
        expected = float(distillation.loss(model, one_batch(distillation, 4)))
    assert first == pytest.approx(expected, rel=1e-3)  # Trainer rounds what it logs


@pytest.mark.parametrize("packing", [True, False])
def test_loss_and_gradient_are_those_of_a_step_of_stillroom_train(packing: bool, world: World) -> None:
    losses = {"alpha": 0.6, "temperature": 3.0, "output": {"forward_kl": 1.0, "tv": 0.3}}
    distillation = Distillation(world.manifest, world.snapshot, losses=losses, packing=packing)
    packs = [pack for _, pack in zip(range(3), distillation.packs(epochs=1), strict=False)]
    own, theirs = student_of(world), student_of(world)
    loss = distillation.loss(own, distillation.collate(packs))
    loss.backward()
    config = world.job(Path("unused"), losses=losses, packing=packing, micro_packs=2, batch_packs=4).student
    trainer = Trainer(theirs, config, vocabulary=world.vocabulary, total_steps=1, device=torch.device("cpu"))
    expected = trainer.step(packs, 0)
    norm = torch.nn.utils.clip_grad_norm_(own.parameters(), math.inf)
    assert loss.item() == pytest.approx(expected.loss, rel=1e-5)
    assert float(norm) == pytest.approx(expected.grad_norm, rel=1e-4)


class Wrapped(torch.nn.Module):
    """As DDP: a module that has the model's forward and none of its other methods."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **named: Any) -> Any:
        return self.module(*args, **named)


def test_a_wrapped_model_and_the_plain_form_have_the_same_loss(world: World) -> None:
    model = student_of(world)
    fused = Distillation(world.manifest, world.snapshot)
    plain = Distillation(world.manifest, world.snapshot, losses={"fused": False})
    batch = one_batch(fused)
    expected = fused.loss(model, batch).item()
    assert fused.loss(Wrapped(model), batch).item() == pytest.approx(expected, rel=1e-5)
    assert plain.loss(model, batch).item() == pytest.approx(expected, rel=1e-5)


def test_labels_are_the_text_at_the_places_that_are_learned(world: World) -> None:
    batch = one_batch(Distillation(world.manifest, world.snapshot))
    learned = batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][learned], batch["target_labels"])
    assert torch.equal(batch["labels"][learned], batch["input_ids"][learned])
    assert int(learned.sum()) == int(batch["keep"].sum())


def test_ranks_and_workers_share_the_packs(world: World) -> None:
    distillation = Distillation(world.manifest, world.snapshot)
    whole = [pack.index for pack in distillation.packs(epochs=1)]
    ranks = [[pack.index for pack in distillation.packs(epochs=1, rank=r, world_size=2)] for r in (0, 1)]
    assert sorted(ranks[0] + ranks[1]) == sorted(whole)
    assert ranks[0] == whole[::2]
    assert [pack.index for pack in distillation.packs(epochs=1, start=2)] == whole[2:]


@pytest.mark.parametrize(
    ("losses", "error", "says"),
    [
        ({"alpha": 2}, RecipeError, "losses.alpha: must lie in 0"),
        ({"alpha": 0}, RecipeError, "nothing is learned from the store"),
        ({"temperature": {"from": 4, "to": 2}}, RecipeError, "changes with the step"),
        ({"signal": "hidden"}, UnsupportedSignal, "hidden"),
        ({"output": {"cosine": 1.0}}, UnsupportedSignal, "whole vocabulary"),
    ],
)
def test_what_cannot_be_learned_is_refused(
    losses: dict[str, Any], error: type[Exception], says: str, world: World
) -> None:
    with pytest.raises(error, match=says) as caught:
        Distillation(world.manifest, world.snapshot, losses=losses)
    assert "\n" not in str(caught.value)


def test_a_batch_without_anything_to_learn_has_no_loss(world: World) -> None:
    distillation = Distillation(world.manifest, world.snapshot)
    batch = one_batch(distillation)
    batch["target_weights"] = torch.zeros_like(batch["target_weights"])
    assert distillation.loss(student_of(world), batch).item() == 0.0

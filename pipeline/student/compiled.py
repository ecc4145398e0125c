"""torch.compile of a student's body: its layers as fused kernels. The head and the loss stay as they are.

Enters: the student, one of its batches. Leaves: the same model, whose body runs compiled from now on; parameters keep
their names. Costs: a compilation for each shape and each of training and evaluation, seconds to minutes, in every
process anew unless torch's cache has it.

Packed windows are of one shape: a kernel each. Rows that are not packed come in many: kernels for any shape. Neither
depends on which shape came first, so that a run that goes on computes what one that was not stopped does.
"""

from typing import Any

import torch

from stillroom.pipeline.student.collate import Batch
from stillroom.pipeline.student.forward import NOISE, hidden_at
from stillroom.storage.errors import StudentError, first_line

BACKEND = "inductor"

#: Kernels sum in another order than the plain form, layer after layer.
MARGIN = 10.0


def compile_body(model: Any, batch: Batch, *, packing: bool) -> str:
    """Compile, and compare what the head is given with the plain form's; a line that says how far it is off.

    Raises StudentError where the model cannot be compiled on this machine, or comes out otherwise.
    """
    body = model.get_decoder()
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            plain_MD = hidden_at(model, batch).float()
            torch.compiler.reset()  # models of one class share a limit of 8 graphs: past it they silently stay eager
            body.compile(backend=BACKEND, dynamic=not packing)
            found_MD = hidden_at(model, batch).float()
    except Exception as error:  # whatever a compiler and a model make of each other
        raise StudentError(
            f"compile: {type(model).__name__} cannot be compiled here ({type(error).__name__}: {first_line(error)}); "
            "set compile to false"
        ) from error
    finally:
        model.train(was_training)
    off = float((found_MD - plain_MD).abs().max()) / max(1e-30, float(plain_MD.abs().max()))
    if not off <= MARGIN * NOISE:
        raise StudentError(
            f"compile: {type(model).__name__} compiled gives hidden states that are off by {off:.1e} of the largest, "
            f"where {MARGIN * NOISE:.0e} is noise; set compile to false"
        )
    return f"body compiled by {BACKEND}: off by {off:.0e} of its largest hidden state"

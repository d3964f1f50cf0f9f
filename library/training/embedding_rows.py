"""What a dry run says of a run's embeddings: each token with its vectors and what they start from, how long they are
trained, and what the optimizer keeps for them. Imports no torch.
"""

from collections.abc import Iterator
from math import prod

from library.training.embedding_plan import EmbeddingPlan, PlannedToken
from library.training.embedding_words import counted, start_text
from library.training.expected import vector_shapes
from library.training.memory_demand import vector_state
from library.training.prepare import Prepared

BYTES = {None: 4, "float": 4, "fp16": 2, "bf16": 2}
"""Of a number in a file, by `--save_precision`."""


def embedding_lines(prepared: Prepared) -> Iterator[str]:
    """A line for each token, then what goes for all that are trained; nothing without embeddings."""
    plan = prepared.embeddings
    if plan is None:
        return
    for one in plan.base:
        yield f"embedding {_held(prepared, one)}, frozen, from {one.file}"
    for place, one in enumerate(plan.trained):
        numbers = one.token.vectors * sum(prepared.model.text_widths)
        size = numbers * BYTES[prepared.options.output.save_precision]
        start = start_text(prepared.options, place, resumed=prepared.resume is not None)
        yield f"embedding {_held(prepared, one)}, {numbers:,} numbers, {size:,} bytes in a file, {start}"
    if plan.trains:
        yield from _training(prepared, plan)


def _held(prepared: Prepared, one: PlannedToken) -> str:
    encoders = " and ".join(encoder.part for encoder in prepared.model.family.text_encoders)
    return f"{counted(one.token)} for {encoders}"


def _training(prepared: Prepared, plan: EmbeddingPlan) -> Iterator[str]:
    total, shapes = prepared.clock.total_updates, vector_shapes(prepared.model, plan)
    steps = plan.frozen_after(total)
    if steps is not None and steps < total:
        yield f"the vectors are trained in the first {steps:,} of {total:,} steps"
    state = vector_state(prepared.options, shapes)
    if state is not None:
        yield f"optimizer state of the vectors: {state:,} bytes ({sum(map(prod, shapes)):,} numbers)"

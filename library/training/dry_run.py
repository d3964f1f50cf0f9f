"""`--dry_run`: everything that a run would do, as tables on stdout. Imports no torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from library.data import report
from library.data.custom import CustomPlan
from library.data.plan import Plan
from library.models.weighted import fragments
from library.tokenizer import WORDS
from library.tokenizer.vocabulary import PLAIN
from library.training.embedding_rows import BYTES, embedding_lines
from library.training.expected import expected_modules
from library.training.memory_plan import Prediction
from library.training.prepare import Prepared
from library.training.state import SUFFIX
from library.training.steps import VALIDATION_TIMESTEPS, Clock, SavePlan
from library.training.text_use import text_use
from library.training.weight_files import Holds, weight_files
from networks.planned import Planned

SHOWN = 6
_HELD: Mapping[Holds, str] = {
    "network": "weights",
    "kohya": "embedding",
    "webui": "embedding for A1111",
    "diffusers": "embedding for diffusers",
    "bundle": "bundle",
}


def show(prepared: Prepared, prediction: Prediction) -> None:
    """Print the tables of data, steps, files, network and embeddings, and how much memory the run will need."""
    plan, clock = prepared.plan, prepared.clock
    report.line(prepared.model.line)
    if isinstance(plan, CustomPlan):
        report.line(
            f"--dataset_class {plan.name}: {len(plan.items)} items, each a batch; what they hold isn't looked at"
        )
    else:
        _show_data(prepared)
    report.steps_table(
        samples=plan.samples_per_epoch,
        batches=clock.batches_per_epoch,
        accumulation=clock.accumulation,
        updates_per_epoch=clock.updates_per_epoch,
        epochs=clock.epochs,
        steps=clock.total_updates,
        global_batch="+".join(
            str(plan.global_batch_size(number))
            for number, dataset in enumerate(plan.datasets)
            if dataset.records or isinstance(plan, CustomPlan)
        ),
    )
    if prepared.data.held_out is not None:
        _show_validation(prepared, prepared.data.held_out)
    report.saves_table(_save_rows(prepared))
    if prepared.trains_network:
        report.network_table(_network_rows(prepared))
    for line in (*embedding_lines(prepared), *prediction.lines()):
        report.line(line)


def _show_validation(prepared: Prepared, held_out: Plan) -> None:
    """When held-out pictures are looked at, and how much that is."""
    clock, wanted = prepared.clock, prepared.options.dataset.max_validation_steps
    batches = min(held_out.batches_per_epoch, wanted or held_out.batches_per_epoch)
    passes = sum(bool(prepared.validations.due(done, clock)) for done in range(clock.total_updates + 1))
    report.line(
        f"validation: {held_out.samples_per_epoch:,} pictures held out; {passes:,} passes of {batches:,} batches, "
        f"each at {VALIDATION_TIMESTEPS} timesteps"
    )


def _show_data(prepared: Prepared) -> None:
    options, plan, clock = prepared.options, prepared.plan, prepared.clock
    report.show_data(
        prepared.scan,
        plan,
        seed=prepared.seed,
        token_limit=options.model.max_token_length or WORDS,
        fragments=fragments if options.dataset.weighted_captions else None,
        pad_id=min(encoder.pad_id for encoder in prepared.model.family.text_encoders),
        vocabulary=prepared.embeddings.vocabulary if prepared.embeddings else PLAIN,
        text=text_use(prepared),
        accumulation=clock.accumulation,
        total_steps=clock.total_updates,
    )


def write_samples(prepared: Prepared) -> None:
    """`--debug_dataset`: pictures of what the model would see in the first epoch, in the output folder."""
    from library.data.sample_sheets import write_sheets

    options = prepared.options
    folder = Path(str(options.output.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{options.output.output_name or 'last'}-dataset"
    written = write_sheets(
        prepared.plan,
        folder,
        name,
        seed=prepared.seed,
        prior_loss_weight=options.loss.prior_loss_weight,
        accumulation=prepared.clock.accumulation,
        total_steps=prepared.clock.total_updates,
    )
    for path in written:
        report.line(f"wrote {path}")


def _save_rows(prepared: Prepared) -> list[tuple[str, str, str]]:
    clock, plan, encoders = prepared.clock, prepared.saves, len(prepared.model.family.text_encoders)
    rows: list[tuple[str, str, str]] = []
    for done in _moments(plan, clock):
        for save in plan.due(done, clock):
            files = weight_files(prepared.options, prepared.embeddings, encoders, save.stem)
            rows += [(_HELD[file.holds], f"step {done}", file.name) for file in files]
            if save.state:
                rows.append(("state", f"step {done}", f"{save.stem}{SUFFIX}/"))
    if len(rows) > 2 * SHOWN:
        left_out = len(rows) - 2 * SHOWN
        rows = [*rows[:SHOWN], ("...", f"{left_out} more", "..."), *rows[-SHOWN:]]
    if prepared.prompts:
        drawn = [done for done in range(clock.total_updates + 1) if prepared.previews.due(done, clock)]
        when = ", ".join(str(done) for done in drawn[:8]) + (" ..." if len(drawn) > 8 else "")
        rows.append((f"{len(prepared.prompts)} previews", f"steps {when}" if drawn else "never", "sample/"))
    return rows


def _moments(plan: SavePlan, clock: Clock) -> list[int]:
    """The steps after which something may be saved, without walking through every step of a long run."""
    moments = {clock.total_updates}
    if plan.every_n_steps:
        moments |= set(range(plan.every_n_steps, clock.total_updates + 1, plan.every_n_steps))
    if plan.every_n_epochs:
        stride = plan.every_n_epochs * clock.updates_per_epoch
        moments |= set(range(stride, clock.total_updates + 1, stride))
    return sorted(moments)


def _network_rows(prepared: Prepared) -> list[report.NetworkRow]:
    """One row per trained part of a network of ours; another module's size is known only when it is made."""
    options, model, rates = prepared.options, prepared.model, prepared.rates
    network = options.network
    rows = expected_modules(prepared.options, prepared.model, prepared.rates)
    if rows is None:
        what = "as --network_weights" if network.dim_from_weights else " ".join(network.network_args or ())
        return [report.NetworkRow(f"{network.network_module} {what}".strip())]
    found = [report.NetworkRow(f"--base_weights {file}, merged first") for file in network.base_weights or ()]
    parts = [("unet", rates.unet, [row for row in rows if row.target.part == "unet"])]
    for number, (encoder, rate) in enumerate(zip(model.family.text_encoders, rates.text_encoders, strict=True)):
        mine = [row for row in rows if row.target.part == "text_encoder" and row.target.encoder == number]
        parts.append((encoder.part, rate, mine))
    for part, rate, chosen in parts:
        if rate and chosen:
            count = sum(row.parameters for row in chosen)
            size = float(count * BYTES[options.output.save_precision])
            shapes = _shapes(chosen, alphas=not network.dim_from_weights)
            found.append(report.NetworkRow(part, len(chosen), shapes, count, size))
    return found


def _shapes(rows: Sequence[Planned], *, alphas: bool) -> str:
    """The ranks of a part with their alphas, convolutions apart: `8 (4), 3x3: 4 (1)`; of several, the ends."""
    plain = [row for row in rows if row.target.kernel != "3x3"]
    conv = [row for row in rows if row.target.kernel == "3x3"]
    texts = []
    for name, some in (("", plain), ("3x3: ", conv)):
        if some:
            alpha = f" ({_ends([row.alpha for row in some])})" if alphas else ""
            texts.append(f"{name}{_ends([row.rank for row in some])}{alpha}")
    return ", ".join(texts)


def _ends(numbers: Sequence[float]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"

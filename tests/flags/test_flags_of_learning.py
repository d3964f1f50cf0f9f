"""Flags of the run's length, of optimizers and learning rates: logged steps and rates, and the weights that follow."""

import math

import numpy as np
import pytest

from tests.flags.effects import Ran, Runs, equal, observes, part, same

pytestmark = pytest.mark.xdist_group("flags of learning")
LIGHT = ("--network_train_unet_only", "--network_dim", "1")
STILL = (*LIGHT, "--learning_rate", "1e-12")
SGD = (*LIGHT, "--optimizer_type", "SGD", "--learning_rate", "0.5", "--max_train_steps", "1")
FOUR = (*LIGHT, "--max_train_steps", "4", "--learning_rate", "1")


def ups(ran: Ran) -> np.ndarray:
    """Every number of the up weights, which start at 0, so that after one step they are that step."""
    return np.concatenate([value.ravel() for key, value in ran.weights.items() if "lora_up" in key])


def downs(ran: Ran) -> np.ndarray:
    return np.concatenate([value.ravel() for key, value in ran.weights.items() if "lora_down" in key])


@observes("max_train_steps", "max_train_epochs", "gradient_accumulation_steps", "train_batch_size", "dataset_repeats")
def test_a_run_is_as_long_as_asked_and_its_batches_as_large(runs: Runs) -> None:
    three = runs(*STILL, "--max_train_steps", "4")
    assert [line["step"] for line in three.steps] == [1, 2, 3, 4]
    epochs = runs(*STILL, "--max_train_epochs", "2", "--train_batch_size", "4")
    assert [line["step"] for line in epochs.steps] == [1, 2, 3, 4] and epochs.metadata["ss_num_epochs"] == "2"
    assert epochs.metadata["ss_num_batches_per_epoch"] == "2"
    halves = runs(*STILL, "--gradient_accumulation_steps", "2")
    pairs = [sum(three.losses[i : i + 2]) / 2 for i in (0, 2)]
    assert halves.losses == pytest.approx(pairs, rel=1e-5)
    flat = runs.root / "flat"
    if not flat.is_dir():
        flat.mkdir()
        for path in (runs.root / "pictures" / "2_thing").iterdir():
            (flat / path.name).write_bytes(path.read_bytes())
        (flat / "metadata.json").write_text('{"picture00": {"caption": "from metadata"}}')
    listed = ("--train_data_dir", "@/flat", "--in_json", "@/flat/metadata.json", "--max_train_epochs", "1")
    once, often = runs(*STILL, *listed), runs(*STILL, *listed, "--dataset_repeats", "3")
    assert (len(once.steps), len(often.steps)) == (1, 3)


@observes("in_json")
def test_captions_come_from_a_metadata_file(runs: Runs) -> None:
    test_a_run_is_as_long_as_asked_and_its_batches_as_large(runs)
    listed = ("--train_data_dir", "@/flat", "--in_json", "@/flat/metadata.json", "--max_train_epochs", "1")
    assert "from" in runs(*STILL, *listed).metadata["ss_tag_frequency"]


@observes("seed")
def test_a_seed_decides_every_draw(runs: Runs) -> None:
    one, again, other = runs(), runs.fresh(), runs("--seed", "4")
    assert same(one, again) and one.losses == again.losses
    assert not same(one, other) and one.losses != other.losses
    assert (one.metadata["ss_seed"], other.metadata["ss_seed"]) == ("3", "4")


@observes("resume", "resume_schedule")
def test_a_run_goes_on_from_a_state_on_the_old_curve_or_a_stretched_one(runs: Runs) -> None:
    curve = (*LIGHT, "--learning_rate", "1e-2", "--lr_scheduler", "linear")
    whole = runs(*curve, "--max_train_steps", "4", "--save_state", "--save_every_n_steps", "2")
    state = str(whole.folder / "x-step00000002-state")
    resumed = runs(*curve, "--max_train_steps", "4", "--resume", state)
    assert same(whole, resumed) and [line["step"] for line in resumed.steps] == [3, 4]
    longer = (*curve, "--max_train_steps", "8", "--resume", state)
    kept, stretched = (runs(*longer, "--resume_schedule", how) for how in ("keep", "stretch"))
    assert kept.logged("lr/unet") == pytest.approx([5e-3, 2.5e-3, 0, 0, 0, 0], abs=1e-12)
    assert stretched.logged("lr/unet") == pytest.approx([1e-2 * (1 - step / 8) for step in range(2, 8)])
    assert "--resume_schedule" in runs(*longer, expect=2).err


@observes("initial_step", "initial_epoch")
def test_a_run_starts_where_it_is_told_to(runs: Runs) -> None:
    all_of_it = runs(*STILL, "--max_train_steps", "4")
    later = runs(*STILL, "--max_train_steps", "4", "--initial_step", "2")
    assert [line["step"] for line in later.steps] == [3, 4] and later.losses == pytest.approx(all_of_it.losses[2:])
    epochs = (*STILL, "--train_batch_size", "4", "--max_train_epochs", "2")
    second = runs(*epochs, "--initial_epoch", "2")
    assert [line["step"] for line in second.steps] == [3, 4]
    assert second.losses == pytest.approx(runs(*epochs).losses[2:])


@observes("stop_text_encoder_training")
def test_text_encoders_stop_and_the_unet_goes_on(runs: Runs) -> None:
    short, long = runs("--network_dim", "1"), runs("--network_dim", "1", "--max_train_steps", "4")
    for stop in ("2", "50%"):
        stopped = runs("--network_dim", "1", "--max_train_steps", "4", "--stop_text_encoder_training", stop)
        assert equal(part(stopped, "lora_te"), part(short, "lora_te"))
        assert not equal(part(stopped, "lora_unet"), part(short, "lora_unet"))
        assert not equal(part(stopped, "lora_te"), part(long, "lora_te"))
    never = runs("--network_dim", "1", "--stop_text_encoder_training", "-1")
    assert not part(never, "lora_te") and part(never, "lora_unet")


@observes("early_stopping_patience", "validate_every_n_steps", "max_validation_steps", "validate_every_n_epochs")
def test_a_run_ends_when_validation_gets_no_better(runs: Runs) -> None:
    watched = (*STILL, "--max_train_steps", "4", "--validation_split", "0.5", "--seed", "5")
    patient = runs(*watched, "--validate_every_n_steps", "1")
    looks = [line for line in patient.lines if "loss/validation/step_average" in line]
    assert [line["step"] for line in looks] == [0, 1, 2, 3, 4] and len(patient.steps) == 4
    stopped = runs(*watched, "--validate_every_n_steps", "1", "--early_stopping_patience", "1")
    assert "stopping early at step" in stopped.err and len(stopped.steps) < 4
    few = runs(*watched, "--validate_every_n_steps", "4", "--max_validation_steps", "1")
    fewer = [line for line in few.lines if "loss/validation/step_average" in line]
    assert [line["step"] for line in fewer] == [0, 4]
    assert fewer[0]["loss/validation/step_average"] != pytest.approx(looks[0]["loss/validation/step_average"], rel=1e-3)
    epochs = runs(*watched, "--train_batch_size", "2", "--validate_every_n_epochs", "2")
    assert [line["epoch"] for line in epochs.lines if "loss/validation/epoch_average" in line] == [0, 2]


@observes("ignore_memory_check")
def test_too_little_memory_stops_a_run_unless_told_otherwise(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    from library.training import memory_plan

    monkeypatch.setattr(memory_plan, "available_memory", lambda: 10 * 2**20)
    refused = runs.fresh(*STILL, expect=2)
    assert "main memory" in refused.err and "--ignore_memory_check" in refused.err and not refused.steps_were_made
    assert len(runs.fresh(*STILL, "--ignore_memory_check").steps) == 2


@observes("optimizer_type", "optimizer_args", "learning_rate", "max_grad_norm")
def test_the_first_step_of_sgd_is_the_clipped_gradient_times_the_rate(runs: Runs) -> None:
    free = runs(*SGD, "--max_grad_norm", "0")
    (norm,) = free.logged("norm/grad_norm")
    assert norm > 0.01 and np.linalg.norm(ups(free)) == pytest.approx(0.5 * norm, rel=1e-4)
    clipped = runs(*SGD, "--max_grad_norm", "0.01")
    assert clipped.logged("norm/grad_norm") == pytest.approx([norm])
    assert np.linalg.norm(ups(clipped)) == pytest.approx(0.5 * 0.01, rel=1e-4)
    assert np.allclose(ups(clipped) / 0.01 * norm, ups(free), rtol=1e-3, atol=1e-7)
    default = runs(*SGD)
    assert np.linalg.norm(ups(default)) == pytest.approx(0.5 * min(1, norm), rel=1e-4)
    slow = runs(*SGD[:-4], "--learning_rate", "0.25", "--max_train_steps", "1", "--max_grad_norm", "0")
    assert np.allclose(2 * ups(slow), ups(free), rtol=1e-4, atol=1e-8)
    decayed = runs(*SGD, "--optimizer_args", "weight_decay=0.2")
    assert np.allclose(downs(decayed), downs(default) * (1 - 0.5 * 0.2), rtol=1e-4)
    assert "SGD(weight_decay=0.2)" in decayed.metadata["ss_optimizer"]


@observes("use_lion_optimizer", "use_8bit_adam", "optimizer_type")
def test_old_names_choose_their_optimizers(runs: Runs) -> None:
    once = (*LIGHT, "--learning_rate", "1e-3", "--max_train_steps", "1")
    adam, lion = runs(*once), runs(*once, "--use_lion_optimizer")
    assert set(np.unique(np.abs(ups(lion)))) <= {np.float32(0), np.float32(1e-3)}
    assert not np.array_equal(ups(adam), ups(lion)) and np.abs(ups(adam)).max() == pytest.approx(1e-3, rel=1e-3)
    assert same(lion, runs(*once, "--optimizer_type", "Lion"))
    eight = runs(*once, "--use_8bit_adam")
    assert same(eight, runs(*once, "--optimizer_type", "AdamW8bit"))
    names = [ran.metadata["ss_optimizer"] for ran in (adam, lion, eight)]
    assert "AdamW8bit" in names[2] and "Lion" in names[1] and names[0].startswith("torch.optim")
    assert runs(*once, "--use_8bit_adam", "--use_lion_optimizer", expect=2).err.count("error: ") == 1


@observes("list_optimizers")
def test_optimizers_and_schedules_are_listed(runs: Runs) -> None:
    listed = runs("--list_optimizers")
    assert all(name in listed.out for name in ("AdamW8bit", "Prodigy", "cosine_with_restarts"))
    assert not listed.steps_were_made


@observes("unet_lr", "text_encoder_lr", "learning_rate")
def test_each_part_has_its_own_rate(runs: Runs) -> None:
    ran = runs("--unet_lr", "2e-3", "--text_encoder_lr", "5e-4", "--max_train_steps", "1")
    assert (ran.logged("lr/unet"), ran.logged("lr/textencoder")) == ([2e-3], [5e-4])
    for start, rate in (("lora_unet", 2e-3), ("lora_te", 5e-4)):
        steps = [np.abs(value).max() for key, value in part(ran, start).items() if "lora_up" in key]
        assert max(steps) == pytest.approx(rate, rel=1e-2)
    both = runs("--text_encoder_lr", "1e-3", "0", "--unet_lr", "0", "--max_train_steps", "1", model="sdxl")
    assert both.weights and all(key.startswith("lora_te1") for key in both.weights)
    assert set(runs().logged("lr/unet")) == {1e-2}


def half_cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * share))


RATES: dict[str, tuple[tuple[str, ...], list[float]]] = {
    "constant": ((), [1, 1, 1, 1]),
    "linear": (("--lr_scheduler", "linear"), [1, 0.75, 0.5, 0.25]),
    "warmup": (("--lr_scheduler", "linear", "--lr_warmup_steps", "2"), [0, 0.5, 1, 0.5]),
    "ratio": (("--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "0.5"), [0, 0.5, 1, 1]),
    "decay": (("--lr_scheduler", "warmup_stable_decay", "--lr_decay_steps", "2"), [1, 1, 1, 0.5]),
    "cycles": (("--lr_scheduler", "cosine_with_restarts", "--lr_scheduler_num_cycles", "2"), [1, 0.5, 1, 0.5]),
    "power": (
        ("--lr_scheduler", "polynomial", "--lr_scheduler_power", "2", "--lr_scheduler_args", "lr_end=2e-4"),
        [0.8 * (1 - step / 4) ** 2 + 0.2 for step in range(4)],
    ),
    "end": (("--lr_scheduler", "polynomial"), [(1 - 1e-4) * (1 - step / 4) + 1e-4 for step in range(4)]),
    "timescale": (
        ("--lr_scheduler", "inverse_sqrt", "--lr_scheduler_timescale", "3"),
        [(3 / (3 + step)) ** 0.5 for step in range(4)],
    ),
    "least": (
        ("--lr_scheduler", "cosine_with_min_lr", "--lr_scheduler_min_lr_ratio", "0.4"),
        [0.4 + 0.6 * half_cosine(step / 4) for step in range(4)],
    ),
    "class": (
        ("--lr_scheduler_type", "ExponentialLR", "--lr_scheduler_args", "gamma=0.5"),
        [1, 0.5, 0.25, 0.125],
    ),
}


@observes(
    *("lr_scheduler", "lr_warmup_steps", "lr_decay_steps", "lr_scheduler_num_cycles", "lr_scheduler_power"),
    *("lr_scheduler_timescale", "lr_scheduler_min_lr_ratio", "lr_scheduler_args", "lr_scheduler_type"),
)
@pytest.mark.parametrize("name", RATES)
def test_logged_rates_are_the_curve(runs: Runs, name: str) -> None:
    flags, shares = RATES[name]
    ran = runs(*LIGHT, "--max_train_steps", "4", "--learning_rate", "1e-3", *flags)
    assert ran.logged("lr/unet") == pytest.approx([1e-3 * share for share in shares], rel=1e-6, abs=1e-12)


@observes("lr_scheduler", "lr_warmup_steps")
def test_the_weights_move_by_the_logged_rates(runs: Runs) -> None:
    flags = ("--learning_rate", "1e-3", "--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "1")
    assert not ups(runs(*LIGHT, *flags, "--max_train_steps", "1")).any()
    assert ups(runs(*LIGHT, *flags)).any()

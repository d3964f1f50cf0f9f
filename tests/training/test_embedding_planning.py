"""What is known of embeddings before a model is loaded: groups, memory, a trial of the optimizer, a dry run's lines."""

from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from library.options import parse
from library.options.scripts import TRAIN_NETWORK, TRAIN_TEXTUAL_INVERSION
from library.training import dry_run
from library.training.expected import EMBEDDING, embedding_groups, expected_groups, expected_modules, vector_shapes
from library.training.memory_demand import vector_state
from library.training.memory_plan import Prediction, predict, predict_memory
from library.training.optimizers import build_optimizer
from library.training.out_of_memory import remedies
from library.training.prepare import Prepared, Resume, prepare
from library.training.state import RunState
from library.training.text_use import text_use
from library.training.weight_files import weight_files
from tests.pictures import make_pictures
from tests.training.embedding_models import make

Prepare = Callable[..., Prepared]
NETWORK = ("--network_module", "networks.lora", "--network_dim", "2")
TWO = ("--token_string", "mycat", "blorp", "--num_vectors_per_token", "3", "1")


@pytest.fixture
def prepared(tiny_models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """A run of eight steps on four pictures; with a `--network_module` among the flags by train_network.py."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    make_pictures(tmp_path / "pictures", count=4, name="mycat blorp")

    def find(*flags: object, family: str = "sd1") -> Prepared:
        line = [
            *("--pretrained_model_name_or_path", tiny_models(family), "--train_data_dir", tmp_path / "pictures"),
            *("--output_dir", tmp_path / "output", "--output_name", "cat", "--max_train_steps", 8),
            *("--resolution", 64, "--caption_extension", ".txt", "--seed", 1, *flags),
        ]
        script = TRAIN_NETWORK if "--network_module" in flags else TRAIN_TEXTUAL_INVERSION
        return prepare(parse([str(one) for one in line], script=script))

    return find


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("network", [(), NETWORK], ids=["alone", "with a network"])
def test_the_last_group_is_that_of_the_vectors(
    family: str, network: tuple[str, ...], prepared: Prepare, tiny_models: Callable[[str], Path]
) -> None:
    run = prepared(*TWO, *network, "--embedding_lr", "3e-3", family=family)
    found = expected_groups(run.options, run.model, run.rates, run.embeddings)
    made = make(tiny_models(family), run.embeddings)
    (real,) = made.trainable.groups
    assert found is not None and made.trainable.descriptions == [EMBEDDING] == [found[-1].name]
    assert found[-1].rate == real["lr"] == 3e-3
    assert list(found[-1].shapes) == [tuple(one.shape) for one in real["params"]]
    assert (len(found) > 1) == bool(network)
    assert all(group.name != EMBEDDING for group in found[:-1])


def test_without_a_network_there_are_no_modules(prepared: Prepare) -> None:
    run = prepared(*TWO)
    assert expected_modules(run.options, run.model, run.rates) == ()
    assert not run.trains_network


def test_frozen_embeddings_are_no_group(prepared: Prepare, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"emb_params": torch.zeros(2, 32)}, tmp_path / "style.safetensors")
    width = prepared(*TWO).model.text_widths[0]
    save_file({"emb_params": torch.zeros(2, width)}, tmp_path / "style.safetensors")
    run = prepared(*NETWORK, "--base_embeddings", f"blorp={tmp_path / 'style.safetensors'}")
    assert run.embeddings is not None and not run.embeddings.trains
    assert embedding_groups(run.model, run.embeddings) == [] and vector_shapes(run.model, run.embeddings) == ()
    frozen = prepared(*NETWORK, "--network_train_unet_only", "--base_embeddings", f"blorp={tmp_path}/style.safetensors")
    assert not text_use(frozen).trains


def test_text_has_gradients_while_vectors_train(prepared: Prepare) -> None:
    assert text_use(prepared(*TWO)).trains
    assert text_use(prepared(*TWO, *NETWORK, "--network_train_unet_only")).trains


def test_memory_of_vectors_alone(prepared: Prepare) -> None:
    run = prepared(*TWO, family="sdxl")
    demand = predict_memory(run).demand
    assert demand.vectors == 4 * sum(run.model.text_widths)
    assert (demand.parameters, demand.rank, demand.conv_rank, demand.whole_weights) == (0, 0, 0, 0)
    assert demand.trains_text and not demand.releases_text and demand.text_bytes == 0
    assert "network and optimizer" not in dict(predict_memory(run).parts)


def test_memory_with_a_network_is_that_of_both(prepared: Prepare) -> None:
    alone, network, both = prepared(*TWO), prepared(*NETWORK), prepared(*TWO, *NETWORK)
    demand = predict_memory(both).demand
    assert demand.vectors == predict_memory(alone).demand.vectors > 0 == predict_memory(network).demand.vectors
    assert demand.parameters == predict_memory(network).demand.parameters > 0
    more = predict_memory(both).moments["steps"] - predict_memory(network).moments["steps"]
    assert more == demand.vectors * 16, "the vectors, their gradients and AdamW's two moments in float32"


def test_vectors_make_frozen_text_encoders_keep_what_they_compute(prepared: Prepare) -> None:
    only = (*NETWORK, "--network_train_unet_only")

    def steps(found: Prediction) -> int:
        return found.moments["steps"]

    frozen, with_vectors = (predict_memory(prepared(*only, *more)) for more in ((), TWO))
    assert steps(with_vectors) - steps(frozen) > with_vectors.demand.vectors * 16 - frozen.demand.text_bytes


def test_text_encoders_keep_less_without_adapters(prepared: Prepare) -> None:
    alone, both = (predict_memory(prepared(*TWO, *more)).demand for more in ((), NETWORK))
    assert (alone.adapts_text, both.adapts_text) == (False, True)
    large = replace(both, bucket=(64, 64), batch=64)
    assert predict(replace(large, adapts_text=False)).moments["steps"] < predict(large).moments["steps"]


def test_gradients_of_pooled_texts_go_through_every_block(prepared: Prepare) -> None:
    """The first blocks of SDXL's U-Net don't look at texts, but are told what is pooled of them."""
    more = {}
    for family in ("sd1", "sdxl"):
        demand = predict_memory(prepared(*TWO, family=family)).demand
        large = replace(demand, bucket=(1024, 1024), cached_latents=True)
        found = [dict(predict(one).parts)["activations"] for one in (large, replace(large, trains_text=False))]
        more[family] = found[0] / found[1]
    assert more["sd1"] < 1.02 and more["sdxl"] > 1.05, more


def test_advice_leaves_the_text_encoders_where_vectors_train(prepared: Prepare) -> None:
    both = predict_memory(prepared(*TWO, *NETWORK)).demand
    large = replace(both, bucket=(1024, 1024), batch=4)
    assert not any("cache_text_encoder_outputs" in line for line in remedies(predict(large)))
    assert remedies(predict(large))


SDXL_SHAPES = ((8, 768), (8, 1280))


def test_adamws_moments_of_eight_vectors_for_sdxl(prepared: Prepare) -> None:
    assert vector_state(prepared(*TWO).options, SDXL_SHAPES) == 131_072


@pytest.mark.parametrize(
    "name", ["AdamW", "Lion", "Prodigy", "SGDNesterov", "AdamW8bit", "Lion8bit", "AdamWScheduleFree"]
)
def test_told_state_is_what_the_optimizer_keeps(name: str, prepared: Prepare) -> None:
    from library.options.optimizer_names import optimizer_info

    info = optimizer_info(name)
    assert info is not None
    pytest.importorskip(info.module.partition(".")[0])
    shapes = ((4, 768), (3, 1280))
    weights = [torch.nn.Parameter(torch.full(shape, 0.1)) for shape in shapes]
    built = build_optimizer(name, [{"params": weights, "lr": 1e-3}], {}, device=torch.device("cpu"))
    for weight in weights:
        weight.grad = torch.full_like(weight, 0.01)
    if info.schedule_free:
        built.optimizer.train()
    built.optimizer.step()
    kept: list[Any] = [value for state in built.optimizer.state.values() for value in state.values()]
    size = sum(value.nbytes for value in kept if isinstance(value, torch.Tensor) and value.numel() in map(prod, shapes))
    assert vector_state(prepared(*TWO, "--optimizer_type", name).options, shapes) == size


@pytest.mark.parametrize(
    "flags",
    [
        ("--optimizer_type", "Adafactor"),
        ("--optimizer_type", "torch.optim.AdamW"),
        ("--optimizer_args", "amsgrad=True"),
    ],
)
def test_what_isnt_known_exactly_isnt_told(flags: tuple[str, ...], prepared: Prepare) -> None:
    assert vector_state(prepared(*TWO, *flags).options, SDXL_SHAPES) is None


def said(run: Prepared, capsys: pytest.CaptureFixture[str]) -> str:
    dry_run.show(run, predict_memory(run))
    return capsys.readouterr().out


def test_a_dry_run_tells_of_each_token(prepared: Prepare, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    run = prepared("--token_string", "mycat", "--init_word", "cat", "--num_vectors_per_token", "2")
    width = run.model.text_widths[0]
    out = said(run, capsys)
    assert f"embedding mycat: 2 vectors for text_encoder, {2 * width:,} numbers, {8 * width:,} bytes in a file" in out
    assert " in a file, starting from 'cat'\n" in out
    assert f"optimizer state of the vectors: {2 * width * 8:,} bytes ({2 * width:,} numbers)\n" in out
    assert "Network" not in out and "cat.pt" in out and "cat.safetensors" in out
    out = said(prepared("--token_string", "mycat", "--initial_phrase", "a red cat"), capsys)
    assert "embedding mycat: 3 vectors" in out and " file, starting from 'a red cat'\n" in out
    file = tmp_path / "start.safetensors"
    save_file({"emb_params": torch.ones(2, width)}, file)
    out = said(prepared("--token_string", "mycat", "--weights", file, "--base_embeddings", f"blorp={file}"), capsys)
    assert f"embedding blorp: 2 vectors for text_encoder, frozen, from {file}\n" in out
    assert f"starting from {file}\n" in out
    assert "starting from drawn numbers" in said(prepared("--token_string", "mycat"), capsys)


def test_a_run_that_goes_on_has_its_vectors_from_the_state(
    prepared: Prepare, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = prepared("--token_string", "mycat", "--init_word", "cat")
    state = RunState(4, 1, 0.0, 1, 8, 8, (), run.settings, run.may_change)
    out = said(replace(run, resume=Resume(tmp_path, state)), capsys)
    assert " in a file, going on from the state\n" in out and "starting from" not in out


def test_a_dry_run_of_both_has_network_and_embeddings(prepared: Prepare, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(prepared(*TWO, *NETWORK, "--save_embedding_as", "bundle", family="sdxl"), capsys)
    assert "Network" in out and "embedding mycat: 3 vectors for text_encoder and text_encoder_2" in out
    for name in ("cat.safetensors", "cat-mycat.safetensors", "cat-blorp.safetensors", "cat.bundle.safetensors"):
        assert name in out
    assert "frozen" not in out and "the vectors are trained in the first" not in out
    out = said(prepared(*TWO, *NETWORK, "--ti_train_steps_ratio", "0.5"), capsys)
    assert "the vectors are trained in the first 4 of 8 steps\n" in out


@pytest.mark.parametrize(
    "network", [(), NETWORK, ("--network_module", "lycoris.kohya")], ids=["none", "own", "lycoris"]
)
def test_the_optimizer_is_tried_on_the_vectors(
    network: tuple[str, ...], prepared: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    from library.training import rehearsal

    seen: list[tuple[list[str], list[list[tuple[int, ...]]], list[float]]] = []

    def spy(name: str, groups: Any, arguments: Any, **more: Any) -> Any:
        shapes = [[tuple(one.shape) for one in group["params"]] for group in groups]
        seen.append((more["names"], shapes, [group["lr"] for group in groups]))
        return build_optimizer(name, groups, arguments, **more)

    monkeypatch.setattr(rehearsal, "build_optimizer", spy)
    run = prepared(*TWO, *network, "--embedding_lr", "2e-3")
    rehearsal.rehearse(run, torch.device("cpu"))
    ((names, shapes, rates),) = seen
    assert names[-1] == EMBEDDING and rates[-1] == 2e-3 and (len(names) > 1) == bool(network)
    assert shapes[-1] == [(3, run.model.text_widths[0])]


@pytest.mark.parametrize(
    ("family", "network"), [("sdxl", ()), ("sd1", NETWORK)], ids=["alone, SDXL", "with a network, SD1"]
)
def test_a_run_writes_and_keeps_what_was_told(
    family: str, network: tuple[str, ...], prepared: Prepare, tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    import train_network
    import train_textual_inversion

    flags = (
        *TWO,
        *network,
        "--save_state",
        "--learning_rate",
        "1e-3",
        "--save_embedding_as",
        "webui",
        "diffusers",
        "bundle",
    )
    run = prepared(*flags, family=family)
    line = ["--pretrained_model_name_or_path", tiny_models(family), "--train_data_dir", tmp_path / "pictures"]
    line += ["--output_dir", tmp_path / "output", "--output_name", "cat", "--max_train_steps", "2", "--seed", "1"]
    line += ["--resolution", "64", "--caption_extension", ".txt", *flags]
    main = train_network.main if network else train_textual_inversion.main
    assert main([str(one) for one in line]) == 0
    place = tmp_path / "output"
    state = place / "cat-state"
    found = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file() and state not in path.parents}
    told = {one.name for one in weight_files(run.options, run.embeddings, len(run.model.text_widths), "cat")}
    assert found - {"cat.log.jsonl"} == told
    kept = torch.load(state / "optimizer.pt", weights_only=True)["optimizer"]["optimizer"]
    shapes = vector_shapes(run.model, run.embeddings)
    last = kept["param_groups"][-1]["params"]
    assert len(last) == len(shapes)
    moments = [kept["state"][number][name] for number in last for name in ("exp_avg", "exp_avg_sq")]
    assert sum(one.nbytes for one in moments) == vector_state(run.options, shapes)

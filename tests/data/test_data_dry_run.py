"""The dry run's tables for every family: the base model's line, text, and the network by part."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from library.data.plan import build_plan
from library.data.sources.scan import survey
from library.models.families import FAMILIES, FamilyName, Part
from library.models.info import ModelInfo, PartInfo
from library.options import load_datasets, parse
from library.training import dry_run
from library.training.learning_rates import LearningRates
from library.training.memory_plan import predict_memory
from library.training.prepare import Prepared
from library.training.prepare_data import Data
from library.training.steps import PreviewPlan, SavePlan, ValidationPlan, make_clock
from library.training.text_use import text_use

MakePicture = Callable[..., Path]


def full_size(family: FamilyName, root: Path) -> ModelInfo:
    """A model of a family with the configs of the full-size one."""
    parts: dict[Part, PartInfo] = {}
    for part in FAMILIES[family].parts:
        text = (root / f"library/models/configs/{family}/{part}.json").read_text(encoding="utf-8")
        parts[part] = PartInfo(json.loads(text), (), True, "", "base.safetensors")
    path = Path("base.safetensors")
    return ModelInfo(path, path.name, family, "single_file", parts, {}, "epsilon", False, 8, ("predicts noise",))


@pytest.fixture
def prepared(tmp_path: Path, make_picture: MakePicture, repo_root: Path) -> Callable[..., Prepared]:
    """A run over two pictures of a family, with more arguments."""
    for name, caption in {"a": "a (red:1.3) cat", "b": "a [dog]"}.items():
        make_picture(tmp_path / "pictures" / "2_pets" / f"{name}.png", caption=caption)

    def make(family: FamilyName, *argv: str, te: tuple[float, ...] = (0.0,)) -> Prepared:
        base = f"--pretrained_model_name_or_path m --output_dir {tmp_path}/out --network_module networks.lora"
        data = f"--train_data_dir {tmp_path}/pictures --resolution 64 --caption_extension .txt"
        options = parse([*f"{base} {data}".split(), *argv])
        specs = load_datasets(options)
        scan = survey(specs)
        plan = build_plan(specs, scan.records, 8, 1)
        return Prepared(
            options=options,
            model=full_size(family, repo_root),
            embeddings=None,
            data=Data(specs, scan, plan, None),
            clock=make_clock(plan.batches_per_epoch, 1, 8, None),
            saves=SavePlan(None, None, None, None, None, None, None, False, False),
            previews=PreviewPlan(None, None, False),
            validations=ValidationPlan(),
            prompts=(),
            resume=None,
            seed=1,
            first_update=0,
            schedule_total=8,
            settings={},
            may_change={},
            rates=LearningRates(1e-4, te),
            notices=(),
        )

    return make


def show(run: Prepared) -> None:
    dry_run.show(run, predict_memory(run))


def cells(said: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines() if "│" in line]


@pytest.mark.parametrize(
    ("family", "modules", "caption_bytes"),
    [
        ("sd1", {"unet": 192, "text_encoder": 72}, 77 * 768 * 4),
        ("sd2", {"unet": 192, "text_encoder": 138}, 77 * 1024 * 4),
        ("sdxl", {"unet": 722, "text_encoder": 72, "text_encoder_2": 192}, (77 * 2048 + 1280) * 4),
    ],
)
def test_every_family_is_shown(
    prepared: Callable[..., Prepared],
    capsys: pytest.CaptureFixture[str],
    family: FamilyName,
    modules: dict[str, int],
    caption_bytes: int,
) -> None:
    run = prepared(family, te=(1e-5,) * (len(modules) - 1))
    show(run)
    said = capsys.readouterr().out
    assert said.splitlines()[0] == f"base model base.safetensors: {FAMILIES[family].title}, predicts noise"
    rows = cells(said)
    for part, count in modules.items():
        assert any(row[:2] == [part, str(count)] for row in rows), said
    assert text_use(run).caption_bytes == caption_bytes
    assert "text encoders or new tokens are trained, so every caption is encoded in every step" in said


def test_an_encoder_with_the_rate_0_has_no_row(
    prepared: Callable[..., Prepared], capsys: pytest.CaptureFixture[str]
) -> None:
    show(prepared("sdxl", te=(0.0, 1e-5)))
    parts = {row[0] for row in cells(capsys.readouterr().out)}
    assert "text_encoder_2" in parts
    assert "text_encoder" not in parts


def test_frozen_encoders_tell_of_memo_and_cache(
    prepared: Callable[..., Prepared], capsys: pytest.CaptureFixture[str]
) -> None:
    only = ("--network_train_unet_only", "--mixed_precision", "bf16", "--max_token_length", "225")
    use = text_use(prepared("sdxl", *only, "--text_memo_mb", "3", te=(0.0, 0.0)))
    assert (use.caption_bytes, use.memo_bytes) == ((227 * 2048 + 1280) * 2, 3 * 2**20)
    assert not (use.trains or use.ahead or use.to_disk)
    run = prepared("sdxl", *only, "--cache_text_encoder_outputs_to_disk", te=(0.0, 0.0))
    show(run)
    said = capsys.readouterr().out
    assert "text: 2 captions encoded before training, kept in files beside the pictures; then the text encod" in said


def test_signs_of_weights_are_no_tokens(prepared: Callable[..., Prepared], capsys: pytest.CaptureFixture[str]) -> None:
    rows = {}
    for flags in ((), ("--weighted_captions",)):
        show(prepared("sd1", *flags))
        said = capsys.readouterr().out.splitlines()
        title = next(i for i, line in enumerate(said) if line.startswith("Tokens per caption"))
        rows[flags] = cells("\n".join(said[title:]))[0]
    assert rows["--weighted_captions",][:3] == ["2", "2.5", "3"]
    assert int(rows[()][2]) > 3

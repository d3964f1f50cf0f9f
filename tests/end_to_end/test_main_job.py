"""The main job as users run it: `accelerate launch`, and everything that it leaves behind."""

import json
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.pictures import make_pictures
from tests.programs import launch

PROMPTS = "a thing, red --w 64 --h 64 --s 2 --l 3 --d 7\na thing --n blue --w 80 --h 64 --s 2 --ss euler_a\n"


@pytest.fixture(scope="module")
def finished(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of one run under `accelerate launch`, with a config file, previews, logs and states."""
    folder = tmp_path_factory.mktemp("job")
    make_pictures(folder / "pictures", count=5)
    (folder / "prompts.txt").write_text(PROMPTS)
    (folder / "job.toml").write_text(
        f"""
[model]
pretrained_model_name_or_path = "{tiny_sd1}"
[data]
train_data_dir = "{folder}/pictures"
resolution = "64,64"
enable_bucket = 1
min_bucket_reso = 32
max_bucket_reso = 128
bucket_reso_steps = 16
shuffle_caption = true
cache_latents_to_disk = true
train_batch_size = 2
[training]
network_module = "networks.lora"
network_dim = 4.0
network_alpha = "2"
network_args = ["conv_dim=2", "conv_alpha=1"]
unet_lr = 1e-2
text_encoder_lr = [5e-3]
lr_scheduler = "cosine"
lr_warmup_steps = 0.25
max_train_steps = 8
seed = 3
min_snr_gamma = 5
gradient_checkpointing = true
[files]
output_dir = "{folder}/output"
output_name = "thing"
save_every_n_epochs = 1
save_state_on_train_end = true
save_precision = "fp16"
logging_dir = "{folder}/logs"
sample_prompts = "{folder}/prompts.txt"
sample_every_n_steps = 4
sample_at_first = true
"""
    )
    result = launch("--config_file", folder / "job.toml", "--learning_rate", "1e-3")
    assert result.returncode == 0, result.stderr
    assert "time: " in result.stderr
    return folder


def test_the_weight_file_is_complete(finished: Path) -> None:
    path = finished / "output/thing.safetensors"
    tensors = load_file(path)
    assert len(tensors) == 3 * (192 + 85 + 30)
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    assert tensors[f"{name}.lora_down.weight"].dtype == "float16"
    assert tensors[f"{name}.alpha"].shape == () and float(tensors[f"{name}.alpha"]) == 2.0
    assert all(tensors[key].any() for key in tensors if key.endswith("lora_up.weight") and "layers_4" not in key)
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    assert metadata["ss_output_name"] == "thing" and metadata["ss_steps"] == "8"
    assert metadata["ss_base_model_version"] == "sd_v1" and metadata["ss_v2"] == "False"
    assert json.loads(metadata["ss_tag_frequency"])["2_thing"]["thing"] == 5
    assert json.loads(metadata["ss_network_args"])["conv_dim"] == "2"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert len(metadata["sshs_model_hash"]) == 64


def test_epoch_files_states_and_caches_lie_where_they_should(finished: Path) -> None:
    output = finished / "output"
    assert (output / "thing-000001.safetensors").is_file()
    assert json.loads((output / "thing-state/manifest.json").read_text())["updates_done"] == 8
    assert len(list((finished / "pictures/2_thing").glob("*_sd.npz"))) == 5
    assert not [path for path in output.rglob("*") if ".tmp" in path.name]


def test_previews_and_their_sheet(finished: Path) -> None:
    sample = finished / "output/sample"
    names = sorted(path.name for path in sample.glob("thing_0*.png"))
    assert [name[6:15] for name in names] == [f"{step:06d}_{index:02d}" for step in (0, 4, 8) for index in (0, 1)]
    assert names[0].endswith("_7.png")
    assert Image.open(sample / names[1]).size == (80, 64)
    sheet = Image.open(sample / "thing_sheet.png")
    assert 2 * 80 < sheet.width < 3 * 80 and 3 * 64 < sheet.height < 5 * 64


def test_tensorboard_holds_the_usual_scalars(finished: Path) -> None:
    (folder,) = (finished / "logs").glob("*/network_train")
    events = EventAccumulator(str(folder))
    events.Reload()
    losses = events.Scalars("loss/current")
    assert [event.step for event in losses] == list(range(1, 9))
    assert events.Scalars("loss/average")[-1].value > 0
    rates = [event.value for event in events.Scalars("lr/unet")]
    assert rates[0] == 0 and max(rates) == pytest.approx(1e-2)
    assert events.Scalars("lr/textencoder")[2].value == pytest.approx(rates[2] / 2)
    assert [event.step for event in events.Scalars("loss/epoch_average")] == [1, 2]

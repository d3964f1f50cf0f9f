"""Metadata as programs in the field read it."""

import json
from datetime import UTC, datetime
from typing import Any

from library.weights.metadata import (
    DatasetFacts,
    FileFacts,
    ModelSpec,
    Progress,
    RunFacts,
    Settings,
    SubsetFacts,
    lora_metadata,
    modelspec,
    training_metadata,
)

TAGS = {"10_cat": {"cat": 12, "red": 3}}


def dataset(**changes: Any) -> DatasetFacts:
    """Twelve pictures, ten times each, and two regularization pictures."""
    facts: dict[str, Any] = {
        "batch_size": 2,
        "num_train_images": 120,
        "num_reg_images": 2,
        "resolution": (512, 384),
        "enable_bucket": True,
        "min_bucket_reso": 256,
        "max_bucket_reso": 1024,
        "bucket_no_upscale": False,
        "subsets": (
            SubsetFacts("10_cat", 12, 10, class_tokens="cat", flip_aug=True, keep_tokens=1),
            SubsetFacts("1_animal", 2, 1, is_reg=True, class_tokens="animal"),
        ),
        "tag_frequency": TAGS,
        "buckets": (((512, 384), 100), ((384, 512), 20)),
        "mean_ar_error": 0.25,
    }
    return DatasetFacts(**(facts | changes))


def run(**changes: Any) -> RunFacts:
    """A run on kohya folders."""
    facts: dict[str, Any] = {
        "session_id": 17,
        "started_at": 1700000000.5,
        "base_model_version": "sd_v1",
        "base_model": FileFacts("sd15.safetensors", "0123abcd", "f" * 64),
        "optimizer": "torch.optim.adamw.AdamW(weight_decay=0.1)",
        "num_batches_per_epoch": 61,
        "num_epochs": 3,
        "total_batch_size": 2,
        "datasets": (dataset(),),
        "from_config": False,
    }
    return RunFacts(**(facts | changes))


SETTINGS = Settings.of(
    {"learning_rate": 1e-4, "network_module": "networks.lora", "network_dim": 8, "network_alpha": 1.0, "unknown": 3}
)
SPEC = ModelSpec("sd_v1", datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC), "lorasmith/0.1.0", title="cat")


def test_all_values_are_python_text() -> None:
    found = lora_metadata(training_metadata(run(), SETTINGS), Progress(2, 100, 1700000100.25), SPEC)
    assert all(isinstance(value, str) for value in found.values())
    expected = {
        "ss_session_id": "17",
        "ss_training_started_at": "1700000000.5",
        "ss_training_finished_at": "1700000100.25",
        "ss_steps": "100",
        "ss_epoch": "2",
        "ss_learning_rate": "0.0001",
        "ss_unet_lr": "None",
        "ss_v2": "False",
        "ss_base_model_version": "sd_v1",
        "ss_network_dim": "8",
        "ss_network_alpha": "1.0",
        "ss_debiased_estimation": "False",
        "ss_sd_model_name": "sd15.safetensors",
        "ss_sd_model_hash": "0123abcd",
        "ss_new_sd_model_hash": "f" * 64,
        "ss_num_train_images": "120",
        "ss_num_reg_images": "2",
        "ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.1)",
    }
    assert expected.items() <= found.items()
    assert "ss_network_args" not in found
    assert "ss_vae_name" not in found


def test_folder_mode() -> None:
    found = training_metadata(run(), SETTINGS)
    assert found["ss_resolution"] == "(512, 384)"
    assert found["ss_flip_aug"] == "True"
    assert found["ss_keep_tokens"] == "1"
    assert json.loads(found["ss_dataset_dirs"]) == {"10_cat": {"n_repeats": 10, "img_count": 12}}
    assert json.loads(found["ss_reg_dataset_dirs"]) == {"1_animal": {"n_repeats": 1, "img_count": 2}}
    assert json.loads(found["ss_tag_frequency"]) == TAGS
    assert json.loads(found["ss_bucket_info"]) == {
        "buckets": {"0": {"resolution": [512, 384], "count": 100}, "1": {"resolution": [384, 512], "count": 20}},
        "mean_img_ar_error": 0.25,
    }
    assert "ss_datasets" not in found


def test_config_mode_merges_what_older_readers_know() -> None:
    other = dataset(tag_frequency={"10_cat": {"other": 1}, "dog": {"dog": 2}})
    found = training_metadata(run(datasets=(dataset(), other), from_config=True), SETTINGS)
    listed = json.loads(found["ss_datasets"])
    assert [part["num_train_images"] for part in listed] == [120, 120]
    assert list(listed[0]["subsets"][0]) == [
        "img_count",
        "num_repeats",
        "color_aug",
        "flip_aug",
        "random_crop",
        "shuffle_caption",
        "keep_tokens",
        "keep_tokens_separator",
        "secondary_separator",
        "enable_wildcard",
        "caption_prefix",
        "caption_suffix",
        "resize_interpolation",
        "image_dir",
        "class_tokens",
        "is_reg",
    ]
    assert set(json.loads(found["ss_dataset_dirs"])) == {"10_cat", "10_cat (2)"}
    assert json.loads(found["ss_tag_frequency"]) == {**TAGS, "dog": {"dog": 2}}
    assert not {"ss_resolution", "ss_bucket_info", "ss_reg_dataset_dirs"} & found.keys()


def test_network_args_carry_the_dropout_too() -> None:
    found = training_metadata(run(network_args={"conv_dim": "4"}), SETTINGS)
    assert json.loads(found["ss_network_args"]) == {"conv_dim": "4", "dropout": None}


def test_no_metadata_keeps_the_minimum_and_the_model_spec() -> None:
    training = training_metadata(run(network_args={}), SETTINGS)
    found = lora_metadata(training, Progress(1, 1, 1.0), SPEC, no_metadata=True)
    assert {key for key in found if key.startswith("ss_")} == {
        "ss_v2",
        "ss_base_model_version",
        "ss_network_module",
        "ss_network_dim",
        "ss_network_alpha",
        "ss_network_args",
    }
    assert found["modelspec.title"] == "cat"


def test_model_spec_of_sd1() -> None:
    assert modelspec(SPEC) == {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.implementation_version": "lorasmith/0.1.0",
        "modelspec.title": "cat",
        "modelspec.resolution": "512x512",
        "modelspec.date": "2026-01-02T03:04:05",
        "modelspec.prediction_type": "epsilon",
    }


def test_model_spec_of_what_was_set() -> None:
    spec = ModelSpec(
        "sd_v2_v",
        SPEC.date,
        "lorasmith/0.1.0",
        v_prediction=True,
        max_timestep=800,
        clip_skip=2,
        texts={"author": "me", "license": None},
    )
    found = modelspec(spec)
    assert found["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert found["modelspec.resolution"] == "768x768"
    assert found["modelspec.prediction_type"] == "v"
    assert found["modelspec.timestep_range"] == "0,800"
    assert found["modelspec.encoder_layer"] == "2"
    assert found["modelspec.author"] == "me"
    assert "modelspec.license" not in found
    assert found["modelspec.title"] == f"LoRA@{SPEC.date.timestamp()}"

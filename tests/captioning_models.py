"""Taggers and captioners as small as can be: ONNX graphs whose outputs are known, BLIP and GIT with random weights."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

LABELS = (
    ("general", "9"),
    ("sensitive", "9"),
    ("1girl", "0"),
    ("long_hair", "0"),
    ("^_^", "0"),
    ("hair_ribbon", "0"),
    ("saber_(armor)_(fate)", "4"),
    ("artoria", "4"),
)
"""Name and number of the category of a tagger's outputs, in the order of its table."""
SIDE = 8
WORDS: tuple[str, ...] = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "[DEC]",
    "[ENC]",
    "a",
    "picture",
    "of",
    "cat",
    "dog",
    "red",
)
WORDS += ("blue", "on", "in", "the", "grass", "with", "words", "big", "small", "tree", "house", "and", "sky", "sea")


def write_graph(
    path: Path, weights: np.ndarray, bias: np.ndarray, *, planes_first: bool = False, batch: int | str = "n"
) -> None:
    """A network whose outputs are `means @ weights + bias`, where means are those of the three planes it is given."""
    shape = [batch, 3, SIDE, SIDE] if planes_first else [batch, SIDE, SIDE, 3]
    axes = numpy_helper.from_array(np.array([2, 3] if planes_first else [1, 2], np.int64), "axes")
    nodes = [
        helper.make_node("ReduceMean", ["pictures", "axes"], ["means"], keepdims=0),
        helper.make_node("MatMul", ["means", "weights"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["outputs"]),
    ]
    constants = [
        axes,
        numpy_helper.from_array(weights.astype(np.float32), "weights"),
        numpy_helper.from_array(bias.astype(np.float32), "bias"),
    ]
    given = helper.make_tensor_value_info("pictures", TensorProto.FLOAT, shape)
    made = helper.make_tensor_value_info("outputs", TensorProto.FLOAT, [batch, weights.shape[1]])
    graph = helper.make_graph(nodes, "tagger", [given], [made], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, str(path))


def write_tagger(
    folder: Path,
    weights: np.ndarray,
    bias: np.ndarray,
    *,
    labels: Sequence[tuple[str, str]] = LABELS,
    batch: int | str = "n",
) -> Path:
    """A tagger with `selected_tags.csv`. It is given blue, green, red from 0 to 255 and gives probabilities."""
    folder.mkdir(parents=True, exist_ok=True)
    write_graph(folder / "model.onnx", weights, bias, batch=batch)
    rows = [f"{number},{name},{category},{100 - number}" for number, (name, category) in enumerate(labels)]
    (folder / "selected_tags.csv").write_text("\n".join(["tag_id,name,category,count", *rows]), encoding="utf-8")
    return folder


def write_mapped_tagger(folder: Path, weights: np.ndarray, bias: np.ndarray, tags: Sequence[tuple[str, str]]) -> Path:
    """A tagger with `tag_mapping.json`. It is given planes from -1 to 1 and gives logits."""
    folder.mkdir(parents=True, exist_ok=True)
    write_graph(folder / "model.onnx", weights, bias, planes_first=True)
    table = {str(place): {"tag": tag, "category": category} for place, (tag, category) in enumerate(tags)}
    (folder / "tag_mapping.json").write_text(json.dumps(table), encoding="utf-8")
    return folder


def write_blip(folder: Path) -> Path:
    """A BLIP model with random weights, which reads 32 px pictures and knows a few words."""
    import torch
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessorPil, BlipProcessor

    torch.manual_seed(3)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 5, "sep_token_id": 3, "eos_token_id": 3}
    config = BlipConfig(
        text_config={**small, **ids, "vocab_size": len(WORDS), "encoder_hidden_size": 16, "initializer_range": 0.5},
        vision_config={**small, "image_size": 32, "patch_size": 8, "initializer_range": 0.3},
        projection_dim=16,
        image_text_hidden_size=16,
    )
    BlipForConditionalGeneration(config).save_pretrained(folder)
    images = BlipImageProcessorPil(size={"height": 32, "width": 32})
    BlipProcessor(images, _tokenizer(folder)).save_pretrained(folder)
    return folder


def write_git(folder: Path) -> Path:
    """A GIT model with random weights, likewise."""
    import torch
    from transformers import CLIPImageProcessorPil, GitConfig, GitForCausalLM, GitProcessor

    torch.manual_seed(3)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    config = GitConfig(
        vision_config={**small, "image_size": 32, "patch_size": 8, "initializer_range": 0.3},
        **small,
        **ids,
        vocab_size=len(WORDS),
        initializer_range=0.5,
    )
    GitForCausalLM(config).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    GitProcessor(images, _tokenizer(folder)).save_pretrained(folder)
    return folder


def _tokenizer(folder: Path) -> object:
    from transformers import BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    words = folder / "vocab.txt"
    words.write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return BertTokenizer(vocab=str(words))

"""Networks on the text encoders and vectors behind their tables: both act and both get gradients, in either order."""

from typing import Any

import pytest
import torch
from torch import nn

from library.models.inspect import inspect
from library.models.load import load
from networks import foreign, lora
from networks.facade import text_encoder_facade, unet_facade
from tests.models.test_joined import CAPTIONS, TOKENS, Find, backward, drawn, gradients

pytestmark = pytest.mark.xdist_group("lycoris")


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("kind", ["lora", "lycoris"])
def test_a_network_on_the_text_encoders_and_vectors_train_together(tiny_models: Find, family: str, kind: str) -> None:
    if kind == "lycoris":
        pytest.importorskip("lycoris")
    states = []
    for first in (True, False):
        model = load(inspect(str(tiny_models(family))), with_vae=False)
        vectors = drawn(model.text_widths)
        if first:
            model.join_embeddings(TOKENS, vectors)
        unet, encoders = model.unet, model.network_text_encoder
        torch.manual_seed(0)
        if kind == "lora":
            network: Any = lora.create_network(1.0, 4, 2.0, None, encoders, unet, seed=1)
        else:
            unet, encoders = unet_facade(unet), text_encoder_facade(encoders)
            options = {"dropout": None, **foreign.arguments("lycoris.kohya", {"algo": "locon"})}
            network = foreign.load("lycoris.kohya").create_network(1.0, 4, 2.0, None, encoders, unet, **options)
        network.apply_to(encoders, unet, True, False)
        generator = torch.Generator().manual_seed(2)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.1, generator=generator)
        if not first:
            model.join_embeddings(TOKENS, vectors)
        backward(model)
        reached = [one.grad is not None and bool(one.grad.abs().max() > 0) for one in network.parameters()]
        assert gradients(vectors) and any(reached)
        states.append(model.encode_prompts(CAPTIONS).states)
    plain = load(inspect(str(tiny_models(family))), with_vae=False)
    plain.join_embeddings(TOKENS, vectors)
    assert torch.equal(*states) and not torch.equal(plain.encode_prompts(CAPTIONS).states, states[0])

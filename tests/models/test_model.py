"""A loaded model's work: predictions, latents, previews, checkpointing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from library.errors import UserError
from library.models.inspect import inspect
from library.models.load import load
from library.models.model import Model
from library.models.samplers import SAMPLERS, check
from library.models.schedule import alphas_cumprod


@pytest.fixture(scope="module")
def model(tiny_sd1: Path) -> Model:
    return load(inspect(str(tiny_sd1)))


def test_predict_is_the_raw_unet(tiny_sd1: Path, model: Model) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny_sd1, subfolder="unet")
    noisy, times = torch.randn(2, 4, 8, 8), torch.tensor([3, 900])
    conditioning = model.encode_prompts(["a cat", "a dog"])
    with torch.no_grad():
        expected = unet(noisy, times, encoder_hidden_states=conditioning.states).sample
    assert torch.allclose(model.predict(noisy, times, conditioning), expected, atol=1e-5)


def test_bf16_predicts_in_float32(tiny_sd1: Path, model: Model) -> None:
    low = load(inspect(str(tiny_sd1)), dtype=torch.bfloat16)
    noisy, times = torch.randn(1, 4, 8, 8), torch.tensor([300])
    predicted = low.predict(noisy, times, low.encode_prompts(["a cat"]))
    expected = model.predict(noisy, times, model.encode_prompts(["a cat"]))
    assert predicted.dtype == torch.float32 and low.unet.dtype == torch.bfloat16
    assert (predicted - expected).std() < 0.05 * expected.std()


def test_replaced_forwards_take_part(model: Model) -> None:
    layer = model.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
    noisy, times, states = torch.randn(1, 4, 8, 8), torch.tensor([300]), model.encode_prompts(["a cat"])
    before, original = model.predict(noisy, times, states), layer.forward
    scale = torch.full((1,), 3.0, requires_grad=True)
    layer.forward = lambda x: original(x) * scale
    after = model.predict(noisy, times, states)
    after.sum().backward()
    layer.forward = original
    assert not torch.equal(before, after) and scale.grad is not None and scale.grad.abs() > 0


def test_checkpointing_recomputes_and_changes_nothing(tiny_sd1: Path, model: Model) -> None:
    recomputing = load(inspect(str(tiny_sd1)), with_vae=False)
    recomputing.enable_gradient_checkpointing()
    noisy, times = torch.randn(1, 4, 8, 8), torch.tensor([300])
    results, calls = [], []
    for one in (model, recomputing):
        weight = one.text_encoders[0].encoder.layers[0].mlp.fc1.weight.requires_grad_(True)
        block = one.unet.up_blocks[3].resnets[2].conv1
        count: list[int] = []
        handle = block.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        one.predict(noisy, times, one.encode_prompts(["a cat"])).square().mean().backward()
        handle.remove()
        results.append(weight.grad.clone())
        calls.append(len(count))
        weight.requires_grad_(False)
        weight.grad = None
    assert calls == [1, 2]
    assert torch.allclose(*results, rtol=1e-4, atol=1e-9) and results[0].abs().sum() > 0


def test_latents_are_posterior_means(tiny_sd1: Path, model: Model) -> None:
    vae = AutoencoderKL.from_pretrained(tiny_sd1, subfolder="vae")
    pixels = torch.rand(3, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist.mean
    means = model.encode_images(pixels)
    assert means.shape == (3, 4, 8, 12) and means.dtype == torch.float32 and not means.is_inference()
    assert torch.allclose(means, expected, atol=1e-5)
    assert torch.equal(means[1:2], model.encode_images(pixels[1:2]))
    with torch.no_grad():
        drawn = vae.decode(expected[:1]).sample
    assert torch.allclose(model.decode(expected[:1] * model.latent_scale), drawn, atol=1e-5)


def test_vae_id_is_of_the_encoder_s_values(tiny_sd1: Path) -> None:
    one = load(inspect(str(tiny_sd1)))
    first = one.vae_id()
    again = load(inspect(str(tiny_sd1)), with_vae=False)
    assert again.vae is None and again.vae_id() == first
    other = load(inspect(str(tiny_sd1)))
    other.reload_vae().encoder.conv_in.bias.data[0] += 1e-6
    assert other.vae_id() != first
    assert load(inspect(str(tiny_sd1)), vae_dtype=torch.bfloat16).vae_id() != first
    one.release_vae()
    assert one.vae is None and one.vae_id() == first


@pytest.mark.parametrize("kind", ["scaled_linear", "linear", "squaredcos_cap_v2"])
def test_alphas_are_diffusers(kind: str) -> None:
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": kind, "num_train_timesteps": 1000}
    ours = alphas_cumprod(config)
    assert ours.dtype == torch.float64 and ours.shape == (1000,)
    assert torch.allclose(ours.float(), DDPMScheduler(**config).alphas_cumprod, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("sampler", sorted(name for name in SAMPLERS if not name.startswith("k_")))
@pytest.mark.filterwarnings("error::FutureWarning")
def test_every_sampler_draws(tiny_sd1: Path, model: Model, sampler: str) -> None:
    if needed := SAMPLERS[sampler].needs:
        pytest.importorskip(needed)
    pipeline = model.pipeline(sampler)
    noise = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(1))

    def draw(seed: int, prompts: list[str]) -> list[np.ndarray]:
        generator = torch.Generator().manual_seed(seed)
        output = pipeline(
            prompts,
            "bad",
            width=96,
            height=64,
            num_inference_steps=4,
            guidance_scale=3,
            latents=noise,
            generator=generator,
        )
        return [np.asarray(image) for image in output.images]

    first, again = draw(0, ["a cat", "a dog"]), draw(0, ["a cat", "a dog"])
    assert [picture.shape for picture in first] == [(64, 96, 3)] * 2
    assert all(np.array_equal(one, two) for one, two in zip(first, again, strict=True))
    assert first[0].std() > 0 and not np.array_equal(first[0], first[1])


def test_previews_of_a_mixed_model_after_its_vae_was_released(tiny_sd1: Path) -> None:
    low = load(inspect(str(tiny_sd1)), dtype=torch.bfloat16)
    low.release_vae()
    (image,) = low.pipeline("euler_a")("a cat", width=64, height=64, num_inference_steps=2, guidance_scale=1).images
    assert image.size == (64, 64)
    with pytest.raises(ValueError, match="multiple of 8"):
        low.pipeline("ddim")("a cat", width=60, height=64)


def overflow(vae: AutoencoderKL, images: set[int]) -> list[torch.dtype]:
    """Make a VAE give infinities for these calls of its encoder, from 0; returns the dtypes that it was called in."""
    calls: list[torch.dtype] = []
    encode = vae.encoder.forward

    def spoiled(pixels: torch.Tensor) -> torch.Tensor:
        calls.append(pixels.dtype)
        moments = encode(pixels)
        return moments * torch.inf if len(calls) - 1 in images else moments

    vae.encoder.forward = spoiled
    return calls


def test_a_picture_that_overflows_is_encoded_again_in_float32(
    tiny_sd1: Path, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    low = load(inspect(str(tiny_sd1)), vae_dtype=torch.bfloat16)
    pixels = torch.rand(4, 3, 64, 64) * 2 - 1
    usual = low.encode_images(pixels)
    calls = overflow(low.reload_vae(), {1, 3})
    means = low.encode_images(pixels)
    assert calls == [torch.bfloat16] * 4
    assert torch.equal(means[[0, 2]], usual[[0, 2]])
    assert torch.equal(means[[1, 3]], model.encode_images(pixels)[[1, 3]])
    assert not means.is_inference()
    told = [line for line in capsys.readouterr().err.splitlines() if "overflows" in line]
    assert told == ["the VAE overflows in bfloat16: float32 is used where it does"]
    assert low.vae_dtype == torch.bfloat16 and low.reload_vae().dtype == torch.bfloat16
    low.release_vae()
    assert low.vae is None and low._exact_vae is None


def test_a_picture_that_is_never_finite_is_given_back_as_it_is(tiny_sd1: Path) -> None:
    low = load(inspect(str(tiny_sd1)), vae_dtype=torch.bfloat16)
    pixels = torch.rand(2, 3, 64, 64)
    pixels[1] = torch.nan
    means = low.encode_images(pixels)
    assert means[0].isfinite().all() and not means[1].isfinite().any()


def test_a_preview_that_overflows_is_decoded_in_float32(tiny_sd1: Path, model: Model) -> None:
    low = load(inspect(str(tiny_sd1)), vae_dtype=torch.float16)
    low.reload_vae().decoder.conv_out.bias.data.fill_(torch.inf)
    latents = torch.randn(1, 4, 8, 8)
    assert torch.equal(low.decode(latents), model.decode(latents))


def test_unknown_sampler() -> None:
    with pytest.raises(UserError, match="did you mean"):
        check("eulera")

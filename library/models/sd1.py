"""A loaded model of the SD1 family: pictures to latents, captions to conditioning, noisy latents to predictions.

What is special to the family stands here. Loss, noise and adapters are not this module's business.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from library.models import samplers
from library.models.inspect import ModelInfo
from library.models.parts import load_part
from library.models.prompts import WORDS, encode_rows, token_rows
from library.models.schedule import alphas_cumprod

if TYPE_CHECKING:
    from library.models.preview import PreviewPipeline

_MEMO_BYTES = 256 * 2**20
_CHUNK_PIXELS = 2 * 512 * 512


class Model:
    """Frozen U-Net and text encoder in one dtype, VAE in another, all on one device.

    Attributes:
        latent_scale: what posterior means are multiplied by before noise is added.
        vae_factor: pixels per latent cell, along a side.
        alphas_cumprod: (1000,) float64, on the CPU, as trained; its last is 0 with zero terminal SNR.
        zero_terminal_snr: the model says that its schedule ends in pure noise.
        vae: None after `release_vae`.
    """

    family = "sd1"

    def __init__(
        self,
        info: ModelInfo,
        *,
        unet: torch.nn.Module,
        text_encoder: torch.nn.Module,
        vae: torch.nn.Module | None,
        device: torch.device,
        dtype: torch.dtype,
        vae_dtype: torch.dtype,
        clip_skip: int | None,
        max_token_length: int | None,
        prediction_type: str,
    ) -> None:
        self.info, self.device, self.dtype, self.vae_dtype = info, device, dtype, vae_dtype
        self.unet, self.vae = unet, vae
        self.text_encoders: tuple[torch.nn.Module, ...] = (text_encoder,)
        self.clip_skip, self.max_words = clip_skip, max_token_length or WORDS
        self.prediction_type = prediction_type
        self.vae_factor = info.vae_factor
        self.latent_scale = float(info.vae_config.get("scaling_factor", 0.18215))
        self.alphas_cumprod = alphas_cumprod(info.scheduler_config)
        self.zero_terminal_snr = bool(info.scheduler_config.get("rescale_betas_zero_snr", False))
        self._memo: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._memo_bytes = 0
        self._vae_id: str | None = None

    @property
    def base_model_version(self) -> str:
        """The family's name in metadata."""
        return "sd_v1_v" if self.prediction_type == "v_prediction" else "sd_v1"

    @property
    def network_text_encoder(self) -> torch.nn.Module:
        """What a network module's `create_network` gets as its text encoder: the bare module."""
        return self.text_encoders[0]

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass. Puts both modules into train mode, which nothing in them acts on
        but checkpointing: they are built without dropout."""
        unet, text_encoder = cast(Any, self.unet), cast(Any, self.text_encoders[0])
        unet.enable_gradient_checkpointing()
        newer = getattr(text_encoder, "activation_checkpointing_enable", None)
        (newer or text_encoder.gradient_checkpointing_enable)({"use_reentrant": False})
        self.unet.train()
        text_encoder.train()

    def encode_prompts(self, captions: Sequence[str], memoise: bool = False) -> torch.Tensor:
        """Conditioning (b, n * 75 + 2, d) of captions, in the model's dtype.

        Args:
            memoise: the text encoder does not train: no gradient, and each caption is encoded once, alone, so that
                its states don't depend on the batch it stands in.
        """
        if not memoise:
            return self._encode(captions)
        return torch.stack([self._remembered(caption) for caption in captions])

    def _encode(self, captions: Sequence[str]) -> torch.Tensor:
        rows = token_rows(captions, self.max_words).to(self.device)
        return encode_rows(self.text_encoders[0], rows, self.clip_skip)

    def _remembered(self, caption: str) -> torch.Tensor:
        if caption in self._memo:
            self._memo.move_to_end(caption)
            return self._memo[caption]
        with torch.no_grad():
            states = self._encode([caption])[0]
        self._memo[caption] = states
        self._memo_bytes += states.nbytes
        while self._memo_bytes > _MEMO_BYTES and len(self._memo) > 1:
            self._memo_bytes -= self._memo.popitem(last=False)[1].nbytes
        return states

    def forget_prompts(self) -> None:
        """Drop memoised captions: the text encoder has changed."""
        self._memo.clear()
        self._memo_bytes = 0

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        """What the U-Net predicts (noise or velocity), (b, c, h, w) float32.

        Args:
            noisy: (b, c, h, w) of any dtype; timesteps: (b,) int64; conditioning: (b, n, d) from `encode_prompts`.
        """
        output = self.unet(
            noisy.to(device=self.device, dtype=self.dtype, memory_format=torch.channels_last),
            timesteps.to(self.device),
            encoder_hidden_states=conditioning.to(device=self.device, dtype=self.dtype),
            return_dict=False,
        )
        return cast(torch.Tensor, output[0]).float()

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Posterior means (b, c, H / factor, W / factor) float32, unscaled, of pictures (b, 3, H, W) in [-1, 1].

        On the CPU pictures go through one by one: it costs nothing there, and a latent's bits don't depend on the
        batch it was made in. Elsewhere in chunks of about two 512 x 512 pictures.
        """
        vae = cast(Any, self.reload_vae())
        height, width = pixels.shape[-2:]
        size = 1 if self.device.type == "cpu" else max(1, _CHUNK_PIXELS // (height * width))
        with torch.inference_mode():
            means = [
                vae.encode(chunk.to(self.device, self.vae_dtype, memory_format=torch.channels_last))
                .latent_dist.mean.float()
                .contiguous()
                for chunk in pixels.split(size)
            ]
        return torch.cat(means).clone()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures (b, 3, H, W) float32, about [-1, 1], of scaled latents (b, c, h, w); no gradient."""
        vae = cast(Any, self.reload_vae())
        with torch.no_grad():
            unscaled = latents.to(self.device, self.vae_dtype, memory_format=torch.channels_last) / self.latent_scale
            return cast(torch.Tensor, vae.decode(unscaled, return_dict=False)[0]).float()

    def reload_vae(self) -> torch.nn.Module:
        """The VAE, read again if it was released."""
        if self.vae is None:
            self.vae = load_part(self.info, "vae", device=self.device, dtype=self.vae_dtype)
        return self.vae

    def release_vae(self) -> None:
        """Give the VAE's memory back."""
        self.vae = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def vae_id(self) -> str:
        """sha256 over what makes latents: names, dtypes, shapes and values of the VAE's encoder half."""
        if self._vae_id is None:
            digest = hashlib.sha256()
            for name, tensor in sorted(self.reload_vae().state_dict().items()):
                if name.startswith(("encoder.", "quant_conv.")):
                    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
            self._vae_id = digest.hexdigest()
        return self._vae_id

    def pipeline(self, sampler: str) -> "PreviewPipeline":
        """What draws previews with these very modules, adapters included, by a name of `samplers.SAMPLERS`.

        Raises:
            UserError: no such sampler.
        """
        from library.models.preview import PreviewPipeline

        zero_snr = self.zero_terminal_snr
        scheduler = samplers.scheduler(sampler, self.info.scheduler_config, self.prediction_type, zero_snr=zero_snr)
        return PreviewPipeline(self, scheduler)

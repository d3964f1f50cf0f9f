"""Models as network modules of other projects expect them: `lycoris.kohya` finds what it trains by class name and names
it by attribute path. A facade is a tree of modules with the paths of LoRA files that shares the model's own leaves: no
weight is copied, and a leaf whose `forward` is replaced is replaced in the model.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from library.models.families import diffusers_key, unet_key_of
from library.models.sgm_names import sgm_path


class Facade(nn.Module):
    """The root of another tree over a model's modules; what it lacks (`config`, `dtype` and so on) is the model's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = (model,)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_model":
                raise
            return getattr(self._model[0], name)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """What the model does."""
        return self._model[0](*arguments, **options)

    def train(self, mode: bool = True) -> "Facade":
        """Switch the model, so that also what stands in no facade follows."""
        super().train(mode)
        self._model[0].train(mode)
        return self


def unet_facade(unet: nn.Module) -> nn.Module:
    """A diffusers U-Net under the paths that files of its family have: SD1's and SD2's is itself one, SDXL's gets the
    original layout's blocks (`input_blocks.4.1.transformer_blocks...`), with classes named as diffusers names them."""
    if unet_key_of(unet.config) is diffusers_key:
        return unet
    root = Facade(unet)
    for path, module in _renamed("", unet):
        _put(root, path, module)
    return root


def text_encoder_facade(text_encoder: Any) -> Any:
    """A CLIP text model whose modules stand under `text_model`, as files have them; of a list, a list; of None, None.

    One that has the level already is returned as it is.
    """
    if isinstance(text_encoder, list | tuple):
        return [text_encoder_facade(encoder) for encoder in text_encoder]
    if text_encoder is None or "text_model" in dict(text_encoder.named_children()):
        return text_encoder
    facade = Facade(text_encoder)
    facade.text_model = text_encoder
    return facade


def _renamed(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """New path and module of all that has weights: a whole container where its inside keeps its names, else leaves."""
    inside = [name for name, leaf in module.named_modules() if next(leaf.parameters(recurse=False), None) is not None]
    if not inside:
        return
    new = _original(path)
    if new and all(sgm_path(_joined(path, name)) == _joined(new, name) for name in inside):
        yield new, module
    elif new:
        yield new, type(type(module).__name__, (nn.Module,), {})()
        for name in inside:
            yield sgm_path(f"{path}.{name}"), module.get_submodule(name)
    else:
        for name, child in module.named_children():
            yield from _renamed(_joined(path, name), child)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def _original(path: str) -> str | None:
    """The original path of a container or leaf; None of what only the diffusers layout groups."""
    try:
        return sgm_path(path)
    except ValueError:
        return None


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    """Set a module at a dotted path, with plain containers on the way."""
    *way, last = path.split(".")
    here = root
    for name in way:
        if name not in here._modules:
            here.add_module(name, nn.Module())
        here = here._modules[name] or here
    here.add_module(last, module)

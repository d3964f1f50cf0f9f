"""LoRA files joined into one LoRA: by concatenation, which is exact, cut to a rank, or taken out of one another.

A checkpoint with LoRAs in it is made by `library.weights.checkpoints.merge`; both take their files as `Weighted`. What
the new file says of itself is in `merged_metadata`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.console import track
from library.errors import Problem, UserError
from library.models.families import Family
from library.weights.loras.alphas import commonest, leaves_with, own_alpha
from library.weights.loras.forms import Factors, factors, kind
from library.weights.loras.lora import Layout, Lora, Module, family_of, refuse_layout
from library.weights.loras.low_rank import concatenated, norm, svd_of, truncated
from library.weights.loras.lycoris import EXACT

_INTO_A_CHECKPOINT = "merge it into a checkpoint (--sd_model) and extract a LoRA from that (tools/extract_lora.py)"


def _everywhere(name: str) -> float:
    return 1.0


@dataclass(frozen=True)
class Weighted:
    """A LoRA and how much of it counts.

    Attributes:
        ratio: of the whole file; below zero takes it away.
        blocks: the weight of a module's block by the module's name, on top of `ratio`.
    """

    lora: Lora
    ratio: float = 1.0
    blocks: Callable[[str], float] = _everywhere

    def strength(self, name: str) -> float:
        """What the change of a module is multiplied by, besides its own alpha / rank."""
        return self.ratio * self.blocks(name)


@dataclass(frozen=True)
class Joined:
    """What became of one module.

    Attributes:
        files: how many files change it.
        before, after: the sum of their ranks, and the new rank; 0 where nothing is left of it.
        norm: of the whole change (Frobenius).
        retained: of that norm, the part that the new factors have.
    """

    name: str
    files: int
    before: int
    after: int
    norm: float
    retained: float = 1.0


@dataclass(frozen=True)
class Merged:
    """A new LoRA without metadata, and what became of every module that a file changes."""

    lora: Lora
    modules: tuple[Joined, ...]

    @property
    def lost(self) -> tuple[str, ...]:
        """The modules of which nothing was left; they are not in the file."""
        return tuple(one.name for one in self.modules if not one.after)


def check_families(given: Sequence[Weighted]) -> Family | None:
    """The family of all files; None if no file tells.

    Raises:
        UserError: they are made for different ones.
    """
    known = [(one.lora, family) for one in given if (family := family_of(one.lora)) is not None]
    if not known:
        return None
    first, family = known[0]
    others = [
        Problem(str(lora.path), f"is made for {other.title}; {first.path} is made for {family.title}", "use one family")
        for lora, other in known
        if other is not family
    ]
    if others:
        raise UserError(others)
    return family


def refuse_in_layout(given: Sequence[Weighted], layout: Layout) -> None:
    """What `merged` and then a layout would refuse, told before anything is computed.

    Raises:
        UserError: modules without two factors, or embeddings in a layout that has no place for them.
    """
    _refuse_without_factors(given)
    for one in given:
        refuse_layout(one.lora.with_modules({}, {}), layout)


def merged(
    given: Sequence[Weighted],
    *,
    rank: int | None = None,
    conv_rank: int | None = None,
    unmerge: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Merged:
    """One LoRA that changes every weight by the sum of strength * alpha / rank * up @ down over all files.

    Without `rank` the factors are put side by side, which loses nothing: ranks add up, but for modules that would get
    more than their weight can have, which are brought to that. New factors hold strengths and scales, and alpha is the
    commonest rank. It is computed in float64; modules whose strength is 0 everywhere are left out.

    Args:
        rank: the most that a module gets; the best approximation of that rank is found without the full matrix.
        conv_rank: the same of kernels wider than 1x1 (default: `rank`).
        unmerge: files after the first are taken away. What is left is brought to its numerical rank: singular values
            at the rounding of the files' own dtypes go.
        dtype: of the new factors. In float16 both get the same size, so that small changes keep their digits.
        device: where it is computed; results are on the CPU.

    Raises:
        UserError: files of different families, a module without factors or of a DoRA, sizes that differ, numbers that
            aren't finite, one token in two files, or nothing is left.
    """
    family = check_families(given)
    _refuse_without_factors(given)
    rest = _embeddings(given, unmerge=unmerge)
    made: dict[str, tuple[Factors, str]] = {}
    facts, held = [], torch.promote_types(dtype, torch.float32)
    names = tuple(dict.fromkeys(name for one in given for name in one.lora.modules))
    for name in track(names, "merge", len(names)):
        parts = list(_parts(given, name, family, unmerge=unmerge, device=device))
        if not parts:
            continue
        here = f"{' + '.join(dict.fromkeys(str(part.path) for part in parts))}: {name}"
        found = concatenated([part.factors for part in parts], [part.strength for part in parts], here)
        wanted = rank if max(found.shape[2:], default=1) == 1 else (conv_rank or rank)
        fact, kept = _cut(name, found, parts, wanted, here, unmerge=unmerge)
        facts.append(fact)
        if kept is not None:
            made[name] = Factors(kept.up.to("cpu", held), kept.down.to("cpu", held), kept.shape), here
    if not made:
        wrong = (
            "nothing is left above the rounding of the first file: the files cancel each other, or all weights are 0"
        )
        raise UserError.single(str(given[0].lora.path), wrong, "look at --ratios, --lbws and --unmerge")
    alpha, first = commonest(own_alpha(kept) for kept, _ in made.values()), given[0].lora
    modules = {name: Module(name, leaves_with(kept, alpha, dtype, here), alpha) for name, (kept, here) in made.items()}
    return Merged(Lora(first.path, first.layout, modules, {}, rest), tuple(facts))


@dataclass(frozen=True)
class _Part:
    """A file's share in a module; `eps` is the rounding of the dtype that its numbers were stored in, 0 of a file that
    is taken away: its numbers are what they are."""

    factors: Factors
    strength: float
    eps: float
    path: Path


def _parts(
    given: Sequence[Weighted], name: str, family: Family | None, *, unmerge: bool, device: torch.device | None
) -> Iterator[_Part]:
    for number, one in enumerate(given):
        module, strength = one.lora.modules.get(name), one.strength(name)
        if module is None or not strength:
            continue
        found = factors(module, torch.float64, device, family)
        if found is not None:
            taken = unmerge and number > 0
            rounding = (torch.finfo(leaf.dtype).eps for leaf in module.leaves.values() if leaf.is_floating_point())
            eps = 0.0 if taken else max(rounding, default=0.0)
            yield _Part(found, -strength if taken else strength, eps, one.lora.path)


def _cut(
    name: str, found: Factors, parts: Sequence[_Part], wanted: int | None, here: str, *, unmerge: bool
) -> tuple[Joined, Factors | None]:
    """A module's factors at its new rank; None where nothing is left."""
    most = min(found.shape[0], math.prod(found.shape[1:]))
    if wanted is None and not unmerge and found.rank <= most:
        return Joined(name, len(parts), found.rank, found.rank, norm(found)), found
    svd = svd_of(found, here)
    left = len(svd.s)
    if wanted is not None or unmerge:
        largest = max(abs(part.strength) * norm(part.factors) for part in parts)
        noise = parts[0].eps * largest if unmerge else 0.0
        left = int((svd.s > max(svd.floor, noise)).sum())
    size = float(svd.s.norm())
    if not left:
        return Joined(name, len(parts), found.rank, 0, size, 0.0), None
    kept = truncated(svd, min(left, wanted or left), found.shape)
    share = float(svd.s[: kept.rank].norm()) / size if size else 1.0
    return Joined(name, len(parts), found.rank, kept.rank, size, share), kept


def _refuse_without_factors(given: Sequence[Weighted]) -> None:
    """Raises UserError naming each file that has modules which no two factors can stand for."""
    problems = []
    for one in given:
        used = [module for module in one.lora.modules.values() if one.strength(module.name)]
        dora = [module.name for module in used if "dora_scale" in module.leaves]
        whole = [module.name for module in used if not module.is_plain and kind(module) not in EXACT]
        if dora:
            wrong = f"is a DoRA ({len(dora)} modules, e.g. {dora[0]}), whose effect depends on the base model"
            problems.append(Problem(str(one.lora.path), wrong, _INTO_A_CHECKPOINT))
        elif whole:
            wrong = f"has {len(whole)} modules that are no LoRA's, e.g. {whole[0]}"
            problems.append(Problem(str(one.lora.path), wrong, _INTO_A_CHECKPOINT))
    if problems:
        raise UserError(problems)


def _embeddings(given: Sequence[Weighted], *, unmerge: bool) -> dict[str, Tensor]:
    """The bundled embeddings of all files, as they are. With `unmerge`: the first file's without those that a later
    one has just so.

    Raises:
        UserError: two files have different embeddings for one token.
    """
    found = _by_token(given[0].lora.rest)
    for number, one in enumerate(given[1:], 1):
        for token, tensors in _by_token(one.lora.rest).items():
            if unmerge:
                if token in found and _same(found[token], tensors):
                    del found[token]
            elif token not in found:
                found[token] = tensors
            elif not _same(found[token], tensors):
                before = next(str(other.lora.path) for other in given[:number] if token in _by_token(other.lora.rest))
                wrong = f"has another embedding for {token.removeprefix('bundle_emb.')} than {before}"
                advice = "take one of them out: python tools/convert_embedding.py --to separate FILE FOLDER"
                raise UserError.single(str(one.lora.path), wrong, advice)
    return {key: tensor for tensors in found.values() for key, tensor in tensors.items()}


def _by_token(rest: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in rest.items():
        found.setdefault(key.rpartition(".")[0], {})[key] = tensor
    return found


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())

"""What a base model tells of its prediction type and noise schedule, and what follows from that and the flags.

Torch-free. Evidence wins; a flag that contradicts it is refused with the evidence shown. Without evidence the flag
decides; without either, the family does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from library.errors import Problem, UserError
from library.models.families import Family, PredictionType
from library.models.headers import Header
from library.models.info import Said

_WORDS: Mapping[str, PredictionType] = {
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
    "epsilon": "epsilon",
    "eps": "epsilon",
}
_SAYING: Mapping[PredictionType, str] = {"epsilon": "predicts noise", "v_prediction": "predicts v"}
_TRAINABLE = "models that predict noise (epsilon) or velocity (v_prediction) can be trained"
_ARCHITECTURES: Mapping[str, PredictionType] = {
    "stable-diffusion-v2-768-v": "v_prediction",
    "stable-diffusion-v2-512": "epsilon",
}
_SCHEDULES = ("scaled_linear", "linear", "squaredcos_cap_v2")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Evidence:
    """What a model tells, each with where it tells it (`its tensor v_pred`); None where it tells nothing."""

    prediction: tuple[PredictionType, str] | None = None
    zero_terminal_snr: tuple[bool, str] | None = None


@dataclass(frozen=True)
class Decision:
    """What a run goes by, and phrases for the user that say why."""

    prediction_type: PredictionType | None
    zero_terminal_snr: bool
    findings: tuple[str, ...]


def of_header(header: Header, where: str) -> Evidence:
    """The marker tensors `v_pred` and `ztsnr`, and the metadata `modelspec.prediction_type` and `.architecture`.

    Raises:
        UserError: metadata name something else than noise or velocity.
    """
    schedule = (True, "its tensor ztsnr") if "ztsnr" in header.entries else None
    if "v_pred" in header.entries:
        return Evidence(("v_prediction", "its tensor v_pred"), schedule)
    told = header.metadata.get("modelspec.prediction_type", "").strip().lower()
    if told and told not in _WORDS:
        raise UserError.single(where, f"its metadata say that it predicts {told!r}", _TRAINABLE)
    if told:
        return Evidence((_WORDS[told], f"its metadata, modelspec.prediction_type = {told}"), schedule)
    architecture = header.metadata.get("modelspec.architecture", "").partition("/")[0].strip().lower()
    if architecture in _ARCHITECTURES:
        source = f"its metadata, modelspec.architecture = {architecture}"
        return Evidence((_ARCHITECTURES[architecture], source), schedule)
    return Evidence(None, schedule)


def of_scheduler(config: Mapping[str, Any], where: str) -> Evidence:
    """A folder's scheduler config: `prediction_type` and `rescale_betas_zero_snr`, where they stand in it.

    Raises:
        UserError: a scheduler of another kind of model, or a noise schedule that is unknown.
    """
    kind = str(config.get("_class_name", ""))
    if kind.startswith(("EDM", "FlowMatch")):
        raise UserError.single(where, f"it is made for {kind}, neither noise nor velocity", _TRAINABLE)
    schedule = config.get("beta_schedule", "linear")
    if schedule not in _SCHEDULES and config.get("trained_betas") is None:
        raise UserError.single(
            where, f"it has the unknown noise schedule {schedule!r}", f"known: {', '.join(_SCHEDULES)}"
        )
    source = "its scheduler_config.json"
    told, rescaled = config.get("prediction_type"), config.get("rescale_betas_zero_snr")
    if told is not None and told not in _WORDS:
        raise UserError.single(where, f"it predicts {told!r}", _TRAINABLE)
    return Evidence(
        None if told is None else (_WORDS[told], source),
        None if rescaled is None else (bool(rescaled), source),
    )


def decide(family: Family, evidence: Evidence, said: Said, name: str) -> Decision:
    """What the model is taken for.

    Args:
        name: how messages name the model.

    Raises:
        UserError: flags contradict evidence; all contradictions at once.
    """
    problems: list[Problem] = []
    if said.v2 is not None and said.v2 != family.v2:
        wrong = f"{name} is an {family.title} model, by the tensors and configs that it has"
        problems.append(Problem("--v2", wrong, "leave --v2 out" if said.v2 else "leave v2 = false out"))
    wanted: PredictionType | None = None
    if said.v_parameterization is not None:
        wanted = "v_prediction" if said.v_parameterization else "epsilon"
    prediction, found = _settle(evidence.prediction, wanted)
    if not found and evidence.prediction:
        wrong = f"{name} {_SAYING[evidence.prediction[0]]} ({evidence.prediction[1]})"
        problems.append(Problem("--v_parameterization", wrong, "leave the flag out"))
    schedule, found = _settle(evidence.zero_terminal_snr, said.zero_terminal_snr)
    if not found and evidence.zero_terminal_snr:
        has = "has" if evidence.zero_terminal_snr[0] else "has no"
        wrong = f"{name} {has} zero terminal SNR ({evidence.zero_terminal_snr[1]})"
        problems.append(Problem("--zero_terminal_snr", wrong, "leave the flag out"))
    if problems:
        raise UserError(problems)
    findings = []
    if prediction is None and not family.probes_prediction:
        prediction = "epsilon"
        findings.append(f"{_SAYING[prediction]} (no evidence; usual for {family.title})")
    elif prediction is None:
        findings.append("prediction type unknown, will be probed")
    else:
        source = evidence.prediction[1] if evidence.prediction else "--v_parameterization; the model doesn't say"
        findings.append(f"{_SAYING[prediction]} ({source})")
    if schedule:
        source = evidence.zero_terminal_snr[1] if evidence.zero_terminal_snr else "--zero_terminal_snr"
        findings.append(f"zero terminal SNR ({source})")
    return Decision(prediction, bool(schedule), tuple(findings))


def _settle(evidence: tuple[Value, str] | None, flag: Value | None) -> tuple[Value | None, bool]:
    """The value by evidence or else by flag, and whether the two agree."""
    if evidence is None:
        return flag, True
    return evidence[0], flag is None or flag == evidence[0]

"""What a base model tells of its prediction type and noise schedule, and what follows from that and the flags.

Torch-free. Evidence wins; a flag that contradicts it is refused with the evidence shown. Without evidence the flag
decides; without either, the family does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
SAYING: Mapping[PredictionType, str] = {"epsilon": "predicts noise", "v_prediction": "predicts v"}
UNKNOWN = "prediction type unknown, will be probed"
_TRAINABLE = "models that predict noise (epsilon) or velocity (v_prediction) can be trained"
_ARCHITECTURES: Mapping[str, PredictionType] = {
    "stable-diffusion-v2-768-v": "v_prediction",
    "stable-diffusion-v2-512": "epsilon",
}
_SCHEDULES = ("scaled_linear", "linear", "squaredcos_cap_v2")


@dataclass(frozen=True)
class Evidence:
    """What a model tells, each with where it tells it (`its tensor v_pred`); None where it tells nothing.

    `zero_terminal_snr` is only where it tells that it has it: a config's `false` is there unasked, and tells nothing.
    """

    prediction: tuple[PredictionType, str] | None = None
    zero_terminal_snr: str | None = None


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
    schedule = "its tensor ztsnr" if "ztsnr" in header.entries else None
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
    """A folder's scheduler config: `prediction_type`, and `rescale_betas_zero_snr` where it is true.

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
    told = config.get("prediction_type")
    if told is not None and told not in _WORDS:
        raise UserError.single(where, f"it predicts {told!r}", _TRAINABLE)
    return Evidence(
        None if told is None else (_WORDS[told], source),
        source if config.get("rescale_betas_zero_snr") else None,
    )


def decide(family: Family, evidence: Evidence, said: Said, name: str) -> Decision:
    """What the model is taken for.

    Args:
        name: how messages name the model.

    Raises:
        UserError: flags contradict evidence; all contradictions at once.
    """
    problems: list[Problem] = []

    def refuse(flag: str, wrong: str) -> None:
        problems.append(Problem(said.where(flag), f"{name} {wrong}", "leave it out"))

    if said.v2 is not None and said.v2 != family.v2:
        refuse("v2", f"is an {family.title} model, by the tensors and configs that it has")
    prediction, told = evidence.prediction or (None, "")
    if said.v_parameterization is not None:
        wanted: PredictionType = "v_prediction" if said.v_parameterization else "epsilon"
        if prediction is None:
            prediction, told = wanted, f"{said.where('v_parameterization')}; the model doesn't say"
        elif prediction != wanted:
            refuse("v_parameterization", f"{SAYING[prediction]} ({told})")
    schedule = evidence.zero_terminal_snr
    if schedule and said.zero_terminal_snr is False:
        refuse("zero_terminal_snr", f"has zero terminal SNR ({schedule})")
    elif said.zero_terminal_snr:
        schedule = schedule or said.where("zero_terminal_snr")
    if problems:
        raise UserError(problems)
    findings = []
    if prediction is None and not family.probes_prediction:
        prediction, told = "epsilon", f"no evidence; usual for {family.title}"
    if prediction is None:
        findings.append(UNKNOWN)
    else:
        findings.append(f"{SAYING[prediction]} ({told})")
    if schedule:
        findings.append(f"zero terminal SNR ({schedule})")
    return Decision(prediction, bool(schedule), tuple(findings))

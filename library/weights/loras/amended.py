"""The metadata of a LoRA file that a tool made out of others: what stays true stays, what isn't any more goes."""

from collections.abc import Mapping

STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
"""Hashes of the file that it was; a writer puts the new file's there."""
NAME = "ss_output_name"
"""What prompts of A1111 can call the file, however it is renamed."""


def amended(
    metadata: Mapping[str, str], *, dim: int | str | None = None, alpha: float | str | None = None, comment: str = ""
) -> dict[str, str]:
    """A file's metadata after a change of its modules.

    Args:
        dim, alpha: of the new file, `Dynamic` where modules differ; None keeps what is there.
        comment: what was done, put before `ss_training_comment`; the file is another one then, so that it is no longer
            called `ss_output_name`, which a writer fills in anew.
    """
    gone = (*STALE, NAME) if comment else STALE
    found = {key: value for key, value in metadata.items() if key not in gone}
    if dim is not None:
        found["ss_network_dim"] = str(dim)
    if alpha is not None:
        found["ss_network_alpha"] = str(alpha)
    if comment:
        before = found.get("ss_training_comment", "None")
        found["ss_training_comment"] = comment if before in ("None", "") else f"{comment}; {before}"
    return found

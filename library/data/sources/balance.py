"""How often each regularization picture is shown, such that they are as many samples as the pictures they stand beside.

The weight of their loss is not set here (data.samples).
"""

from collections.abc import Sequence
from dataclasses import replace

from library.data.records import ImageRecord
from library.data.sources.listing import Findings


def balance(records: Sequence[ImageRecord], datasets: int, findings: Findings) -> list[ImageRecord]:
    """The records with repeats of regularization pictures that sum up to the training samples of their dataset.

    A first round gives each picture its own repeats, following rounds one more each, until the number is reached; the
    picture that reaches it in the first round may exceed it. Pictures that are never reached are left out, with a
    notice. `records` are those that train, of `datasets` datasets.
    """
    if not any(record.is_reg for record in records):
        return list(records)
    repeats = [record.repeats for record in records]
    for number in range(datasets):
        wanted = sum(record.repeats for record in records if record.dataset == number and not record.is_reg)
        members = [i for i, record in enumerate(records) if record.dataset == number and record.is_reg]
        if not members:
            continue
        _share_out(repeats, members, wanted)
        unused = sum(repeats[i] == 0 for i in members)
        if unused and wanted:
            findings.notices.append(
                f"{unused} of {len(members)} regularization pictures are not used: there are {wanted} training samples"
            )
    pairs = zip(records, repeats, strict=True)
    return [replace(record, repeats=count) if count != record.repeats else record for record, count in pairs if count]


def _share_out(repeats: list[int], members: Sequence[int], wanted: int) -> None:
    """Set the repeats of `members`; until now they are those of the first round."""
    own = [repeats[i] for i in members]
    reached = 0
    for i, count in zip(members, own, strict=True):
        repeats[i] = count if reached < wanted else 0
        reached += repeats[i]
    rounds, rest = divmod(max(0, wanted - reached), len(members))
    for position, i in enumerate(members):
        repeats[i] += rounds + (position < rest)

"""The names of full-size models' modules, taken apart and put together again, against the golden list."""

from pathlib import Path

import pytest

from library.models.families import diffusers_key
from library.models.sgm_names import sgm_key
from library.weights.loras.names import diffusers_path, dotted, kernel_of
from library.weights.loras.peft import place_of

ROWS = [
    tuple(line.split("\t"))
    for line in (Path(__file__).parent.parent / "data/lora_modules.tsv").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith(("#", "family"))
]


@pytest.mark.parametrize("family", ["sd1", "sd2_folder", "sdxl"])
def test_every_name_leads_to_a_place_and_back(family: str) -> None:
    rows = [row for row in ROWS if row[0] == family]
    assert len(rows) > 300
    seen = set()
    for _, _, _, name, _, _, kernel in rows:
        place = place_of(name)
        assert place is not None
        seen.add((place.part, place.path))
        prefix = name[: -len(name.partition("_")[2].partition("_")[2])]
        back = sgm_key(place.path) if family == "sdxl" and place.part == "unet" else diffusers_key(place.path)
        assert name == f"{prefix}{back}"
        if place.part == "unet":
            told = kernel_of(name)
            assert (told == (3, 3)) == (kernel == "3x3"), name
            assert told != (1, 1) or kernel == "1x1", name
            blocks = {"down_blocks", "mid_block", "up_blocks"}
            assert place.path.partition(".")[0] in blocks
            assert diffusers_path(place.path) == place.path
            assert dotted(diffusers_key(place.path)) == place.path
    assert len(seen) == len(rows)

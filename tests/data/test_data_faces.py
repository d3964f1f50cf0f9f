"""The numbers of a face in a file's name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.faces import Face, face_of, name_with


@pytest.mark.parametrize(
    ("key", "face"),
    [
        ("cat_0120_0044_0030_0060.png", Face(120, 44, 30, 60)),
        ("sub/folder/a_b_7_8_9_10.jpg", Face(7, 8, 9, 10)),
        ("/else/where/x_00_0001_0002_0003_0004.webp", Face(1, 2, 3, 4)),
        ("a_1_2_3_4", Face(1, 2, 3, 4)),
        ("a_1_2_3_4.5.png", None),
        ("cat_1_2_3.png", None),
        ("cat_1_2_3_x.png", None),
        ("cat_-1_2_3_4.png", None),
        ("cat_1_2_0_4.png", None),
        ("cat_1_2_3_0.png", None),
        ("a_1_2_3_4/cat.png", None),
        ("cat.png", None),
    ],
)
def test_faces_in_names(key: str, face: Face | None) -> None:
    assert face_of(key) == face


@given(st.tuples(st.integers(0, 99999), st.integers(0, 99999), st.integers(1, 99999), st.integers(1, 99999)))
def test_a_written_name_is_read_again(numbers: tuple[int, int, int, int]) -> None:
    face = Face(*numbers)
    assert face_of(f"{name_with('a picture_2', face)}.jpeg") == face
    assert name_with("a", Face(1, 22, 333, 4444)) == "a_0001_0022_0333_4444"

"""Many small things are read in order, by threads or without, and long work is shown."""

import threading
import time

import pytest

from library.data.sources import reading
from library.data.sources.reading import LateBar, read_all


@pytest.mark.parametrize("count", [0, 1, 63, 64, 1000])
@pytest.mark.parametrize(("threads", "always"), [(1, False), (8, False), (8, True)])
def test_results_are_in_order(count: int, threads: int, always: bool) -> None:
    assert read_all(lambda n: n * n, range(count), threads=threads, always=always) == [n * n for n in range(count)]


def test_threads_come_when_the_disk_makes_us_wait() -> None:
    names = set()

    def slow(_: int) -> None:
        names.add(threading.current_thread().name)
        time.sleep(0.001)

    read_all(slow, range(640), threads=4)
    assert len(names) > 1


def test_an_error_reaches_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        read_all(lambda n: 1 // (500 - n), range(1000), threads=4, always=True)


@pytest.mark.parametrize(("patience", "shown"), [(0.0, True), (60.0, False)])
def test_a_bar_comes_late(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], patience: float, shown: bool
) -> None:
    monkeypatch.setattr(reading, "_PATIENCE", patience)
    bar = LateBar("reading pictures", 200)
    read_all(lambda n: n, range(200), threads=1, progress=bar)
    bar.close()
    assert ("reading pictures" in capsys.readouterr().err) == shown

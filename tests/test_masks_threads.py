"""Masks that several threads draw at once: the same, whatever becomes of the threads."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from mcdrop.masks import SAMPLERS, Site, _side_by_side, draw


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
@pytest.mark.parametrize("shape", [(300_000,), (32, 100, 100)], ids=str)
def test_threads_draw_the_same_masks(sampler: str, shape: tuple[int, ...]) -> None:
    site = Site("site0", shape, 0.1)
    one, several = (draw(site, 20, seed=4, sampler=sampler, threads=threads) for threads in (1, 3))
    np.testing.assert_array_equal(one, several)


def test_an_error_in_one_part_ends_all_and_is_raised() -> None:
    """At most one part more is begun by each thread once one has failed."""
    begun = list[int]()
    failed = threading.Event()

    def work(part: int) -> None:
        begun.append(part)
        if part == 2:
            failed.set()
            raise KeyboardInterrupt
        if part > 2:
            failed.wait()
            time.sleep(0.01)

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        _side_by_side(work, iter(range(1000)), 3)
    assert len(begun) < 10
    assert threading.active_count() == before


def test_an_interruption_before_the_first_part_ends_all_too(monkeypatch: pytest.MonkeyPatch) -> None:
    start, done = threading.Thread.start, list[int]()

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    def work(part: int) -> None:
        done.append(part)
        time.sleep(0.001)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _side_by_side(work, iter(range(1000)), 3)
    assert len(done) < 10
    assert not any(thread.name == "mcdrop-masks" for thread in threading.enumerate())


def test_masks_are_drawn_while_python_ends() -> None:
    """A thread that goes on after the main one, and what runs at exit, may find no further threads."""
    code = """if True:
        import atexit, threading
        from mcdrop.masks import Site, draw
        site, ended = Site("site0", (2**19,), 0.1), threading.main_thread().join
        wanted = draw(site, 8, seed=0)
        def same(when):
            print(when, (draw(site, 8, seed=0, threads=2) == wanted).all())
        threading.Thread(target=lambda: (ended(), same("later"))).start()
        atexit.register(same, "at exit")
    """
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("later True\nat exit True\n", "")

"""A child that is forked while another thread holds a lock goes on."""

import os
import subprocess
import sys
import threading

import pytest

from mcdrop.locks import forkable, new_lock

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")

# In a process of its own: other threads of this one are no business of a fork.
CHILD = """
import os, threading
from mcdrop.locks import forkable, new_lock
from mcdrop.quiet import ALONE
held = [new_lock(), forkable(threading.RLock()), ALONE]
there, done = threading.Event(), threading.Event()
def hold():
    for one in held: one.acquire()
    there.set(); done.wait()
    for one in held: one.release()
thread = threading.Thread(target=hold); thread.start(); there.wait()
child = os.fork()
if child == 0:
    free = all(one.acquire(timeout=1) for one in held)
    os._exit(0 if free else 1)
assert not held[0].acquire(blocking=False)  # the parent's stay as they are
_, status = os.waitpid(child, 0)
done.set(); thread.join()
print(os.waitstatus_to_exitcode(status))
"""

PREDICTS = """
import os, signal, threading, torch, mcdrop
from torch import nn
torch.set_num_threads(1)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.drop, self.entered, self.left = nn.Linear(4, 4), nn.Dropout(0.5), None, None
    def forward(self, x):
        h = self.drop(self.one(x))
        if STOP: THERE.set(); DONE.wait()
        return h * 2 if float(h.sum()) > 1e9 else h
STOP, THERE, DONE = [], threading.Event(), threading.Event()
x = torch.ones(3, 4)
model = mcdrop.wrap(Net(), example=x)
assert model.audit.tier != "captured"
expected = mcdrop.predict(model, x, passes=4).mean
STOP.append(1)
thread = threading.Thread(target=lambda: mcdrop.predict(model, x, passes=4)); thread.start(); THERE.wait()
child = os.fork()
if child == 0:
    signal.alarm(20)
    STOP.clear()
    os._exit(0 if (mcdrop.predict(model, x, passes=4).mean == expected).all() else 1)
_, status = os.waitpid(child, 0)
DONE.set(); thread.join()
print(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.parametrize("script", [CHILD, PREDICTS], ids=["locks", "a model in the middle of passes"])
def test_a_forked_child_does_not_wait_for_a_thread_that_it_does_not_have(script: str) -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "0", done.stderr


def test_locks_are_those_of_python() -> None:
    given = threading.RLock()
    assert forkable(given) is given
    with new_lock() as held:
        assert held

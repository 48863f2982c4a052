"""Threads of the native kernels: shared, forked, and refused memory or threads by the system."""

import threading
import time

import pytest
import torch

from lowlat.ops import native

from . import kernels
from .inputs import draw, needs_native, thread_count
from .processes import run

STEPS = """
import torch
from tests.fakes import mla_config, tiny_model
from lowlat.attention.cache import PagedCache
from lowlat.attention.metadata import AttentionBatch, SequenceSlice
from lowlat.model.native import NativeModel
config = mla_config(max_position_embeddings=4096)
plain = tiny_model(config, torch.bfloat16)
model = NativeModel(plain)
def new_cache():
    return PagedCache(config, num_pages=150, page_size=16, dtype=torch.bfloat16)
def step(ids, cache, model=model, form="decode"):
    item = SequenceSlice(pages=tuple(range(150)), start=0, length=len(ids), path=form)
    batch = AttentionBatch.build([item], page_size=16)
    return model.step(torch.tensor(list(ids)), batch, cache, [len(ids) - 1])[1]
"""
"""Steps of one sequence, and the logits of its last token."""


@needs_native
def test_the_pool_may_be_replaced_and_shared() -> None:
    """Callers on several threads, while another changes the pool under them."""
    w, x = draw((300, 200), "normal", 1), draw((7, 200), "normal", 2)
    matrix = native.module().Matrix.bf16(w)
    expected = kernels.linear(x, matrix)
    failures: list[str] = []

    def call() -> None:
        for _ in range(200):
            if not torch.equal(kernels.linear(x, matrix), expected):
                failures.append("other numbers")

    callers = [threading.Thread(target=call) for _ in range(3)]
    with thread_count(2):
        for caller in callers:
            caller.start()
        for count in (1, 3, 2, 4) * 5:
            native.module().set_threads(count)
        for caller in callers:
            caller.join()
    assert not failures


@needs_native
@pytest.mark.parametrize("threads", [8, 9, 20, 65])
def test_groups_of_threads_compute_the_same(threads: int) -> None:
    """Of 8 threads, which steal work from each other; barriers of one to three levels."""
    w, x = draw((300, 200), "normal", 1), draw((7, 200), "normal", 2)
    matrix = native.module().Matrix.bf16(w)
    expected = kernels.linear(x, matrix)
    with thread_count(threads):
        for _ in range(10):
            assert torch.equal(kernels.linear(x, matrix), expected)
    for items in (0, 1, 1000):
        for shrinking in (False, True):
            assert native.module().time_phases(threads, 3, items, shrinking) > 0


@needs_native
def test_sleeping_threads_wake_up() -> None:
    """Each one wakes others; with more threads than processors all sleep between jobs."""
    threads = native.processors() + 20
    w, x = draw((300, 200), "normal", 1), draw((7, 200), "normal", 2)
    matrix = native.module().Matrix.bf16(w)
    expected = kernels.linear(x, matrix)
    with thread_count(threads):
        for _ in range(20):
            time.sleep(0.002)
            assert torch.equal(kernels.linear(x, matrix), expected)


@needs_native
def test_a_forked_child_computes() -> None:
    """Regression: a child that waits for threads only its parent has."""
    code = """
import os, torch
from lowlat.ops import native
from tests.native import kernels
x = torch.ones(3, 64, dtype=torch.bfloat16)
native.module().set_threads(2)
matrix = native.module().Matrix.bf16(x)
kernels.linear(x, matrix)
child = os.fork()
if child == 0:
    os._exit(0 if kernels.linear(x, matrix)[0, 0] == 64 else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    result = run(code)
    assert result.stdout.strip() == "0", result.stderr


@needs_native
def test_a_child_forked_within_a_step_steps() -> None:
    """Regression: a child that waits for the model until a thread it does not have is done."""
    code = (
        STEPS
        + """
import os, signal, threading, time
expected = step(range(1, 60), new_cache())
stops = False
def go_on():
    cache = new_cache()
    while not stops:
        step(range(60), cache)
thread = threading.Thread(target=go_on)
thread.start()
statuses = []
for _ in range(8):
    time.sleep(0.01)
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        same = all(torch.equal(step(range(1, 60), new_cache()), expected) for _ in range(2))
        os._exit(0 if same else 1)
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
stops = True
thread.join()
print(set(statuses), torch.equal(step(range(1, 60), new_cache()), expected))
"""
    )
    result = run(code)
    assert result.stdout.strip() == "{0} True", result.stderr


@needs_native
def test_threads_step_one_model() -> None:
    """Regression: a deadlock between the GIL and the model's lock, or a step that writes to
    another step's memory."""
    code = (
        STEPS
        + """
import threading
texts = [range(9), range(20, 49), range(50, 53)]
expected = [step(text, new_cache()) for text in texts]
results = [[] for _ in texts]
def steps(number):
    cache = new_cache()
    for _ in range(100):
        results[number].append(step(texts[number], cache))
callers = [threading.Thread(target=steps, args=[number]) for number in range(3)]
for caller in callers:
    caller.start()
for caller in callers:
    caller.join()
same = [torch.equal(r, logits) for own, logits in zip(results, expected) for r in own]
print(len(same), all(same), torch.equal(expected[0], expected[1]))
"""
    )
    result = run(code)
    assert result.stdout.split() == ["300", "True", "False"], result.stderr


LIMIT = """
import resource, torch
from lowlat.ops import native
from tests.native import kernels
module = native.module()
def leave(mebibytes=None):
    # Address space in addition to what is mapped; None: no limit.
    pages = int(open("/proc/self/statm").read().split()[0])
    room = -1 if mebibytes is None else pages * resource.getpagesize() + int(mebibytes * 2**20)
    resource.setrlimit(resource.RLIMIT_AS, (room, -1))
"""


@needs_native
def test_a_product_without_memory_is_an_error() -> None:
    """Regression: an exception that leaves a thread of the pool, which ends the process."""
    code = (
        LIMIT
        + """
x = torch.ones(400_000, 32, dtype=torch.bfloat16)
matrix = module.Matrix.bf16(torch.ones(128, 32, dtype=torch.bfloat16))
out = torch.zeros(len(x), 128)
module.set_threads(3)
kernels.linear(x[:3], matrix)
for _ in range(3):
    leave(40)  # 25 for a copy of x, then each thread wants 50
    try:
        module.linear(matrix, x, out)
    except MemoryError:
        print("MemoryError")
    leave()
module.linear(matrix, x, out)
print(bool((out == 32).all()))
"""
    )
    result = run(code)
    assert result.stdout.split() == ["MemoryError"] * 3 + ["True"], result.stderr


@needs_native
def test_a_draw_without_memory_is_an_error() -> None:
    """And the memory kept from draw to draw grows with the next row that is longer."""
    code = (
        LIMIT
        + """
x = torch.zeros(4_000_000)
kernels.draw(x[:3], 0.5, temperature=1.0)
for _ in range(3):
    leave(20)  # 31 for the weights
    try:
        kernels.draw(x, 0.5, temperature=1.0)
    except MemoryError:
        print("MemoryError")
    leave()
draw = kernels.draw
print(draw(x[:3], 0.5, temperature=1.0), draw(x, 0.5, temperature=1.0))
"""
    )
    result = run(code)
    assert result.stdout.split() == ["MemoryError"] * 3 + ["1", "2000000"], result.stderr


@pytest.mark.slow
@needs_native
def test_a_step_without_memory_is_an_error() -> None:
    """Wherever it runs out: while some threads wait for others, too."""
    code = (
        STEPS
        + LIMIT
        + """
module.set_threads(3)
ids = [(7 * i) % 263 for i in range(60)] * 40
expected = step(ids, new_cache(), form="expanded")
errors = 0
for eighth in range(32):
    model = NativeModel(plain)
    cache = new_cache()
    leave(eighth / 8)
    try:
        step(ids, cache, model, form="expanded")
    except (MemoryError, RuntimeError):  # PyTorch's own is a RuntimeError
        errors += 1
    leave()
    if eighth % 10 == 0:
        assert torch.equal(step(ids, cache, model, form="expanded"), expected)
print(errors)
"""
    )
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 0


@needs_native
def test_threads_the_system_refuses_are_an_error() -> None:
    """Regression: threads that did start and are not waited for, which ends the process."""
    code = (
        LIMIT
        + """
x = torch.ones(3, 64, dtype=torch.bfloat16)
matrix = module.Matrix.bf16(x)
module.set_threads(8)
leave(20)  # their stacks take 8 each
for _ in range(2):
    try:
        kernels.linear(x, matrix)
    except RuntimeError as error:
        print(error)
leave()
print(bool((kernels.linear(x, matrix) == 64).all()))
"""
    )
    result = run(code)
    *errors, last = result.stdout.strip().splitlines()
    assert len(errors) == 2 and last == "True", result.stderr
    assert all("does not start 8 threads" in error for error in errors)

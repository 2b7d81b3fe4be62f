"""Several threads on one attached model: in turn, or refused, and never a partition of two."""

import threading
import time

import pytest
import tiny
import torch
from matrix import MODELS

import popmm
from popmm.runtime.exclusive import Exclusive


def test_they_come_in_the_order_in_which_they_asked():
    exclusive, order = Exclusive(waiting=5), []

    def call(i):
        with exclusive("generate", queues=True):
            order.append(i)
            time.sleep(0.01)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(5)]
    with exclusive("generate", queues=True):
        for i, thread in enumerate(threads):
            thread.start()
            while len(exclusive._turns) <= i:
                time.sleep(0.001)
        with exclusive("forward", queues=True):  # a call inside one's own does not wait
            pass
        with pytest.raises(RuntimeError, match="5 calls are waiting already"):
            in_another_thread(lambda: exclusive("generate", queues=True).__enter__())
        with pytest.raises(RuntimeError, match="another thread"):
            in_another_thread(lambda: exclusive("reset").__enter__())
    for thread in threads:
        thread.join()
    assert order == list(range(5)) and not exclusive._turns


def in_another_thread(call):
    """Runs it, and raises what it raises."""
    raised = []

    def run():
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


@pytest.mark.parametrize("settings", [dict(bytes=0.3), dict(lossless=True, draft_tokens=3), dict(statistics="weights")])
def test_each_thread_gets_its_own_answer(settings):
    model = MODELS["llama"].build(torch.float64)
    prompts = [tiny.prompt(5 + seed, seed=seed) for seed in range(6)]
    how = dict(do_sample=False, max_new_tokens=8)
    with popmm.pruned(model, waiting_calls=6, **settings) as state:
        expected = [model.generate(ids, **how) for ids in prompts]
        found = [None] * len(prompts)

        def call(i):
            found[i] = model.generate(prompts[i], **how)

        threads = [threading.Thread(target=call, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
        assert state.passes["prompt"] == 12


def test_by_themselves_they_are_refused():
    exclusive = Exclusive()
    with exclusive("generate", queues=True), pytest.raises(RuntimeError, match="waiting_calls=8"):
        in_another_thread(lambda: exclusive("generate", queues=True).__enter__())


@pytest.mark.parametrize("value", [-1, 1.5, True, "all"])
def test_bad_numbers(value):
    with pytest.raises(ValueError, match="waiting_calls"):
        popmm.PopConfig(waiting_calls=value)

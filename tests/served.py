"""Servers for the tests, in threads of this process, and what their clients ask."""

import functools
import threading
import time
import urllib.request
from contextlib import contextmanager

import openai
import torch
from prometheus_client.parser import text_string_to_metric_families

from popmm import zoo
from popmm.serving.limits import Limits
from popmm.serving.server import Server

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
CACHE = 4096  # tokens
STORY = "Once upon a time there was a little girl named Lily who had a red ball and a dog"
PROMPTS = [" ".join(STORY.split(" ")[: 2 + i % 15]) for i in range(32)]
LENGTHS = [3 + 5 * i % 23 for i in range(32)]


def stories():
    """In double precision, where sums in another order choose the same tokens."""
    model, tokenizer = zoo.load("stories", dtype=torch.float64)
    tokenizer.chat_template = TEMPLATE
    return model, tokenizer


@contextmanager
def serving(config, limits=None, load=stories, name="tales", **settings):
    """A server that listens, stopped and ended after the block."""
    limits = Limits(cache_tokens=CACHE, grace=5) if limits is None else limits
    server = Server(name, load, config, limits, port=0, **settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.port)
        yield server
    finally:
        server.stop()
        thread.join(timeout=60)
        assert not thread.is_alive()


def until(holds, seconds=20):
    """Waits until it does."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def client(server, **settings):
    """OpenAI's own."""
    return _client(server.port).with_options(**settings) if settings else _client(server.port)


@functools.cache  # it takes longer to make than to ask
def _client(port):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)


def complete(server, prompt, new=16, **settings):
    settings = {"temperature": 0, **settings}
    return client(server).completions.create(model="tales", prompt=prompt, max_tokens=new, **settings)


def text_of(chunks):
    """Of a stream."""
    return "".join(chunk.choices[0].text for chunk in chunks)


def figures(server):
    """``GET /metrics``, by name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as response:
        text = response.read().decode()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def alone(model, tokenizer, prompt, new):
    """What the model itself goes on with."""
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=new)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True)

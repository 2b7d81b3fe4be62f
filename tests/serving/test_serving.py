"""``popmm serve`` with OpenAI's client: each request gets its own answer, whatever else goes on."""

import asyncio
import gc
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from served import CACHE, LENGTHS, PROMPTS, alone, client, complete, figures, serving, stories, text_of, until

import popmm
from popmm import zoo
from popmm.compat.serving import app
from popmm.compat.serving.batched import PAGE
from popmm.serving.limits import Limits

LONG = 450  # tokens, of the 512 that the model reads
EXACT = dict(ffn_ratio=0.0, statistics="weights")


@pytest.fixture(scope="module")
def server():
    with serving(popmm.PopConfig(**EXACT)) as server:
        yield server


@pytest.fixture(scope="module")
def expected():
    """Of each prompt, what the dense model goes on with."""
    model, tokenizer = stories()
    return [alone(model, tokenizer, prompt, new) for prompt, new in zip(PROMPTS, LENGTHS)]


def asked(server, requests, **settings):
    """Answers to requests that are sent at once."""
    address = f"http://127.0.0.1:{server.port}/v1"

    async def one(whom, prompt, new, more):
        how = {"temperature": 0, **settings, **more}
        answer = await whom.completions.create(model="tales", prompt=prompt, max_tokens=new, **how)
        if how.get("stream"):
            return "".join([chunk.choices[0].text async for chunk in answer])
        return answer.choices[0].text

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0) as whom:
            return await asyncio.gather(*[one(whom, *request) for request in requests])

    return asyncio.run(all_of_them())


def test_a_completion_is_the_models_own(server, expected):
    answer = complete(server, PROMPTS[5], LENGTHS[5])
    assert answer.choices[0].text == expected[5]
    assert answer.usage.completion_tokens == LENGTHS[5] and answer.choices[0].finish_reason == "length"
    assert [model.id for model in client(server).models.list()] == ["tales"]


def test_a_chat_is_the_models_own(server, expected):
    messages = [{"role": "user", "content": PROMPTS[5]}]
    how = dict(model="tales", messages=messages, temperature=0, max_completion_tokens=LENGTHS[5])
    assert client(server).chat.completions.create(**how).choices[0].message.content == expected[5]
    chunks = list(client(server).chat.completions.create(stream=True, **how))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected[5]
    assert chunks[-1].usage.completion_tokens == LENGTHS[5]


@pytest.mark.parametrize("new", [1, 2, 40])
def test_a_stream_is_what_comes_at_once(server, new):
    whole = complete(server, PROMPTS[3], new).choices[0].text
    assert text_of(complete(server, PROMPTS[3], new, stream=True)) == whole


@pytest.mark.parametrize("stream", [False, True])
def test_of_32_at_once_each_gets_its_own(server, expected, stream):
    requests = [(prompt, new, {}) for prompt, new in zip(PROMPTS, LENGTHS)]
    assert asked(server, requests, stream=stream) == expected


def test_sampled_ones_do_not_mix_with_greedy_ones(server, expected):
    sampling = {"temperature": 1.5, "top_p": 0.95}
    requests = [(p, n, sampling if i % 2 else {}) for i, (p, n) in enumerate(zip(PROMPTS, LENGTHS))]
    answers = asked(server, requests)
    assert answers[::2] == expected[::2]
    assert sum(a != b for a, b in zip(answers[1::2], expected[1::2])) > 8


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_ends_the_text(server, stream):
    whole = complete(server, PROMPTS[8], 60).choices[0].text
    before, _, _ = whole.partition(".")
    answer = complete(server, PROMPTS[8], 60, stop=["xyz", "."], stream=stream)
    text = text_of(answer) if stream else answer.choices[0].text
    assert text == before + "."
    until(lambda: server.engine.running == 0)


def test_who_goes_away_frees_a_place(server):
    before = figures(server)
    chunks = complete(server, PROMPTS[0], LONG, stream=True)
    next(iter(chunks))
    assert figures(server)[("popmm_sequences_running",)] == 1
    chunks.close()
    with pytest.raises(openai.APITimeoutError):
        client(server, timeout=0.3).completions.create(model="tales", prompt="One day", max_tokens=LONG, temperature=0)
    until(lambda: figures(server)[("popmm_sequences_running",)] == 0)
    now = figures(server)
    name = ("popmm_generated_tokens_total",)
    assert now[name] - before[name] < 2 * LONG
    gone = ("popmm_requests_refused_total", "499")
    assert now[gone] - before.get(gone, 0) == 2
    assert not server.engine._cb.output_router.result_handlers
    complete(server, PROMPTS[0], 1)  # after which the pass that was on its way has been delivered
    complete(server, PROMPTS[0], 1)
    assert server.engine._cb.output_router.output_queue.empty()


def test_who_goes_away_leaves_the_cache_to_others(server, expected):
    for i in range(CACHE // PAGE + 2):  # the last would find no room beside what the others had held
        chunks = complete(server, PROMPTS[i], LONG, stream=True)
        next(iter(chunks))
        chunks.close()
    assert complete(server, PROMPTS[9], LENGTHS[9]).choices[0].text == expected[9]


def test_figures_move_with_the_tokens(server):
    before = figures(server)
    answer = complete(server, PROMPTS[7], 9)
    now = figures(server)
    moved = {name: now[name] - before[name] for name in before}
    assert moved[("popmm_generated_tokens_total",)] == 9
    assert moved[("popmm_prompt_tokens_total",)] == answer.usage.prompt_tokens
    assert moved[("popmm_passes_total", "decode")] == 8 and moved[("popmm_passes_total", "prompt")] == 1
    assert moved[("popmm_request_seconds_count",)] == 1
    assert now[("popmm_sequences_running",)] == now[("popmm_sequences_waiting",)] == 0


BAD = {
    "prompt has 64. tokens: at most 511": dict(prompt=" a" * 640),
    "max_tokens=508 or less": dict(prompt=PROMPTS[0] + " there", max_tokens=900),
    "n is not served": dict(prompt="One day", n=2),
    "RepetitionPenalty.*--no-continuous-batching": dict(prompt="One day", frequency_penalty=0.5),
    "num_beams=3 is not served": dict(
        prompt="One day", extra_body={"generation_config": '{"num_beams": 3, "max_new_tokens": 4}'}
    ),
    "temperature=-1": dict(prompt="One day", temperature=-1),
    "pinned to 'tales'": dict(prompt="One day", model="another"),
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_served_is_refused(server, message):
    request = {"model": "tales", "temperature": 0, **BAD[message]}
    with pytest.raises(openai.BadRequestError, match=message):
        client(server).completions.create(**request)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ([{"content": "One day"}], "no 'role'"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "reads text alone"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "'input_audio' is not served"),
    ],
)
def test_bad_messages_are_refused(server, messages, message):
    with pytest.raises(openai.BadRequestError, match=message):
        client(server).chat.completions.create(model="tales", messages=messages)


def test_the_server_lives_on_after_all_that(server, expected):
    assert complete(server, PROMPTS[9], LENGTHS[9]).choices[0].text == expected[9]


def test_what_the_models_own_configuration_asks_for_is_said_to_be_left_out():
    def load():
        model, tokenizer = stories()
        model.generation_config.repetition_penalty = 1.1
        return model, tokenizer

    with pytest.warns(UserWarning, match="leaves out RepetitionPenaltyLogitsProcessor of the model's own"):
        with serving(popmm.PopConfig(**EXACT), Limits(cache_tokens=512, grace=5), load=load) as server:
            assert complete(server, PROMPTS[0], 2).choices[0].text
            with pytest.raises(openai.BadRequestError, match="repetition_penalty: not served together"):
                complete(server, PROMPTS[0], 2, frequency_penalty=0.5)


def test_a_server_that_cannot_go_on_says_so():
    with serving(popmm.PopConfig(**EXACT), Limits(cache_tokens=512, grace=5)) as server:
        server.engine._cb.background_thread_status.record_fatal_error(RuntimeError("no memory"))
        with pytest.raises(openai.InternalServerError, match="no memory") as error:
            complete(server, PROMPTS[0])
        assert error.value.status_code == 503
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health")


def test_a_server_put_together_otherwise_is_refused(monkeypatch):
    monkeypatch.setitem(app._PARTS, lambda body: None, {"body", "request_id"})
    with pytest.raises(RuntimeError, match="takes no request_id; use transformers 5.17"):
        app.check_parts()


def test_by_itself_tokens_read_tiers_chosen_without_a_prompt():
    with serving(popmm.PopConfig()) as server:
        assert server.engine.batches
        assert (server.state.config.statistics, server.state.config.selection) == ("weights", "tiers")
        complete(server, PROMPTS[1], 5)
        assert server.state.passes["decode"] >= 4 and server.state.passes["dense"] == 0
        found = figures(server)
        read, dense = (found[("popmm_ffn_bytes_per_token", which)] for which in ("read", "dense"))
        assert (read, dense) == server.state.bytes_per_token() and read < dense
        assert found[("popmm_channels_skipped_ratio",)] == server.state.channels_skipped()


def test_a_full_queue_a_large_request_and_a_slow_one():
    limits = Limits(running=1, waiting=1, megabytes=0.1, cache_tokens=1024, grace=5)
    with serving(popmm.PopConfig(**EXACT), limits) as server:
        first, second = (complete(server, PROMPTS[0], 150, stream=True) for _ in range(2))
        next(iter(first))
        with pytest.raises(openai.RateLimitError, match="2 requests are being answered or wait"):
            complete(server, PROMPTS[0])
        assert figures(server)[("popmm_sequences_waiting",)] == 1
        first.close()
        assert len(text_of(second)) > 100
        with pytest.raises(openai.APIStatusError, match=r"larger than 0.1 MB") as error:
            complete(server, "a" * 2_000_000)
        assert error.value.status_code == 413
        assert complete(server, PROMPTS[0], 3).choices[0].text


def test_a_cache_that_does_not_hold_all_that_is_asked_at_once():
    requests = [(f"{prompt} and a dog" * 12, 60, {}) for prompt in PROMPTS[12:15]]
    with serving(popmm.PopConfig(**EXACT), Limits(cache_tokens=2 * PAGE, grace=5)) as server:
        answers = [complete(server, prompt, new) for prompt, new, _ in requests]
        assert all(PAGE - 60 < answer.usage.prompt_tokens < PAGE < answer.usage.total_tokens for answer in answers)
        assert asked(server, requests) == [answer.choices[0].text for answer in answers]
        room = 2 * PAGE - complete(server, requests[2][0] * 2, 1).usage.prompt_tokens
        assert complete(server, requests[2][0] * 2, room).choices[0].text
        with pytest.raises(openai.BadRequestError, match=f"max_tokens={room} or less"):
            complete(server, requests[2][0] * 2, room + 1)


def test_what_takes_too_long_ends():
    limits = Limits(seconds=0.3, cache_tokens=1024, grace=5)
    with serving(popmm.PopConfig(**EXACT), limits) as server:
        with pytest.raises(openai.InternalServerError, match="0.3 seconds") as error:
            complete(server, PROMPTS[0], LONG)
        assert error.value.status_code == 504
        with pytest.raises(openai.APIError, match="0.3 seconds"):
            text_of(complete(server, PROMPTS[0], LONG, stream=True))
        until(lambda: server.engine.running == 0)


def test_when_stopped_what_runs_is_finished_and_nothing_else_begins():
    with serving(popmm.PopConfig(**EXACT)) as server:
        whom = client(server)
        chunks = complete(server, PROMPTS[0], 100, stream=True)
        begun = next(iter(chunks)).choices[0].text
        server.stop()
        until(lambda: server.gate.closing)
        with pytest.raises((openai.APIConnectionError, openai.InternalServerError)):
            whom.completions.create(model="tales", prompt="One day", max_tokens=3)
        rest = list(chunks)
        assert rest[-1].usage.completion_tokens == 100
        model, tokenizer = stories()
        assert begun + text_of(rest) == alone(model, tokenizer, PROMPTS[0], 100)


def test_when_stopped_what_takes_too_long_is_told():
    told = []
    with serving(popmm.PopConfig(**EXACT), Limits(grace=0.2, cache_tokens=1024)) as server:
        model = server.model

        def ask():
            try:
                complete(server, PROMPTS[0], LONG)
            except openai.APIError as error:
                told.append(str(error))

        chunks = complete(server, PROMPTS[0], LONG, stream=True)
        next(iter(chunks))
        thread = threading.Thread(target=ask)
        thread.start()
        until(lambda: server.gate.inside == 2)
        server.stop()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(chunks)
        thread.join()
    assert "shutting down" in told[0]
    with pytest.raises(RuntimeError, match="not attached"):
        popmm.detach(model)


@pytest.mark.slow
def test_the_command_ends_on_ctrl_c():
    """After what runs, with the exit code of a program that was told to stop."""
    command = [sys.executable, "-m", "popmm.cli", "serve", "zoo:stories", "--port", "0", "--cache-tokens", "1024"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        says = iter(process.stderr.readline, "")
        address = next(found[0] for line in says if (found := re.findall(r"http://\S+/v1", line)))
        with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as whom:
            how = dict(model="zoo:stories", prompt=PROMPTS[0], max_tokens=200, temperature=0)
            chunks = iter(whom.completions.create(stream=True, **how))
            next(chunks)
            process.send_signal(signal.SIGINT)
            assert list(chunks)[-1].usage.completion_tokens > 100
        assert process.wait(timeout=60) in (0, 130)
        assert "Traceback" not in process.stderr.read()


@pytest.mark.slow
def test_a_thousand_requests_take_no_more_memory():
    """Half of them are streams, and one in ten goes away."""
    psutil = pytest.importorskip("psutil")
    process, held = psutil.Process(), []
    with serving(popmm.PopConfig(), load=lambda: zoo.load("stories")) as server:
        whom = client(server)

        def ask(i):
            how = dict(model="tales", prompt=PROMPTS[i % 32], max_tokens=LENGTHS[i % 32], stream=i % 2 == 0)
            answer = whom.completions.create(**how, temperature=i % 3 / 2)
            if i % 10 == 0:
                return answer.close()
            return list(answer) if i % 2 == 0 else answer

        with ThreadPoolExecutor(16) as pool:
            for first in range(0, 1000, 100):
                list(pool.map(ask, range(first, first + 100)))
                gc.collect()
                held.append(process.memory_info().rss / 2**20)
                print(f"{first + 100} requests: {held[-1]:.1f} MiB")
        until(lambda: server.engine.running == server.gate.inside == 0)
        assert not server.engine._cb.output_router.result_handlers
    assert held[-1] - held[2] < 0.03 * held[2]

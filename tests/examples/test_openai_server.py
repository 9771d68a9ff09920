"""The OpenAI-compatible server, asked by OpenAI's client: many requests at once, streams, stops, seeds, errors, hang-ups."""

import asyncio
import importlib.util
import json
import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import openai
import pytest
import uvicorn
from jax.sharding import Mesh

from moekit.models.qwen3next import TINY, Engine, generate, load, write_random_checkpoint
from moekit.models.qwen3next import engine as engine_module
from moekit.models.qwen3next.config import ATTENTION, GDN
from moekit.models.qwen3next.sampling import GREEDY
from moekit.models.qwen3next.text import Text
from tests.models.words import write_words

EXAMPLE = Path(__file__).parents[2] / "examples" / "openai_server.py"
SMALL = replace(TINY, layer_types=(GDN, ATTENTION), num_experts=4, num_experts_per_tok=2, vocab_size=258)
LENGTH, NEW = 512, 8
PROMPTS = [f"{word} {i}" for i, word in enumerate(["Once upon", "naïve 東京", "x", "The answer is", "def f(n):"] * 4)]
ENDLESS = {"prompt": "Once", "max_tokens": 480, "temperature": 0}
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_words(write_random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "small", SMALL))


@pytest.fixture(scope="module")
def model(checkpoint):
    return load(checkpoint, Mesh(np.array(jax.devices("cpu")[:1]), ("tp",)))


@pytest.fixture(scope="module")
def ends():
    """Why each sequence of the engine has ended, in order."""
    return []


@pytest.fixture(scope="module")
def engine(model, ends):
    class Told(Engine):
        def step(self):
            found = super().step()
            ends.extend(token.end for token in found if token.end)
            return found

    made = Told(model, slots=8, length=LENGTH, piece=16, kernels="xla")
    made.warmup()
    return made


@pytest.fixture(scope="module")
def address(checkpoint, engine):
    """Serve in a thread; the base of its addresses."""
    spec = importlib.util.spec_from_file_location("openai_server", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    app = example.Server("small", Text(checkpoint), engine, GREEDY).app()
    served = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=served.run)
    thread.start()
    until(lambda: served.started)
    yield f"http://127.0.0.1:{served.servers[0].sockets[0].getsockname()[1]}/v1"
    served.should_exit = True
    thread.join()


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def wanted(checkpoint, model):
    """The tokens and the text of each prompt, by the library's `generate`."""
    text = Text(checkpoint)
    ids = [text.encode(prompt) for prompt in PROMPTS]
    made = generate(model, ids, max_new_tokens=NEW, eos=text.ends(SMALL), kernels="xla").tokens
    return [(tokens, text.decode(tokens)) for tokens in made]


def until(holds, seconds=20):
    last = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < last, "it never comes"
        time.sleep(0.01)


def complete(client, **options):
    return client.completions.create(model="small", **options)


def test_two_hundred_requests_at_once_each_get_their_own_tokens(address, wanted):
    async def whole(client, i):
        made = await client.completions.create(model="small", prompt=PROMPTS[i], max_tokens=NEW)
        (choice,) = made.choices
        return choice.text, choice.finish_reason, made.usage

    async def streamed(client, i):
        options = {"max_tokens": NEW, "stream": True, "stream_options": {"include_usage": True}}
        chunks = [chunk async for chunk in await client.completions.create(model="small", prompt=PROMPTS[i], **options)]
        assert chunks[-1].choices == []
        text = "".join(chunk.choices[0].text for chunk in chunks[:-1])
        return text, chunks[-2].choices[0].finish_reason, chunks[-1].usage

    async def every():
        async with openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=300) as client:
            kinds = [(whole, streamed)[n % 2](client, n % len(PROMPTS)) for n in range(200)]
            return await asyncio.gather(*kinds)

    for n, (text, reason, usage) in enumerate(asyncio.run(every())):
        i = n % len(PROMPTS)
        tokens, words = wanted[i]
        assert (text, reason) == (words, "length" if len(tokens) == NEW else "stop")
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(PROMPTS[i].encode()), len(tokens))
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["small"]


def test_a_chat_goes_through_the_template_whole_and_streamed(client, checkpoint, model):
    text = Text(checkpoint)
    ids = text.encode_chat([TALK[0], {"role": "user", "content": "Hi"}])
    alone = Engine(model, slots=8, length=LENGTH, piece=16, kernels="xla")
    number = alone.add(ids, max_new_tokens=NEW, eos=text.ends(SMALL))
    words = text.decode(alone.results()[number].tokens)
    options = {"model": "small", "messages": TALK, "max_completion_tokens": NEW}
    made = client.chat.completions.create(**options)
    assert (made.choices[0].message.role, made.choices[0].message.content) == ("assistant", words)
    assert made.usage.prompt_tokens == len(ids)
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == words


def test_a_stop_string_ends_an_answer(client, wanted):
    i = max(range(len(PROMPTS)), key=lambda i: len(wanted[i][1]))
    words = wanted[i][1]
    options = {"prompt": PROMPTS[i], "max_tokens": NEW, "stop": [words[-2:], "never said"]}
    made = complete(client, **options)
    before = words[: words.index(words[-2:])]
    assert (made.choices[0].text, made.choices[0].finish_reason) == (before, "stop")
    chunks = list(complete(client, **options, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == before
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_seed_gives_the_same_answer_again(client):
    hot = {"prompt": [7, 8, 9], "max_tokens": NEW, "temperature": 1.5, "top_p": 0.95}
    said = [complete(client, **hot, seed=seed).choices[0].text for seed in (1, 1, 2, 2**40 + 1, -3)]
    assert said[0] == said[1] == said[3]
    assert len(set(said)) == 3
    assert len({complete(client, **hot).choices[0].text for _ in range(3)}) == 3  # without one, each has its own


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"temperature": -1}, openai.BadRequestError, "temperature is -1"),
        ({"max_tokens": 1000}, openai.BadRequestError, "more than the engine's length of 512"),
        ({"max_tokens": "many"}, openai.BadRequestError, "an integer is needed"),
        ({"n": 2}, openai.BadRequestError, "n is not supported here"),
        ({"prompt": [999]}, openai.BadRequestError, "outside the vocabulary of 258"),
        ({"prompt": 7}, openai.BadRequestError, "prompt must be a string or a list of token ids"),
        ({"prompt": ""}, openai.BadRequestError, "prompt is empty"),
        ({"stop": [1]}, openai.BadRequestError, "stop must be a string or a list of strings"),
        ({"seed": "x"}, openai.BadRequestError, "seed is 'x'"),
        ({"stream": True, "stream_options": [1]}, openai.BadRequestError, "stream_options must be an object"),
        ({"model": "large"}, openai.NotFoundError, "there is no model 'large' here, only 'small'"),
    ],
)
def test_errors_have_openais_shape(client, options, kind, words):
    with pytest.raises(kind) as caught:
        client.completions.create(**{"model": "small", "prompt": "x", **options})
    assert words in caught.value.body["message"]
    assert caught.value.body["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "words"), [(b"{", "the body is no JSON"), (b"[" * 100_000, "the body is no JSON"), (b"7", "object")]
)
def test_a_body_that_is_no_request(address, body, words):
    request = urllib.request.Request(f"{address}/completions", body, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)
    assert caught.value.code == 400
    assert words in json.loads(caught.value.read())["error"]["message"]


def test_a_message_without_text_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="a content that is text"):
        client.chat.completions.create(model="small", messages=[{"role": "user", "content": [{"type": "image_url"}]}])


def test_a_full_engine_says_so(client, engine, monkeypatch):
    monkeypatch.setattr(engine, "waiting", -8)
    with pytest.raises(openai.RateLimitError, match="wait already"):
        complete(client, prompt="x")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_is_cancelled(client, engine, ends, stream):
    until(lambda: not engine.busy)
    before = len(ends)
    if stream:
        with complete(client, **ENDLESS, stream=True) as chunks:
            next(iter(chunks))
    else:
        with pytest.raises(openai.APITimeoutError):
            complete(client.with_options(timeout=0.1), **ENDLESS)
    until(lambda: len(ends) > before and not engine.busy)
    assert ends[before:] == ["cancelled"]


def test_an_error_of_the_devices_is_an_error_of_the_server(client, monkeypatch, wanted):
    """Of a whole answer and of one that is streamed; the next request is as ever."""

    def broken(*_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: a device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "_advance", broken)
        with pytest.raises(openai.InternalServerError, match="failed on this prompt"):
            complete(client, prompt="x", max_tokens=NEW)
        with pytest.raises(openai.APIError, match="failed on this prompt"):
            list(complete(client, prompt="x", max_tokens=NEW, stream=True))
    assert complete(client, prompt=PROMPTS[0], max_tokens=NEW).choices[0].text == wanted[0][1]

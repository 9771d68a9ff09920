"""An OpenAI-compatible HTTP API on `moekit.models.qwen3next.Engine`: completions and chat, whole or streamed.

    pip install "moekit[jax,text]" starlette uvicorn
    python examples/openai_server.py --checkpoint DIR          # http://127.0.0.1:8000/v1

One thread steps the engine. Requests are tasks of an event loop, which adds their sequences and hands each its tokens.
"""

import argparse
import asyncio
import json
import logging
import secrets
import sys
import threading
import time
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from moekit.errors import MoekitError
from moekit.models.qwen3next import Engine, FullError, Room, channel_of, load
from moekit.models.qwen3next.text import Stream, Text, sampling_of

UNSUPPORTED = ("best_of", "echo", "frequency_penalty", "logit_bias", "logprobs", "n", "presence_penalty", "suffix", "tools")
COMPLETION = 16  # tokens of a completion that does not say how many


class Worker:
    """Steps an engine in a thread of its own. All but `run` is called in the event loop."""

    def __init__(self, engine):
        self.engine, self.readers, self.wake = engine, {}, threading.Event()

    def run(self, loop):
        while self.wake.wait():
            self.wake.clear()
            while self.engine.busy:
                try:
                    loop.call_soon_threadsafe(self.deliver, self.engine.step())
                except Exception:  # of a device; the next step says that all sequences have failed
                    logging.exception("the engine fails")

    def deliver(self, tokens):
        for token in tokens:
            queue = self.readers.pop(token.sequence) if token.end else self.readers[token.sequence]
            queue.put_nowait(token)

    async def tokens(self, number, queue):
        """A sequence's tokens as they come. It is cancelled where nobody wants more of them."""
        end = None
        try:
            while end is None:
                token = await queue.get()
                end = token.end
                yield token
        finally:
            self.engine.cancel(number)
            self.wake.set()

    def add(self, ids, **how):
        number = self.engine.add(ids, **how)
        queue = self.readers[number] = asyncio.Queue()
        self.wake.set()
        return self.tokens(number, queue)


class Answer:
    """The answer to a request, in the making."""

    def __init__(self, model, stream, read, chat, streamed):
        self.stream, self.read, self.made, self.end = stream, read, 0, None
        self.where = ("delta" if streamed else "message") if chat else None
        kind = ("chat.completion.chunk" if streamed else "chat.completion") if chat else "text_completion"
        self.head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}

    async def pieces(self, tokens):
        """The text that each token adds, up to a stop string. Raises HTTPException where the sequence fails."""
        async with aclosing(tokens):
            async for token in tokens:
                if token.end == "failed":
                    raise HTTPException(500, "the model or a device failed on this prompt")
                self.made += 1
                piece = self.stream.add(token.token) + (self.stream.end() if token.end else "")
                self.end = "stop" if self.stream.stopped else token.end
                yield piece
                if self.end:
                    return

    def said(self, text):
        words = {self.where: {"role": "assistant", "content": text}} if self.where else {"text": text}
        return {**self.head, "choices": [{"index": 0, **words, "logprobs": None, "finish_reason": self.end}]}

    @property
    def usage(self):
        return {"prompt_tokens": self.read, "completion_tokens": self.made, "total_tokens": self.read + self.made}

    async def whole(self, tokens):
        text = "".join([piece async for piece in self.pieces(tokens)])
        return JSONResponse({**self.said(text), "usage": self.usage})

    async def events(self, tokens, counted):
        try:
            async for piece in self.pieces(tokens):
                if piece or self.end:
                    yield event(self.said(piece))
            if counted:
                yield event({**self.head, "choices": [], "usage": self.usage})
        except HTTPException as problem:
            yield event(described(problem))
        yield "data: [DONE]\n\n"


class Server:
    """What is served: a model's name, its words, its engine, and how its tokens are drawn where a request does not say."""

    def __init__(self, name, text, engine, sampling):
        self.name, self.text, self.engine, self.sampling = name, text, engine, sampling
        self.ends, self.worker = text.ends(engine.model.config), Worker(engine)

    def app(self):
        """The application, for any server that speaks ASGI."""

        @asynccontextmanager
        async def lifespan(_):
            threading.Thread(target=self.worker.run, args=(asyncio.get_running_loop(),), daemon=True).start()
            yield

        async def models(_):
            own = {"id": self.name, "object": "model", "created": 0, "owned_by": "moekit"}
            return JSONResponse({"object": "list", "data": [own]})

        routes = [
            Route("/v1/models", models),
            Route("/v1/completions", partial(self.answer, chat=False), methods=["POST"]),
            Route("/v1/chat/completions", partial(self.answer, chat=True), methods=["POST"]),
        ]
        return Starlette(routes=routes, lifespan=lifespan, exception_handlers={MoekitError: refused, HTTPException: refused})

    async def answer(self, request, chat):
        """The response to a request; its sequence is cancelled where the client hangs up first."""
        body = await self.body(request)
        ids = self.text.encode_chat(messages(body)) if chat else self.prompt(body)
        stream, streamed, counted = Stream(self.text, stops(body)), bool(body.get("stream")), counts(body)
        answer = Answer(self.name, stream, len(ids), chat, streamed)
        tokens = self.worker.add(ids, **self.options(body, ids, chat))
        if streamed:
            return StreamingResponse(answer.events(tokens, counted), media_type="text/event-stream")
        whole, gone = asyncio.create_task(answer.whole(tokens)), asyncio.create_task(request.receive())
        await asyncio.wait((whole, gone), return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if whole.done():
            return await whole
        whole.cancel()
        return Response(status_code=499)  # which nobody reads

    async def body(self, request):
        try:
            body = await request.json()
        except (ValueError, RecursionError) as problem:
            raise HTTPException(400, f"the body is no JSON: {problem}") from None
        if not isinstance(body, dict):
            raise HTTPException(400, "the body must be a JSON object")
        if body.get("model") != self.name:
            raise HTTPException(404, f"there is no model {body.get('model')!r} here, only {self.name!r}")
        for name in UNSUPPORTED:
            if body.get(name) and (name, body[name]) != ("n", 1):
                raise HTTPException(400, f"{name} is not supported here; leave it out")
        return body

    def prompt(self, body):
        given = body.get("prompt")
        if not isinstance(given, (str, list)):
            raise HTTPException(400, "prompt must be a string or a list of token ids")
        return self.text.encode(given) if isinstance(given, str) else given

    def options(self, body, ids, chat):
        """What `Engine.add` takes beside a prompt; it refuses what it cannot do."""
        most, seed = body.get("max_completion_tokens") or body.get("max_tokens"), body.get("seed")
        if most is None:
            most = max(1, self.engine.length - len(ids)) if chat else COMPLETION
        seed = secrets.randbits(32) if seed is None else seed
        given = {name: body[name] for name in ("temperature", "top_p", "top_k") if body.get(name) is not None}
        sampling = replace(self.sampling, **given, seed=seed % 2**32 if isinstance(seed, int) else seed)
        return {"max_new_tokens": most, "eos": self.ends, "sampling": sampling}


def messages(body):
    """The messages of a chat; of a content in parts, the texts put together."""
    given, found = body.get("messages"), []
    for message in given if isinstance(given, list) else [None]:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            content = "".join(str(part.get("text")) for part in content)
        if not (isinstance(content, str) and isinstance(message.get("role"), str)):
            raise HTTPException(400, "messages must be a list, each with a role and a content that is text")
        found.append({**message, "content": content})
    return found


def stops(body):
    given = body.get("stop") or []
    found = [given] if isinstance(given, str) else given
    if not (isinstance(found, list) and all(isinstance(stop, str) for stop in found)):
        raise HTTPException(400, "stop must be a string or a list of strings")
    return found


def counts(body):
    """Whether a stream is to end with its numbers of tokens."""
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise HTTPException(400, "stream_options must be an object")
    return bool(options.get("include_usage"))


def event(said):
    return f"data: {json.dumps(said)}\n\n"


def described(problem):
    """An error in OpenAI's shape."""
    status = getattr(problem, "status_code", 400)
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": getattr(problem, "detail", str(problem)), "type": kind, "param": None, "code": None}}


async def refused(_, problem):
    status = 429 if isinstance(problem, FullError) else getattr(problem, "status_code", 400)
    return JSONResponse(described(problem), status)


def main():
    """Load a checkpoint, compile, and serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--host", default="127.0.0.1", help="whoever reaches it may use it")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--tp", type=int, default=1, help="devices to share the model")
    parser.add_argument("--slots", type=int, default=16, help="sequences at once")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence, at most")
    args = parser.parse_args()
    mesh = jax.sharding.Mesh(np.array(jax.devices()[: args.tp]), ("tp",))
    model = load(args.checkpoint, mesh, room=Room(args.slots + 1, args.length, piece=256))
    kernels = None if jax.default_backend() == "gpu" else "xla"
    channel, how = channel_of(mesh, args.slots, model.config.hidden_size, kernels)
    print(f"what adds up over ranks in a step: {how}", file=sys.stderr)
    engine = Engine(model, slots=args.slots, length=args.length, kernels=kernels, channel=channel)
    engine.warmup()
    server = Server(args.checkpoint.resolve().name, Text(args.checkpoint), engine, sampling_of(args.checkpoint))
    uvicorn.run(server.app(), host=args.host, port=args.port)


if __name__ == "__main__":
    main()

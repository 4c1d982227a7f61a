"""What does `kilofed serve` add to the decoder, and do 32 streaming clients at once get what each gets alone?

Overhead: one client, one answer at a time, over HTTP, streamed and whole, against the decoder called directly in the
same process and against `model.generate`; the four alternate, the ratios quoted are medians. The client is a process
of its own, as clients are.

Crowd: clients in processes of their own stream answers at temperature 0 without pause; each answer is compared with
the one that the decoder gave before any client came. Memory is the server process's resident set.

    python benchmarks/serving/serve.py [--quick] [--json] [--seconds 120] [--clients 32] [--model builtin:large]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

if multiprocessing.parent_process() is None:
    # Clients are processes that read this file too, and need none of it.
    import psutil
    import torch
    from transformers import GenerationConfig

    from kilofed.generation.decoding import ModelGenerator, Sampling
    from kilofed.generation.detokenizer import detokenize
    from kilofed.models.loading import quiet
    from kilofed.serving.model import ServedModel, open_served_model
    from kilofed.serving.requests import Limits
    from kilofed.serving.server import running

TOKEN = "a-token-for-benchmarks"
PROMPTS = [
    "The town of", "The company", "def read(path):", "The river", "import os\n", "Who runs the", "Returns the",
    "The capital of",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--model", default="builtin:large")
    parser.add_argument("--seconds", type=float, default=0, help="of the crowd (default 120, quick 8)")
    parser.add_argument("--clients", type=int, default=0, help="default 32, quick 8")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clients = options.clients or (8 if options.quick else 32)
    served = open_served_model(options.model)
    limits = Limits(max_active=8, max_waiting=clients)
    with running(served, token=TOKEN, limits=limits) as url:
        found = {
            "model": options.model,
            "threads": options.threads,
            "cores": psutil.cpu_count(),
            "load": round(psutil.getloadavg()[0], 2),
            "overhead": overhead(served, url, pairs=3 if options.quick else 31, tokens=32 if options.quick else 64),
            "crowd": crowd(served, url, clients, options.seconds or (8 if options.quick else 120)),
        }
    print(json.dumps(found) if options.json else as_text(found))


def as_text(found: dict) -> str:
    one, many = found["overhead"], found["crowd"]
    lines = [
        f"{found['model']}, {found['threads']} torch thread(s), {found['cores']} cores, load {found['load']}",
        f"one stream of {one['tokens']} tokens, median of {one['pairs']} interleaved rounds:",
    ]
    for name in ("generate", "decoder", "whole", "stream"):
        processor = f"{one['cpu_ms_per_token'][name]:.2f} ms of this process's processor time"
        lines.append(f"  {name:9} {one['ms_per_token'][name]:6.2f} ms per token, {processor}")
    for name, ratio in one["ratio"].items():
        lines.append(f"  {name:18} {ratio['median']:.3f}  ({ratio['min']:.3f} to {ratio['max']:.3f})")
    lines += [
        f"{many['clients']} streaming clients for {many['seconds']:.0f} s: {many['answers']} answers, "
        f"{many['errors']} errors, {many['different']} different from the single-stream answer",
        f"  {many['tokens_per_second']:.0f} tokens per second in all",
        f"  resident memory {many['rss_mb'][0]:.0f} MB at 1/4, {many['rss_mb'][1]:.0f} MB at 1/2, "
        f"{many['rss_mb'][2]:.0f} MB at the end",
    ]
    return "\n".join(lines)


def overhead(served: ServedModel, url: str, pairs: int, tokens: int) -> dict:
    """Milliseconds per token of four ways to one answer, and the ratios of each round."""
    ids = served.codec.encode(PROMPTS[0])
    # Without end tokens all four make exactly as many tokens.
    endless = ModelGenerator(served.generator.model, ())
    wanted = list(endless.generate_tokens(ids, Sampling(tokens)))
    config = GenerationConfig(max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    model = served.generator.model
    prompt = torch.tensor([ids])

    def generate() -> None:
        with torch.inference_mode(), quiet():
            out = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
        assert out[0, len(ids) :].tolist() == [token.id for token in wanted]

    def decoder() -> None:
        assert [token.id for token in endless.generate_tokens(ids, Sampling(tokens))] == [token.id for token in wanted]

    served.generator.end_ids, kept = frozenset(), served.generator.end_ids
    model.generation_config.eos_token_id = None
    with Client(url, served.name, ids, tokens) as client:
        ways: dict[str, Callable[[], object]] = {
            "generate": generate,
            "decoder": decoder,
            "whole": lambda: client.ask("whole"),
            "stream": lambda: client.ask("stream"),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        cpu: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(pairs + 1):
            for name, way in ways.items():
                began, cpu_began = time.perf_counter(), time.process_time()
                way()
                if number:  # The first round warms up.
                    seconds[name].append(time.perf_counter() - began)
                    cpu[name].append(time.process_time() - cpu_began)
    served.generator.end_ids, model.generation_config.eos_token_id = kept, next(iter(kept), None)
    ratios = {}
    for name, other in (("whole", "decoder"), ("stream", "decoder"), ("whole", "generate"), ("stream", "generate")):
        each = [a / b for a, b in zip(seconds[name], seconds[other], strict=True)]
        ratios[f"{name} / {other}"] = {"median": statistics.median(each), "min": min(each), "max": max(each)}
    per_token = {name: statistics.median(values) * 1000 / tokens for name, values in seconds.items()}
    of_server = {name: statistics.median(values) * 1000 / tokens for name, values in cpu.items()}
    return {
        "pairs": pairs,
        "tokens": tokens,
        "ms_per_token": per_token,
        "cpu_ms_per_token": of_server,
        "ratio": ratios,
    }


class Client:
    """A process that asks when it is told to."""

    def __init__(self, url: str, model: str, ids: list[int], tokens: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=answer_for, args=(there, url, model, ids, tokens), daemon=True)
        self._process.start()
        assert self._here.recv() == "ready"

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._here.send("end")
        self._process.join()

    def ask(self, how: str) -> None:
        """One answer, `whole` or by `stream`."""
        self._here.send(how)
        assert self._here.recv() == "done"


def answer_for(pipe: Connection, url: str, model: str, ids: list[int], tokens: int) -> None:
    """What a `Client` process does: ask as the pipe says, until it says end."""
    import openai

    with openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0) as api:
        asked = {"model": model, "prompt": ids, "max_tokens": tokens, "temperature": 0}
        pipe.send("ready")
        while (how := pipe.recv()) != "end":
            if how == "whole":
                assert api.completions.create(**asked).usage.completion_tokens == tokens
            else:
                assert list(api.completions.create(**asked, stream=True))[-1].choices[0].finish_reason == "length"
            pipe.send("done")


def crowd(served: ServedModel, url: str, num_clients: int, seconds: float) -> dict:
    """Clients that stream answers at temperature 0 for `seconds`, each compared with what the decoder says alone."""
    asks = [(prompt, 16 + 8 * number) for number, prompt in enumerate(PROMPTS)]
    alone = [whole_text(served, prompt, tokens) for prompt, tokens in asks]
    context = multiprocessing.get_context("spawn")
    reports = context.Queue()
    ready = context.Barrier(3)
    processes: list[BaseProcess] = [
        context.Process(target=drive, args=(url, served.name, asks, alone, half, seconds, ready, reports), daemon=True)
        for half in split(num_clients, 2)
    ]
    for process in processes:
        process.start()
    ready.wait(300)
    rss, began = [], time.perf_counter()
    for share in (0.25, 0.5, 1.0):
        time.sleep(max(0.0, share * seconds - (time.perf_counter() - began)))
        rss.append(psutil.Process().memory_info().rss / 1e6)
    told = [reports.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
    errors = [error for one in told for error in one["errors"]]
    return {
        "clients": num_clients,
        "seconds": seconds,
        "answers": sum(one["answers"] for one in told),
        "different": sum(one["different"] for one in told),
        "errors": len(errors),
        "first_errors": errors[:3],
        "tokens_per_second": sum(one["tokens"] for one in told) / max(one["seconds"] for one in told),
        "rss_mb": rss,
    }


def split(count: int, parts: int) -> list[int]:
    """`count` in nearly equal parts."""
    return [count // parts + (number < count % parts) for number in range(parts)]


def whole_text(served: ServedModel, prompt: str, tokens: int) -> str:
    """The answer at temperature 0 without a server."""
    stream = served.generator.generate_tokens(served.codec.encode(prompt), Sampling(tokens))
    return "".join(piece.text for piece in detokenize(stream, served.codec, end_ids=served.generator.end_ids))


def drive(url, model, asks, alone, num_clients, seconds, ready, reports) -> None:  # type: ignore[no-untyped-def]
    """A process of `num_clients` clients; each streams one answer after the other until the time is over."""
    import asyncio

    import openai

    async def client(api: openai.AsyncOpenAI, number: int, until: float, found: dict) -> None:
        while True:
            which = number % len(asks)
            prompt, tokens = asks[which]
            asked = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
            try:
                text, end = "", None
                async with await api.completions.create(**asked, stream_options={"include_usage": True}) as stream:
                    async for chunk in stream:
                        if time.perf_counter() > until:
                            return  # In the middle of an answer, as clients do.
                        for choice in chunk.choices:
                            text, end = text + choice.text, choice.finish_reason or end
                        found["tokens"] += chunk.usage.completion_tokens if chunk.usage else 0
            except openai.APIError as error:
                found["errors"].append(str(error))
                continue
            found["answers"] += 1
            found["different"] += text != alone[which] or end is None
            number += 1

    async def everyone() -> dict:
        found: dict = {"answers": 0, "different": 0, "tokens": 0, "errors": []}
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0, timeout=600) as api:
            await api.models.list()
            ready.wait(300)
            began = time.perf_counter()
            await asyncio.gather(*(client(api, n, began + seconds, found) for n in range(num_clients)))
            return {**found, "seconds": time.perf_counter() - began}

    reports.put(asyncio.run(everyone()))


if __name__ == "__main__":
    main()

"""Commands that answer with a model: chat, serve."""

import argparse

from kilofed.errors import ServeError
from kilofed.serving.chat import converse


def chat(options: argparse.Namespace) -> None:
    """Answer lines of the terminal."""
    converse(options.path, max_new_tokens=options.max_new_tokens)


def serve(options: argparse.Namespace) -> None:
    """Serve a model until Ctrl-C. Raises ServeError: the extra `serve` is not installed."""
    try:
        from kilofed.serving import server
        from kilofed.serving.requests import Limits
    except ModuleNotFoundError as error:
        raise ServeError(f"{error.name} is missing: pip install 'kilofed[serve]'") from error

    limits = Limits(
        options.max_active,
        options.max_waiting,
        options.max_body,
        options.timeout,
        options.max_choices,
        options.max_logprobs,
    )
    config = server.ServerConfig(options.host, options.port, options.token_file, not options.no_token)
    opened = server.open_model(
        options.path, name=options.name, template=options.template, device=options.device, threads=options.threads
    )
    server.serve(opened, config, limits)

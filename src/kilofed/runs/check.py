"""Preflight: what would go wrong in a run, found before anything is trained; one line per finding, with what to do."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from kilofed.config.recipe import MethodSpec, PrivacySpec, Recipe
from kilofed.errors import KilofedError
from kilofed.federation.method import load_method
from kilofed.privacy.mechanisms import load_mechanism
from kilofed.runs import check_data, check_model
from kilofed.runs.look import Finding, Look

PARTS: dict[str, Callable[[Look], Iterator[Finding]]] = {
    "device": check_model.device,
    "data": check_data.data,
    "clients": check_data.clients,
    "passes": check_data.passes,
    "adapter": check_model.adapter,
    "tokeniser": check_data.tokeniser,
    "template": check_data.template,
    "loss": check_data.loss,
    "truncation": check_data.truncation,
    "models": check_model.models,
    "leaks": check_data.leaks,
    "memory": check_model.memory,
    "disk": check_model.disk,
    "bytes": check_model.messages,
    "weights": check_model.weights,
    "method": check_model.method,
}


def check(recipe: Recipe) -> list[Finding]:
    """Look at the recipe's method, machine, data, tokeniser and model; nothing is trained and nothing is written."""
    findings: dict[str, Finding] = {}  # By text: one broken thing is said once, however many looks meet it.

    def found(one: Finding) -> None:
        findings.setdefault(one.text, one)

    try:
        load_method(recipe.method)
    except KilofedError as error:
        found(Finding("bad", "method", _sentence(error)))
        recipe = replace(recipe, method=MethodSpec())
    try:
        load_mechanism(recipe.privacy)
    except KilofedError as error:
        found(Finding("bad", "privacy", _sentence(error)))
        recipe = replace(recipe, privacy=PrivacySpec())
    skipped: list[str] = []
    look = Look(recipe, warn=skipped.append)
    for name, part in PARTS.items():
        try:
            for finding in part(look):
                found(finding)
        except KilofedError as error:
            found(Finding("bad", name, _sentence(error)))
    for text in skipped:
        found(Finding("warn", "data", text))
    return list(findings.values())


def _sentence(error: KilofedError) -> str:
    return " ".join(str(error).split())

"""Helpers for what `kilofed check` finds."""

from kilofed.runs.look import Finding

Row = dict[str, object]


def asked(number: int, answer: str = "yes", **more: object) -> Row:
    return {"client": f"site {number % 2}", "instruction": f"say {number}", "response": answer, **more}


def of(findings: list[Finding], level: str) -> dict[str, str]:
    return {finding.name: finding.text for finding in findings if finding.level == level}

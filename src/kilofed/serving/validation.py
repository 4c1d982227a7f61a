"""The parts of a request that JSON leaves open: prompts, messages and stop strings, refused with the field named."""

from collections.abc import Mapping, Sequence

from pydantic import JsonValue

from kilofed.serving.model import ServedModel

MOST_STOPS = 16
LONGEST_STOP = 200
"""Characters."""
LONGEST_MESSAGE = 1000
"""Characters of what is said to a client, which may quote what it sent."""


class Refusal(Exception):
    """A request that is not answered, and why; becomes an error in OpenAI's format."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        message, param = message[:LONGEST_MESSAGE], param and param[:LONGEST_MESSAGE]
        super().__init__(message)
        self.message, self.param, self.code, self.status, self.kind = message, param, code, status, kind
        self.headers = dict(headers or {})

    def body(self) -> dict[str, object]:
        """What the client reads."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def check_name(name: str, served: ServedModel) -> None:
    """Raise Refusal unless `name` is what is served."""
    if name != served.name:
        raise Refusal(
            f"there is no model {name[:100]!r} here, only {served.name!r}",
            param="model",
            code="model_not_found",
            status=404,
        )


def read_stops(stop: JsonValue) -> tuple[str, ...]:
    """Strings that end an answer. Raises Refusal."""
    strings = [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else None if stop else []
    if strings is None or len(strings) > MOST_STOPS:
        raise Refusal(f"stop must be a string or a list of at most {MOST_STOPS} strings", param="stop")
    found = tuple(one for one in strings if isinstance(one, str) and 0 < len(one) <= LONGEST_STOP)
    if len(found) < len(strings):
        raise Refusal(f"each stop string must be text of 1 to {LONGEST_STOP} characters", param="stop")
    return found


def num_prompts(prompt: JsonValue) -> int:
    """How many prompts `read_prompts` gives, told without encoding them; 1 for what it refuses."""
    return len(prompt) if isinstance(prompt, list) and prompt and not _is_id(prompt[0]) else 1


def read_prompts(prompt: JsonValue, served: ServedModel) -> list[list[int]]:
    """Token ids of each prompt, which may be a text, token ids, or a list of either."""
    if isinstance(prompt, str):
        return [served.codec.encode(prompt)]
    if not isinstance(prompt, list) or not prompt:
        raise Refusal("prompt must be a text, a list of token ids, or a list of either", param="prompt")
    if all(_is_id(one) for one in prompt):
        return [_ids(prompt, served)]
    texts = [one for one in prompt if isinstance(one, str)]
    if len(texts) == len(prompt):
        return [served.codec.encode(text) for text in texts]
    lists = [one for one in prompt if isinstance(one, list)]
    if len(lists) == len(prompt):
        return [_ids(one, served) for one in lists]
    raise Refusal("prompt mixes texts, token ids or something else in one list", param="prompt")


def _is_id(value: JsonValue) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _ids(values: Sequence[JsonValue], served: ServedModel) -> list[int]:
    ids = [value for value in values if isinstance(value, int) and _is_id(value)]
    if len(ids) < len(values):
        raise Refusal("prompt has a list of token ids with something else in it", param="prompt")
    if outside := [i for i in ids if not 0 <= i < served.codec.num_tokens]:
        raise Refusal(
            f"prompt has the token id {outside[0]}; this model knows 0 to {served.codec.num_tokens - 1}",
            param="prompt",
        )
    return ids


def read_messages(messages: JsonValue) -> list[dict[str, str]]:
    """Turns of system, user and assistant; the last is the user's."""
    if not isinstance(messages, list) or not messages:
        raise Refusal("messages must be a list of at least one {role, content}", param="messages")
    turns = [_message(message, f"messages[{number}]") for number, message in enumerate(messages)]
    if turns[-1]["role"] != "user":
        raise Refusal(
            f"the last message is the {turns[-1]['role']}'s; it must be the user's",
            param=f"messages[{len(turns) - 1}].role",
        )
    return turns


def _message(message: JsonValue, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise Refusal(f"{where} must be an object with role and content", param=where)
    if unknown := sorted(message.keys() - {"role", "content", "name", "refusal"}):
        raise Refusal(f"{where}.{unknown[0]} is not known here", param=f"{where}.{unknown[0]}")
    role = message.get("role")
    if role not in ("system", "developer", "user", "assistant"):
        raise Refusal(
            f"{where}.role is {str(role)[:40]!r}; expected system, developer, user or assistant", param=f"{where}.role"
        )
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}.content[{number}]") for number, part in enumerate(content))
    if not isinstance(content, str):
        raise Refusal(f"{where}.content must be text or a list of text parts", param=f"{where}.content")
    return {"role": "system" if role == "developer" else str(role), "content": content}


def _part(part: JsonValue, where: str) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise Refusal(f"{where} must be {{type: text, text}}; nothing but text is read here", param=where)
    return text

"""A large model on the other side of a real HTTP connection: the same proxy, from what the API tells."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.conftest import byte_tokenizer
from tests.loopback import Loopback, served, status
from tests.tiny_models import adapted, model, padded
from torch import Tensor

from kilofed.data.examples import Example
from kilofed.errors import BudgetSpent, ModelError, RemoteError
from kilofed.generation.decoding import Sampling
from kilofed.generation.detokenizer import TextCodec
from kilofed.models.training import collate_tokens, token_losses
from kilofed.proxy.api_model import RemoteModel
from kilofed.proxy.combination import Difference, Mix
from kilofed.proxy.model import ProxyModel
from kilofed.proxy.spec import LargeSpec

V = 259
LARGE = model(0, width=24, vocabulary=V)
SMALL = adapted(1, model(1, vocabulary=V))
IDS, MASK = padded([[1, 5, 9, 30, 7], [1, 8], [1, 22, 3, 4]])
PROMPT = [1, 70, 71, 72]


@pytest.fixture
def server() -> Iterator[Loopback]:
    with served(LARGE, TextCodec(byte_tokenizer()).name) as running:
        yield running


def remote(server: Loopback, folder: Path | None = None, **fields: object) -> RemoteModel:
    spec = LargeSpec(server.url, name="large", first_wait=0.001, **{"top_k": V, **fields})  # type: ignore[arg-type]
    return RemoteModel(spec, byte_tokenizer(), folder)


@torch.no_grad()
def test_all_scores_over_http_are_the_local_model(server: Loopback) -> None:
    large = remote(server)
    near, far = ProxyModel(LARGE, SMALL, rule=Difference(0.6)), ProxyModel(large, SMALL, rule=Difference(0.6))
    seen = MASK.bool()
    close(far(IDS, MASK).logits[seen], near(IDS, MASK).logits[seen])
    examples = [Example([1, 40, 50, 60], [-100, -100, 50, 60], [], []), Example([1, 70], [-100, 70], [], [])]
    torch.testing.assert_close(
        token_losses(far, collate_tokens(examples))[0],
        token_losses(near, collate_tokens(examples))[0],
        rtol=0,
        atol=1e-4,
    )
    large.close()


def close(far: Tensor, near: Tensor) -> None:
    """Equal distributions."""
    torch.testing.assert_close(far.log_softmax(-1), near.log_softmax(-1), rtol=0, atol=1e-4)


@torch.no_grad()
def test_generate_with_left_padding_over_http_is_the_local_answer(server: Loopback) -> None:
    large = remote(server)
    ways = {"max_new_tokens": 6, "do_sample": False}
    near = ProxyModel(LARGE, SMALL).generate(input_ids=IDS, attention_mask=MASK, **ways)
    assert torch.equal(ProxyModel(large, SMALL).generate(input_ids=IDS, attention_mask=MASK, **ways), near)
    assert all(body["echo"] is False for body in server.bodies[1:])
    large.close()


@pytest.mark.parametrize("scoring", ["echo", "steps"])
def test_speech_over_http_is_the_local_answer(server: Loopback, scoring: str) -> None:
    large = remote(server, scoring=scoring)
    sampling = Sampling(max_new_tokens=12)
    near = [token.id for token in ProxyModel(LARGE, SMALL, rule=Difference(0.5)).generate_tokens(PROMPT, sampling)]
    far = ProxyModel(large, SMALL, rule=Difference(0.5))
    assert [token.id for token in far.generate_tokens(PROMPT, sampling)] == near
    drafted = any(body["echo"] for body in server.bodies)
    assert drafted == (scoring == "echo")
    if scoring == "steps":
        assert len(server.bodies) == 12
    large.close()


def test_drafts_save_requests(server: Loopback) -> None:
    base = model(1, vocabulary=V)
    server.model = base  # The large model is the small base, so every draft stands.
    large = remote(server)
    assert len(list(ProxyModel(large, SMALL).generate_tokens(PROMPT, Sampling(max_new_tokens=20)))) == 20
    assert len(server.bodies) < 10
    large.close()


@torch.no_grad()
def test_steps_and_echo_tell_the_same(server: Loopback) -> None:
    one, other = remote(server), remote(server, scoring="steps", batch_size=3)
    first, second = (ProxyModel(large, SMALL)(IDS, MASK).logits for large in (one, other))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-4)
    assert max(len(body["prompt"]) for body in server.bodies[1:]) == 3  # type: ignore[arg-type]
    one.close()
    other.close()


@torch.no_grad()
def test_of_few_scores_the_seen_are_exact_and_the_rest_is_shared(server: Loopback) -> None:
    large = remote(server, top_k=5)
    far = ProxyModel(large, SMALL, rule=Difference(0.0))(IDS[:1]).logits
    near = LARGE(IDS[:1]).logits.log_softmax(-1)
    top = near.topk(5).indices
    torch.testing.assert_close(far.gather(-1, top), near.gather(-1, top), rtol=0, atol=1e-4)
    torch.testing.assert_close(far.exp().sum(-1), torch.ones(1, 5))
    large.close()


@torch.no_grad()
def test_tokens_by_text_are_tokens_by_id_where_texts_are_unique(server: Loopback) -> None:
    by_id, by_text = remote(server, top_k=20), remote(server, top_k=20, names="text")
    one, other = (ProxyModel(large, SMALL)(IDS[:1]).logits for large in (by_id, by_text))
    torch.testing.assert_close(one, other)
    by_id.close()
    by_text.close()


@torch.no_grad()
def test_a_score_is_paid_for_once(server: Loopback, tmp_path: Path) -> None:
    for _ in range(2):
        large = remote(server, tmp_path)
        logits = ProxyModel(large, SMALL)(IDS, MASK).logits
        large.close()
    assert len(server.bodies) == 1
    large = remote(server, tmp_path)
    close(ProxyModel(large, SMALL)(IDS[:, :3], MASK[:, :3]).logits[0], logits[0, :3])  # A prefix is known too.
    large.close()
    assert len(server.bodies) == 1
    assert len((tmp_path / "remote.jsonl").read_text().splitlines()) == 1


@torch.no_grad()
def test_a_spent_budget_keeps_what_was_answered_and_a_larger_one_goes_on(server: Loopback, tmp_path: Path) -> None:
    large = remote(server, tmp_path, batch_size=1, max_requests=2)
    with pytest.raises(BudgetSpent):
        ProxyModel(large, SMALL)(IDS, MASK)
    large.close()
    large = remote(server, tmp_path, batch_size=1, max_requests=3)
    logits = ProxyModel(large, SMALL)(IDS, MASK).logits
    large.close()
    close(logits[MASK.bool()], ProxyModel(LARGE, SMALL)(IDS, MASK).logits[MASK.bool()])
    assert len(server.bodies) == 3


def test_the_key_is_not_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILOFED_API_KEY", "sk-secret")
    with served(LARGE, key="sk-secret") as server:
        server.faults = [status(500)]
        large = remote(server, tmp_path)
        list(ProxyModel(large, SMALL).generate_tokens(PROMPT, Sampling(max_new_tokens=3)))
        written = [path.read_bytes() for path in tmp_path.iterdir()]
        large.close()
    written += [path.read_bytes() for path in tmp_path.iterdir()]
    assert len(written) >= 4
    assert not any(b"sk-secret" in content for content in written)


@torch.no_grad()
def test_rules_without_a_base_share_the_rest_as_the_tuned_model_does(server: Loopback) -> None:
    large = remote(server, top_k=5)
    far = ProxyModel(large, model(1, vocabulary=V), rule=Mix(0.5))(IDS[:1]).logits
    torch.testing.assert_close(far.exp().sum(-1), torch.ones(1, 5))
    large.close()


def test_an_api_that_names_tokens_by_text_is_told_apart(server: Loopback) -> None:
    def by_text(handler: object) -> None:
        answer = {"choices": [{"index": 0, "logprobs": {"top_logprobs": [{"a": -0.1}]}}]}
        handler.answer(200, answer)  # type: ignore[attr-defined]

    server.faults = [by_text]
    large = remote(server)
    with pytest.raises(RemoteError, match=r"names tokens by text \('a'\), not as token_id: set names to text"):
        large.top_logprobs([[1, 2]], [[2]])
    large.close()


@pytest.mark.parametrize(
    ("tops", "said"),
    [
        ([{"token_id:900": -0.1}], "names token 900, and the small model's tokeniser has 259"),
        ([None], "left log-probabilities out"),
        ([{"token_id:3": None}], "does not know, such as 'token_id:3'"),
    ],
)
def test_another_vocabulary_or_an_empty_position_is_refused(server: Loopback, tops: object, said: str) -> None:
    content = json.dumps({"choices": [{"index": 0, "logprobs": {"top_logprobs": tops}}]}).encode()
    server.faults = [lambda handler: handler.answer(200, content)]  # type: ignore[attr-defined]
    large = remote(server)
    with pytest.raises(RemoteError, match=said):
        large.top_logprobs([[1, 2]], [[2]])
    large.close()


def test_a_token_told_beyond_the_likeliest_is_not_kept(server: Loopback) -> None:
    tops = [{"token_id:3": -5.0, "token_id:4": -0.1, "token_id:5": -0.2}]
    content = json.dumps({"choices": [{"index": 0, "logprobs": {"top_logprobs": tops}}]}).encode()
    server.faults = [lambda handler: handler.answer(200, content)]  # type: ignore[attr-defined]
    large = remote(server, top_k=2)
    assert large.top_logprobs([[1, 2]], [[2]])[0][2].ids.tolist() == [4, 5]
    large.close()


def test_an_echo_of_another_length_is_refused(server: Loopback) -> None:
    content = json.dumps({"choices": [{"index": 0, "logprobs": {"top_logprobs": [None, {"token_id:3": -0.1}]}}]})
    server.faults = [lambda handler: handler.answer(200, content.encode())]  # type: ignore[attr-defined]
    large = remote(server)
    with pytest.raises(RemoteError, match="was sent 3 tokens to echo and scored 1"):
        large.top_logprobs([[1, 2, 3]], [[2, 3]])
    large.close()


def test_a_prompt_longer_than_the_remote_context_is_refused_before_it_is_sent(server: Loopback) -> None:
    large = RemoteModel(LargeSpec(server.url, name="large", context=4), byte_tokenizer())
    with pytest.raises(ModelError, match="4 tokens are more than the 3"):
        ProxyModel(large, SMALL)(torch.tensor([PROMPT]))
    assert not server.bodies
    large.close()


def test_prompts_as_text_tell_the_same(server: Loopback) -> None:
    tokenizer = byte_tokenizer()
    server.read = lambda text: list(tokenizer.encode(text, add_special_tokens=False))
    large, texted = remote(server, top_k=3), remote(server, top_k=3, prompts="text")
    (by_id,), (by_text,) = large.top_logprobs([PROMPT], [[2, 4]]), texted.top_logprobs([PROMPT], [[2, 4]])
    assert isinstance(server.bodies[-1]["prompt"][0], str)  # type: ignore[index]
    assert by_id[4].ids.tolist() == by_text[4].ids.tolist()
    large.close()
    texted.close()


def test_a_prompt_that_text_would_change_is_refused(server: Loopback) -> None:
    large = remote(server, prompts="text")
    half = byte_tokenizer().convert_tokens_to_ids("\u00c3")  # The first byte of a character of two.
    with pytest.raises(ModelError, match="does not survive as text"):
        large.top_logprobs([[half, 70]], [[2]])
    assert not server.bodies
    large.close()

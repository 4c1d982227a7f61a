"""What is served, and what becomes of a talk's messages."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kilofed
from kilofed.config.recipe import AdapterSpec, ModelSpec, Recipe
from kilofed.data.examples import TEMPLATES
from kilofed.errors import DataError, ModelError, RunError
from kilofed.generation.decoding import ModelGenerator, Sampling, TokenGenerator
from kilofed.models import loading
from kilofed.proxy.model import ProxyModel
from kilofed.runs import export
from kilofed.serving.model import open_served_model

CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two?"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_rows: Path) -> Path:
    """A finished run with the template alpaca."""
    overrides = {
        "rounds": 1, "model.path": str(tiny_model), "adapter.rank": 2, "data.source": str(tiny_rows),
        "data.max_length": 200, "data.options": {}, "train.steps": 2, "train.lr": 0.1, "evaluate.generate": 0,
        "evaluate.baselines": [], "data.template": "alpaca",
    }  # fmt: skip
    return kilofed.run("tiny", overrides, out=tmp_path_factory.mktemp("run") / "tuned").folder


@pytest.fixture
def chatty(tmp_path: Path, tiny_model: Path) -> Path:
    """The tiny model with a chat template."""
    for path in tiny_model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": CHAT}))
    return tmp_path


def test_a_run_speaks_as_its_delivered_model_with_its_training_template(folder: Path) -> None:
    served = open_served_model(str(folder))
    assert served.name == "tuned"
    assert "'alpaca'" in served.prompt_note
    model, tokenizer = kilofed.resume(folder).model()
    wanted = TEMPLATES["alpaca"][1].format(instruction="two?")
    ids = [1, *tokenizer.encode(wanted, add_special_tokens=False)]
    assert served.conversation_ids(TALK[-1:]) == ids
    said = [token.id for token in served.generator.generate_tokens(ids[-40:], Sampling(10))]
    assert said == [
        token.id for token in ModelGenerator(model, served.generator.end_ids).generate_tokens(ids[-40:], Sampling(10))
    ]


def test_a_system_text_is_the_templates_context_and_earlier_turns_are_not_seen(folder: Path) -> None:
    served = open_served_model(str(folder))
    wanted = TEMPLATES["alpaca"][0].format(instruction="two?", context="be brief")
    assert served.conversation_ids(TALK) == [1, *served.codec.tokenizer.encode(wanted, add_special_tokens=False)]
    assert not served.takes_conversations


def test_a_merged_model_is_the_run_it_came_from(folder: Path, tmp_path: Path) -> None:
    merged = open_served_model(str(export.merged(folder, tmp_path / "merged")), template="alpaca")
    tuned = open_served_model(str(folder))
    ids = merged.conversation_ids(TALK[-1:])[-60:]
    assert merged.conversation_ids(TALK) == tuned.conversation_ids(TALK)
    for one, other in zip(merged.generator.score(ids)[1:], tuned.generator.score(ids)[1:], strict=True):
        assert one is not None
        assert other is not None
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_a_chat_template_sees_the_whole_talk(chatty: Path) -> None:
    served = open_served_model(str(chatty))
    assert served.takes_conversations
    text = "<|system|>be brief\n<|user|>one?\n<|assistant|>1\n<|user|>two?\n<|assistant|>"
    assert served.codec.tokenizer.decode(served.conversation_ids(TALK)) == f"<bos>{text}"
    assert not open_served_model(str(chatty), template="question").takes_conversations


def test_a_long_talk_is_not_cut(folder: Path) -> None:
    assert len(open_served_model(str(folder)).conversation_ids([{"role": "user", "content": "a" * 5000}])) > 5000


def test_a_model_trained_on_running_text_goes_on_with_the_message(folder: Path) -> None:
    served = open_served_model(str(folder))
    spec = replace(served.renderer.spec, template="")
    text = replace(served, renderer=type(served.renderer)(served.codec.tokenizer, spec, "text"))
    assert text.conversation_ids(TALK[-1:]) == text.codec.encode("two?")
    with pytest.raises(DataError, match="no place for a system text"):
        text.conversation_ids(TALK)


def test_the_layout_of_the_rows_is_kept_in_the_run_folder(folder: Path) -> None:
    assert json.loads((folder / "run.json").read_text())["layout"] == "response"


def test_what_cannot_be_served_is_refused(tmp_path: Path, folder: Path, tiny_recipe: Recipe) -> None:
    with pytest.raises(RunError, match="neither a run folder"):
        open_served_model(str(tmp_path))
    with pytest.raises(RunError, match="neither a run folder"):
        open_served_model(str(tmp_path / "none"))
    with pytest.raises(RunError, match="adapter without its base model"):
        open_served_model(str(folder / "adapter"))
    with pytest.raises(ModelError, match="builtin:huge does not exist"):
        open_served_model("builtin:huge")
    with pytest.raises(DataError, match="alpacca"):
        open_served_model(str(folder), template="alpacca")
    with pytest.raises(ModelError, match="device"):
        open_served_model(str(folder), device="abacus")
    classify = {"data": {"task": "classify"}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"recipe": classify}))
    with pytest.raises(RunError, match="classifies rows and writes no answers"):
        open_served_model(str(tmp_path / "run"))


def test_a_proxy_pair_speaks_for_itself(start, served, tiny_model: Path, tiny_large: Path) -> None:  # type: ignore[no-untyped-def]
    tuned = loading.add_adapter(loading.load_base(ModelSpec(str(tiny_model))), AdapterSpec(rank=2), seed=0)
    with torch.no_grad():
        for parameter in loading.trained(tuned).values():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    pair = ProxyModel(loading.load_base(ModelSpec(str(tiny_large))), tuned)
    assert isinstance(pair, TokenGenerator)
    server = start(replace(served, generator=pair))
    asked = {"model": "tiny", "prompt": "ab", "max_tokens": 12, "temperature": 0, "logprobs": 2, "echo": True}
    reply = server.api.completions.create(**asked).choices[0]
    plain = list(
        ModelGenerator(pair, pair.end_ids).generate_tokens(served.codec.encode("ab"), Sampling(12, num_logprobs=2))
    )
    assert reply.text == "ab" + served.codec.decode([token.id for token in plain])
    assert reply.logprobs.token_logprobs[3:] == pytest.approx([token.logprob for token in plain], abs=1e-4)

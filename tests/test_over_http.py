"""A proxy whose large model is behind kilofed's own server, on loopback."""

from pathlib import Path

import pytest
import torch
from tests.conftest import byte_tokenizer
from tests.tiny_models import adapted, model

from kilofed.config.recipe import ModelSpec
from kilofed.errors import RemoteError
from kilofed.generation.decoding import Sampling
from kilofed.models.loading import load_base
from kilofed.proxy.api_model import RemoteModel
from kilofed.proxy.model import ProxyModel
from kilofed.proxy.spec import LargeSpec
from kilofed.serving.model import open_served_model
from kilofed.serving.requests import Limits
from kilofed.serving.server import running

TOKEN = "a-token-for-tests"


@torch.no_grad()
def test_a_proxy_over_kilofed_s_server_is_the_local_proxy(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KILOFED_API_KEY", TOKEN)
    small = adapted(1, model(1, vocabulary=259))
    near = ProxyModel(load_base(ModelSpec(str(tiny_model))), small)
    served = open_served_model(str(tiny_model), name="tiny")
    with running(served, token=TOKEN, limits=Limits(max_logprobs=259)) as url:
        large = RemoteModel(LargeSpec(f"{url}/v1", name="tiny", top_k=259), byte_tokenizer())
        far = ProxyModel(large, small)
        ids = torch.tensor([[1, 70, 71, 72], [1, 80, 81, 82]])
        torch.testing.assert_close(
            far(ids).logits.log_softmax(-1), near(ids).logits.log_softmax(-1), rtol=0, atol=1e-3
        )
        sampling = Sampling(max_new_tokens=10)
        spoken = [[token.id for token in proxy.generate_tokens([1, 70, 71], sampling)] for proxy in (far, near)]
        assert spoken[0] == spoken[1]
        large.close()
        for spec, said in (
            (LargeSpec(f"{url}/v1", name="huge"), "does not serve huge; it serves tiny"),
            (LargeSpec(f"{url}/v1", name="tiny", top_k=260), "status 400 .*260"),
            (LargeSpec(f"{url}/v1", name="tiny", key_variable="NO_SUCH_KEY"), r"refused the key .* \$NO_SUCH_KEY"),
        ):
            wrong = RemoteModel(spec, byte_tokenizer())
            with pytest.raises(RemoteError, match=said):
                wrong.top_logprobs([[1, 70]], [[2]])
            wrong.close()

"""Encoded hidden states: decoding errors and error feedback."""

import pytest
import torch

from kilofed.errors import PayloadError
from kilofed.payload import Payload
from kilofed.split import activation_codec


def rows(num: int = 50, width: int = 24) -> torch.Tensor:
    return torch.randn(num, width, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, num)[:, None]


def test_padding_is_left_out_and_comes_back_as_zeros() -> None:
    mask = activation_codec.mask_of(torch.tensor([3, 1, 2], dtype=torch.int32))
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    hidden = torch.arange(18.0).reshape(3, 3, 2) + 1
    packed = activation_codec.unpad(hidden, mask)
    assert packed.shape == (6, 2)
    assert torch.equal(activation_codec.pad(packed, mask), hidden * mask[:, :, None])


def test_float32_comes_back_as_it_is() -> None:
    tensors, left = activation_codec.encode(rows(), "float32")
    assert torch.equal(activation_codec.decode(tensors, 50, 24, "float32"), rows())
    assert not left.any()


def test_bfloat16_keeps_eight_bits_of_each_number() -> None:
    tensors, _ = activation_codec.encode(rows(), "bfloat16")
    torch.testing.assert_close(activation_codec.decode(tensors, 50, 24, "bfloat16"), rows(), rtol=2**-8, atol=0)


def test_int8_errs_by_less_than_a_step_of_its_row() -> None:
    tensors, _ = activation_codec.encode(rows(), "int8")
    assert tensors["rows"].dtype == torch.int8
    errors = (activation_codec.decode(tensors, 50, 24, "int8") - rows()).abs().amax(1)
    assert (errors <= 0.76 * rows().abs().amax(1) / 127).all()  # Half a step, and what the scale's rounding clips.


def test_the_rounding_error_of_int8_is_added_to_the_next_message() -> None:
    left, wanted, sent = None, torch.zeros(24), torch.zeros(24)
    for number in range(20):
        given = rows(8).roll(number, 0)
        tensors, left = activation_codec.encode(given, "int8", left)
        wanted, sent = wanted + given.sum(0), sent + activation_codec.decode(tensors, 8, 24, "int8").sum(0)
        torch.testing.assert_close(sent + left, wanted, rtol=1e-4, atol=1e-1)
    without = sum(
        activation_codec.decode(activation_codec.encode(rows(8).roll(n, 0), "int8")[0], 8, 24, "int8").sum(0)
        for n in range(20)
    )
    assert float((wanted - sent).norm()) < 0.3 * float((wanted - without).norm())


def test_rows_of_zeros_and_of_nan_stay_so() -> None:
    given = torch.stack([torch.zeros(4), torch.full((4,), torch.nan), torch.tensor([0.0, torch.inf, 0.0, 0.0])])
    back = activation_codec.decode(activation_codec.encode(given, "int8")[0], 3, 4, "int8")
    assert back[0].tolist() == [0.0] * 4
    assert not back[1].isfinite().any()
    assert not back[2].isfinite().all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_what_is_missing_or_of_another_shape_or_dtype_is_refused(dtype: activation_codec.WireDtype) -> None:
    good = activation_codec.encode(rows(), dtype)[0]
    wrong: list[dict[str, torch.Tensor]] = [
        {},
        {**good, "rows": good["rows"][1:]},
        {**good, "rows": good["rows"][:, 1:]},
        {**good, "rows": good["rows"].reshape(-1)},
        {**good, "rows": good["rows"].double()},
        *(activation_codec.encode(rows(), other)[0] for other in ("float32", "bfloat16", "int8") if other != dtype),
    ]
    if dtype == "int8":
        scales = good["scales"]
        wrong += [
            {"rows": good["rows"]},
            *({**good, "scales": one} for one in (scales[1:], scales.float(), scales[None])),
        ]
    else:
        wrong.append({**good, "scales": torch.ones(50, dtype=torch.bfloat16)})
    for one in wrong:
        with pytest.raises(PayloadError, match=r"the message has .*; expected"):
            activation_codec.decode(one, 50, 24, dtype)


def test_levels_and_scales_that_encode_does_not_write_are_refused() -> None:
    good = activation_codec.encode(rows(), "int8")[0]
    levels, scales = good["rows"].clone(), good["scales"].clone()
    levels[3, 5], scales[7] = -128, -1.0
    with pytest.raises(PayloadError, match="an int8 level of -128"):
        activation_codec.decode({**good, "rows": levels}, 50, 24, "int8")
    with pytest.raises(PayloadError, match="a negative scale"):
        activation_codec.decode({**good, "scales": scales}, 50, 24, "int8")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_what_is_expected_is_what_is_encoded_up_to_its_most_rows(dtype: activation_codec.WireDtype) -> None:
    like = activation_codec.expected(5, 7, dtype)
    for num in (1, 5):
        like.check(Payload(activation_codec.encode(torch.randn(num, 7), dtype)[0]))
    for num, width in ((6, 7), (5, 8)):
        with pytest.raises(PayloadError, match=r"it sent (rows|scales) of shape"):
            like.check(Payload(activation_codec.encode(torch.randn(num, width), dtype)[0]))

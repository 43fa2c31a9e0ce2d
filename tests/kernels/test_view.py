"""How tensors are seen: images and tokens, samples joined, strides of pixels, and in what units they are passed."""

from __future__ import annotations

import pytest
import torch
from harness import layouts
from torch._prims_common import suggest_memory_format

from adn_kernels.view import View, joined, memory_format, pixel_strides, stride_in, view_of_image, view_of_tokens


def read(x: torch.Tensor, view: View, channels: int) -> torch.Tensor:
    """x as a kernel reads it: (samples, pixels, channels)."""
    samples = x.numel() // (view.pixels * channels)
    return x.as_strided((samples, view.pixels, channels), view[1:4])


@pytest.mark.parametrize("sizes", [
    (2, 3, 4, 5), (1, 1, 1, 1), (1, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (2, 3, 1, 5), (2, 3, 4, 1), (1, 3, 1, 1),
    (1, 1, 1, 5), (5, 1, 1, 1),
], ids=str)
def test_image(sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    for i, x in enumerate(layouts(torch.randn(sizes))):
        assert memory_format(x) == suggest_memory_format(x)
        view = view_of_image(x)
        assert read(x, view, x.shape[1]).equal(x.flatten(2).transpose(1, 2))
        assert view.format == memory_format(x)
        for format in (torch.channels_last, torch.contiguous_format):
            stride = stride_in(x, format == torch.channels_last)
            if view.format == format:
                assert stride == (view.pixel if view.channels_last else view.sample)
        units, pixels, (strides,) = joined(len(x), 1, view)
        together = x.as_strided((units, pixels, x.shape[1]), strides)
        assert together.reshape(len(x), -1, x.shape[1]).equal(x.flatten(2).transpose(1, 2))
        if min(sizes) > 1:
            assert view.channels_last == (i % 2 == 1)
            assert units == (1 if view.channels_last else len(x))


@pytest.mark.parametrize("x", [
    torch.zeros(2, 3, 8, 8)[:, :, 1:5], torch.zeros(2, 3, 8, 8)[..., ::2], torch.zeros(2, 8, 4, 4)[:, ::2],
    torch.zeros(2, 3, 4, 5).transpose(2, 3), torch.zeros(1, 3, 4, 1).expand(1, 3, 4, 4),
    torch.zeros(2, 3, 4, 5).permute(1, 0, 2, 3),
], ids=["rows", "every second", "channels", "transposed", "expanded", "permuted"])
def test_no_image(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"neither those of NCHW nor of NHWC: pass it.contiguous\(\)"):
        view_of_image(x, "it")


def test_other_things() -> None:
    view_of_image(torch.zeros(0, 3, 4, 5))
    view_of_image(torch.zeros(2, 3, 0, 5))
    with pytest.raises(ValueError, match=r"pass \(N, C, H, W\)"):
        view_of_image(torch.zeros(2, 3, 4))


@pytest.mark.parametrize("x", [
    torch.randn(3, 5, 4), torch.randn(3, 5, 8)[..., 2:6], torch.randn(3, 9, 4)[:, 2:7], torch.randn(3, 4, 5).mT,
    torch.randn(3, 2, 5, 4), torch.randn(3, 4, 2, 5).permute(0, 2, 3, 1), torch.randn(6, 4), torch.randn(4),
    torch.randn(1, 5, 4), torch.randn(3, 1, 4), torch.randn(3, 5, 1), torch.randn(1, 1, 1),
], ids=lambda x: f"{tuple(x.shape)}-{x.stride()}")
def test_tokens(x: torch.Tensor) -> None:
    view = view_of_tokens(x)
    assert read(x, view, x.shape[-1]).equal(x.reshape(-1, view.pixels, x.shape[-1]))


@pytest.mark.parametrize("x", [
    torch.zeros(2, 3, 4, 5)[:, :, ::2].transpose(1, 2), torch.zeros(2, 3, 8)[..., ::2], torch.zeros(1, 4).expand(3, 4),
], ids=["rows", "every second", "expanded"])
def test_no_tokens(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"its rows must be evenly spaced, .*: pass it.contiguous\(\)"):
        view_of_tokens(x[None].expand(2, *x.shape) if x.ndim < 3 else x, "it")


def test_strides_of_pixels() -> None:
    for x in layouts(torch.randn(2, 3, 4, 5)):
        whole, crop = (pixel_strides(*t.shape[2:], t.stride()) for t in (x, x[:, :, 1:, 1:]))
        if memory_format(x) == torch.channels_last:
            assert whole == (None, 1, None, x.stride(3))
        else:
            assert whole == x.stride()
        assert crop == x.stride()

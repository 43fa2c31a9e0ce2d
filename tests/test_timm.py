"""Every model that timm has a name for: does it convert, and does `adn.list_models` say so?

    pytest -m full tests/test_timm.py --results bench/results       writes test_timm.csv, by module of timm; 30 minutes
"""

from __future__ import annotations

import collections
import concurrent.futures
import multiprocessing
import os
import warnings

import pytest
import timm
import torch

import adn
from adn.models.registry import _EXCLUDED, PREFIX


def judge(name: str) -> tuple[str, str]:
    """(family, "") of a model that has a plan; ("", why not) of others. No weights are made."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                model = timm.create_model(name)
            return adn.plan(model).family, ""
        except adn.ConversionError as error:
            return "", str(error)
        except Exception as error:  # timm cannot make it there
            return "", f"{type(error).__name__}: {error}"


def is_listed(name: str) -> bool:
    return PREFIX + name in adn.list_models()


@pytest.mark.parametrize("name", ["test_resnet", "vgg16", "regnetz_040", "ghostnet_100", "vit_small_r26_s32_224"])
def test_what_is_listed_converts(name: str) -> None:
    family, reason = judge(name)
    assert bool(family) is is_listed(name), reason


def test_what_is_excluded_is_there() -> None:
    for pattern in _EXCLUDED:
        assert timm.list_models(pattern), f"nothing left to exclude by {pattern}"


@pytest.mark.full
def test_every_name(table: list[dict[str, object]]) -> None:
    names = timm.list_models()
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("forkserver")) as pool:
        found = dict(zip(names, pool.map(judge, names, chunksize=8)))
    for module in timm.list_modules():
        of_module = [name for name in timm.list_models(module=module) if name in found]
        if of_module:
            families = collections.Counter(found[name][0] for name in of_module if found[name][0])
            refused = [name for name in of_module if not found[name][0]]
            table.append({
                "module": module, "names": len(of_module), "converted": families.total(),
                "families": " ".join(sorted(families)), "refused": " ".join(refused),
                "reason": " | ".join(dict.fromkeys(found[name][1].partition(". If it has")[0] for name in refused))})
    assert {name for name in names if found[name][0]} == {name for name in names if is_listed(name)}
    assert sum(bool(family) for family, _ in found.values()) >= 850

import copy
import pickle

import numpy as np
import pytest
import torch

from adn import Depth


@pytest.mark.parametrize(
    ("written", "entries", "printed"),
    [
        ("TTFF", (True, True, False, False), "TTFF"),
        ("ttff", (True, True, False, False), "TTFF"),
        ("TT|FF", (True, True, False, False), "TTFF"),
        ("TTTT|T|4", (True,) * 5 + (4,), "TTTTT|4"),
        ("T F 12", (True, False), None),
        ([True, False], (True, False), "TF"),
        ([True, 3], (True, 3), "T|3"),
        ((False,), (False,), "F"),
    ],
)
def test_parse(written, entries, printed) -> None:
    if printed is None:
        with pytest.raises(ValueError, match="'1' is neither T nor F"):
            Depth.parse(written)
        return
    depth = Depth.parse(written)
    assert tuple(depth) == entries
    assert str(depth) == printed
    assert Depth.parse(printed) == depth
    assert Depth.parse(depth) is depth
    assert Depth.parse(list(depth)) == depth
    assert hash(depth) == hash(Depth(written))


def test_super_and_base_need_a_net() -> None:
    assert Depth.parse("super", 4) == Depth("FFFF")
    assert Depth.parse("Base", 3) == Depth("TTT")
    decoder = (Depth("FF|6"), Depth("TT|4"))
    assert Depth.parse("super", decoder) == Depth("FF|6")
    assert Depth.parse("base", decoder) == Depth("TT|4")
    with pytest.raises(ValueError, match="depends on the net"):
        Depth.parse("super")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("", "no flags"),
        ("|", "no flags"),
        ("TXF", "'X' is neither T nor F"),
        ("TF0", "'0' is neither T nor F"),
        ("0011", "if 1 is to bypass, 0011 is FFTT"),
        ("011", "011 is FTT"),
        ("1100|4", "1100 is TTFF"),
        ("T|4|F", "flags come first"),
        ([True, 2, False], "flags come first"),
        ([], "empty"),
        (None, "no depth"),
        (3, "no depth"),
        ([True, 0], "at least 1"),
        ([True, None], "NoneType, not a bool"),
        ([1.0], "float, not a bool"),
        ([np.True_], "not a bool"),
        (torch.tensor([True, False]), "Tensor, not a bool"),
    ],
)
def test_what_is_not_a_depth(written, message) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Depth.parse(written)
    if "flags come first" not in message and "at least" not in message:
        assert "TTFF" in str(error.value), "the message shows what is accepted"


@pytest.mark.parametrize("written", ["TTF", "TTFFF", "TTFF|2", [True], [True, True, False, 2]])
def test_length_and_kind_are_checked(written) -> None:
    with pytest.raises(ValueError, match="this net has 4 flags"):
        Depth.parse(written, 4)


def test_too_many_layers() -> None:
    with pytest.raises(ValueError, match=r"7 layers of a stack of 6: pass e\.g\. "):
        Depth.parse("T|7", (Depth("F|6"), Depth("T|4")))


def test_every() -> None:
    assert [str(d) for d in Depth.every(Depth("FF"))] == ["FF", "FT", "TF", "TT"]
    assert [str(d) for d in Depth.every(Depth("F|3"))] == ["F|3", "F|2", "F|1", "T|3", "T|2", "T|1"]
    assert len(set(Depth.every(Depth("FFFFF")))) == 32


def test_is_a_value() -> None:
    depth = Depth("TF|3")
    assert pickle.loads(pickle.dumps(depth)) == depth
    assert copy.deepcopy(depth) == depth
    assert type(copy.deepcopy(depth)) is Depth
    assert repr(depth) == "Depth('TF|3')"
    assert (depth.flags, depth.layers) == ((True, False), (3,))
    with pytest.raises(TypeError):
        depth[0] = False

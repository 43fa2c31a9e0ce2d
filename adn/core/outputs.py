"""What nets of different libraries return."""

from __future__ import annotations

from typing import Any


def logits_of(output: Any) -> Any:
    """The logits that a net returned: its output, or of an object that holds several (as Hugging Face's nets return
    them) the field `logits`."""
    return getattr(output, "logits", output)

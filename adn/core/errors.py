"""Errors of the library's own."""


class ConversionError(ValueError):
    """A model cannot be made any-depth; says what was looked for and what to pass. The model is left untouched."""


class CheckpointError(ValueError):
    """A file of weights cannot be read, or does not fit the net."""

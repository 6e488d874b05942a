"""Every exception and warning that hf_eff raises on purpose.

A message names the address as the user typed it, what was given, what is allowed and what to do.
"""

from __future__ import annotations


class EffError(Exception):
    """Base of every error raised by hf_eff."""


class OptionError(EffError, ValueError):
    """An option has a value that is not allowed."""


class UnknownMethodError(EffError, LookupError):
    """A method name is not registered."""


class PlanError(EffError, ValueError):
    """The requested combination cannot work; found before any compute is spent."""


class DataError(EffError, ValueError):
    """A pool, a target or a row is empty, unreadable or not what a method needs."""


class ManifestError(EffError, ValueError):
    """A manifest is malformed, truncated, or describes other rows than the ones given."""


class CheckpointError(EffError, RuntimeError):
    """A checkpoint is incomplete or belongs to another run."""


class BudgetExceededError(EffError, RuntimeError):
    """The next unit of work would pass a budget; nothing of it was spent."""


class MemoryExhaustedError(EffError, MemoryError):
    """A training step does not fit, whatever the plan's ladder allows."""


class ScoringStoppedError(EffError, RuntimeError):
    """Scoring was asked to stop before every row had a score; there is no selection."""


class TrainingDivergedError(EffError, FloatingPointError):
    """The loss became NaN or infinite and the run cannot go on."""


class MissingDependencyError(EffError, ImportError):
    """An optional package that a chosen method needs is not installed."""


class EffWarning(UserWarning):
    """Base of every warning issued by hf_eff."""


class NoEffectWarning(EffWarning):
    """A method ran and changed nothing."""


class SelectionFallbackWarning(EffWarning):
    """Rows were drawn at random instead of by the method asked for."""


class OutsideIntendedUseWarning(EffWarning):
    """A method runs in a setting it was not made for."""

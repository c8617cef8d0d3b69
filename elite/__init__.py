"""ELITE (Wei et al., ICCV 2023) on today's diffusers: one picture and its mask become a word."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elite.concept import Concept as Concept
    from elite.mappers import GlobalMapper as GlobalMapper
    from elite.mappers import LocalMapper as LocalMapper
    from elite.pipeline import Elite as Elite
    from elite.pipeline import ElitePipeline as ElitePipeline
    from elite.pipeline import EliteXLPipeline as EliteXLPipeline
    from elite.speed import Speed as Speed

_HOMES = {
    "Concept": "elite.concept",
    "Elite": "elite.pipeline",
    "ElitePipeline": "elite.pipeline",
    "EliteXLPipeline": "elite.pipeline",
    "GlobalMapper": "elite.mappers",
    "LocalMapper": "elite.mappers",
    "Speed": "elite.speed",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Imports on first use, so that a mistyped flag need not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'elite' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)

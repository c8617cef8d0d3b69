"""ELITE (Wei et al., ICCV 2023) on today's diffusers: one picture and its mask become a word."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elite.concept import Concept
    from elite.mappers import GlobalMapper, LocalMapper
    from elite.pipeline import Elite, ElitePipeline, EliteXLPipeline
    from elite.speed import Speed

__all__ = [
    "Concept",
    "Elite",
    "ElitePipeline",
    "EliteXLPipeline",
    "GlobalMapper",
    "LocalMapper",
    "Speed",
]

_HOMES = {
    "Concept": "elite.concept",
    "Elite": "elite.pipeline",
    "ElitePipeline": "elite.pipeline",
    "EliteXLPipeline": "elite.pipeline",
    "GlobalMapper": "elite.mappers",
    "LocalMapper": "elite.mappers",
    "Speed": "elite.speed",
}


def __getattr__(name: str) -> Any:
    """Imports on first use, so that a mistyped flag need not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'elite' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)

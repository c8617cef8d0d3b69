"""ELITE (Wei et al., ICCV 2023) on today's diffusers: one picture and its mask become a word."""

from elite.concept import Concept
from elite.mappers import GlobalMapper, LocalMapper
from elite.pipeline import ElitePipeline

__all__ = ["Concept", "ElitePipeline", "GlobalMapper", "LocalMapper"]

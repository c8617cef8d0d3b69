"""Textual inversion (Gal et al. 2022, arXiv 2208.01618): a new word learned from a few pictures.
Stable Diffusion 1.x and SDXL; the files are those of diffusers."""

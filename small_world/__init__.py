"""A small rendered world and the small Stable Diffusion that learns it: the project's laptop-size
default."""

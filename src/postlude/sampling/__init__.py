"""Diffusion samplers, and what corrects them for an approximate denoiser."""

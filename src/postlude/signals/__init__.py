"""Signals stored as the weights of small networks: fit, render, quantize, store."""

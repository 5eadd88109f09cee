"""Architectures as data: what their tensors are called, and what decides about generating."""

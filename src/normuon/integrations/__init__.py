"""Adapters for training frameworks that build optimizers by an interface of their own.

Each file imports its framework only when it is used. Most frameworks need no adapter: see
`examples/`.
"""

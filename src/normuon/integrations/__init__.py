"""Adapters for training frameworks that build optimizers through their own interface.

Each file imports its framework only when it is used. Most frameworks need no adapter: see
`examples/`.
"""

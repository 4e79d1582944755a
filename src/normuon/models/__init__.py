"""Decides what each parameter of a model is, and how it becomes matrices."""

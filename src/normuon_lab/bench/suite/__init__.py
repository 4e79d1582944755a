"""One run of about ten minutes that measures everything about NorMuon on one GPU.

It needs torch and the standard library; jinja2, pytest and peers are used where they are installed.
"""

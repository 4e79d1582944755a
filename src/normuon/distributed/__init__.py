"""One step over many ranks: a pure planner, a layout reader, an exchange and a pipeline.

`plan` and everything that it imports use nothing but the standard library, so a plan can be drawn
up, printed and compared without any process group.
"""

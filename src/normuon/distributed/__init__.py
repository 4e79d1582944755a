"""One step over many ranks: a pure planner, a layout reader, copies and an exchange.

`plan` and everything that it imports use nothing but the standard library, so a plan can be drawn
up, printed and compared without any process group.
"""

"""The evidence: which runs the claims rest on, and the tables and figures made from them."""

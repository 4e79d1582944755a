"""The evidence: the runs behind the claims, and the tables and figures made from them."""

"""`normuon compare`: compares arms on equal terms, as a file, a report and a table."""

"""`normuon compare`: arms against each other on equal terms, as a file, a report and a table."""

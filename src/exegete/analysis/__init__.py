"""Results to knowledge: the numbers of a run, the terminal table, and the report."""

"""Mistakes put back into a copy of the package, each with the test that must fail for it.

`mutants` lists them, `runner` applies and tests them, `python -m tests.mutations` prints a table.
"""

"""The command line: each verb turns its arguments into one call below and prints the result."""

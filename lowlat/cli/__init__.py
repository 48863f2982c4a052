"""Command-line interface (typer): each verb parses its arguments, calls one function and prints."""

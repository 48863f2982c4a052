"""HTTP routes: one module per API endpoint, with its handler and response builder."""

"""The ways in which models write tool calls: reading them as they stream, and forcing them."""

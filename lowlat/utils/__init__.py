"""Small helpers every layer may use; no project imports."""

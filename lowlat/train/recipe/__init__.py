"""Training recipes: TOML schema, validation errors, schedules."""

"""Pipeline parallelism: stages of a model, schedules, and passes through them."""

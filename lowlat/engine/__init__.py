"""Requests to tokens: options, page pool, scheduler, runner, sampler, and the Model users hold."""

"""Requests to tokens: options, page allocator, scheduler, runner, sampler, and the Model users
hold."""

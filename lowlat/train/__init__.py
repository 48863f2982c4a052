"""Training. Imports go one way through its packages: recipe, layers, parallel, step, pipeline,
policy, run.

recipe: what a training recipe may contain; layers: modules that replace those of the model;
parallel: sharding over a process mesh; step: losses and optimizers; pipeline: pipeline parallelism;
policy: rollouts and updates of GRPO; run: the trainer, with its checkpoints and metrics. rewards:
reward functions in worker processes.
"""
